"""Small number formats: elements of 4 to 12 bits that share a scale by tile.

A value is element · scale. A format says which elements, how many values share a scale, and which scales there are;
it is data, so that one linear serves all of them.

| | elements | scale of | scale is | source |
|---|---|---|---|---|
| FP8 tiles, blocks | E4M3 | 1×128, 128×128 | FP32 | V3 §3.3.2 |
| E5M6 | E5M6 | 1×128 | a power of two | V3 §3.3.3, inputs of the linear after attention |
| MXFP8, MXFP4 | E4M3, E2M1 | 1×32 | a power of two (E8M0) | OCP Microscaling Formats 1.0 |
| NVFP4 | E2M1 | 1×16 | E4M3, times one FP32 a tensor | NVIDIA, arXiv 2509.25149 |

Powers of two are rounded up, so that no element saturates (arXiv 2506.08027 §3: rounding them down costs loss).
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Element:
    """A floating-point number of sign, exponent and mantissa, with subnormals and without infinities."""

    name: str
    mantissa: int  # bits
    least_exponent: int  # of normal numbers
    largest: float  # finite; larger ones saturate
    bits: int  # of its code


E4M3 = Element("E4M3", 3, -6, 448.0, 8)  # torch.float8_e4m3fn
E5M6 = Element("E5M6", 6, -14, 65024.0, 12)  # exponents as in FP16
E2M1 = Element("E2M1", 1, 0, 6.0, 4)

ScaleKind = Literal["fp32", "power of two", "e4m3"]


@dataclass(frozen=True)
class NumberFormat:
    """`tile`: rows and columns that share a scale; 0: all of them."""

    name: str
    element: Element
    tile: tuple[int, int]
    scale: ScaleKind

    @property
    def transposed(self) -> "NumberFormat":
        """With tiles along rows instead of columns: of a product's factor that is contracted over its rows."""
        return replace(self, tile=self.tile[::-1])

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """Number of scales of a matrix; the last tile of a row or column may be partial."""
        height, width = self.tile
        return -(-rows // height) if height else 1, -(-columns // width) if width else 1

    def within(self, rows: int, columns: int) -> "NumberFormat":
        """With tiles no larger than a matrix, which has the same scales."""
        return replace(self, tile=(min(self.tile[0], rows), min(self.tile[1], columns)))

    def bytes_per_value(self) -> float:
        """Of element and scale, where tiles are full."""
        size = {"fp32": 4, "power of two": 1, "e4m3": 1}[self.scale]
        height, width = self.tile
        return self.element.bits / 8 + (size / (height * width) if height and width else 0.0)


FP8_TILE = NumberFormat("FP8 1×128", E4M3, (1, 128), "fp32")
FP8_BLOCK = NumberFormat("FP8 128×128", E4M3, (128, 128), "fp32")
FP8_TENSOR = NumberFormat("FP8 per tensor", E4M3, (0, 0), "fp32")
E5M6_TILE = NumberFormat("E5M6 1×128", E5M6, (1, 128), "power of two")
MXFP8 = NumberFormat("MXFP8", E4M3, (1, 32), "power of two")
MXFP4 = NumberFormat("MXFP4", E2M1, (1, 32), "power of two")
NVFP4 = NumberFormat("NVFP4", E2M1, (1, 16), "e4m3")


def with_powers_of_two(format: NumberFormat) -> NumberFormat:
    """The same with scales that are powers of two (UE8M0: V3.1's releases)."""
    return replace(format, name=f"{format.name} UE8M0", scale="power of two")


FP8_TRAVEL = with_powers_of_two(FP8_TILE)  # of tokens on their way to experts (V3 §3.3.3)
