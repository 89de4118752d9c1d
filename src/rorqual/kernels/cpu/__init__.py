"""Compiled CPU kernels: C++ sources in csrc/, compiled by build.py, called through bindings.py."""

from rorqual.kernels.cpu.bindings import (
    FLOAT,
    INTERFACE,
    LEVELS,
    SIGNATURES,
    Use,
    call,
    capability,
    describe,
    has_byte_products,
    has_dot_products,
    has_matrix_unit,
    rows,
    usable,
)

__all__ = [
    "FLOAT",
    "INTERFACE",
    "LEVELS",
    "SIGNATURES",
    "Use",
    "call",
    "capability",
    "describe",
    "has_byte_products",
    "has_dot_products",
    "has_matrix_unit",
    "rows",
    "usable",
]
