"""Untrusted code and slow checkers, in processes of their own."""
