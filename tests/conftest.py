import rorqual  # noqa: F401  before any test imports torch, so that RORQUAL_CPU lowers both
from helpers import shape_checks

shape_checks.install()
