"""Quantisation: rounding of weights, SmoothQuant, quantised checkpoints."""
