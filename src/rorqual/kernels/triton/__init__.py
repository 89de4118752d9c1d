"""GPU kernels in Triton. Its modules import Triton, so they are imported where it is known to be there (gpu.py)."""
