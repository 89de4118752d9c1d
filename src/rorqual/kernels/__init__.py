"""Operators with a fast implementation; each has a plain reference beside it."""
