import rorqual  # noqa: F401  before any test imports torch, so that RORQUAL_CPU lowers both
