"""Untrusted code and slow checkers, in separate processes."""
