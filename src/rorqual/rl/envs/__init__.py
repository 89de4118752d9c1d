"""Environments: problems and the check of an answer."""
