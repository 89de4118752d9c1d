"""Environments: problems with verifiable answers, and their verifiers."""
