"""Shapes and dtypes of tensors as annotations, in jaxtyping's notation: `Float[Tensor, "B T D"]`.

tests/helpers/shape_checks.py checks them in every test; elsewhere they are plain Tensor, so jaxtyping is imported only
where something else has imported it.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import BFloat16, Bool, Float, Float32, Float64, Int, Int32, Int64, UInt8
else:

    class Float:
        def __class_getitem__(cls, tensor_and_shape: tuple[Any, str]) -> Any:
            return tensor_and_shape[0]

    BFloat16 = Bool = Float32 = Float64 = Int = Int32 = Int64 = UInt8 = Float

__all__ = ["BFloat16", "Bool", "Float", "Float32", "Float64", "Int", "Int32", "Int64", "UInt8"]
