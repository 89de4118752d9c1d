"""The chips that plans are made for: a data file, more from the user, and this machine's processor."""

import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from rorqual.errors import UserError
from rorqual.files import read_text
from rorqual.sections import Count, NotNegative, Section

Rate = Annotated[float, Field(gt=0, le=1e21)]  # FLOP/s or bytes/s
PRECISIONS = ("float32", "bfloat16", "fp8")


class Chip(Section):
    """A chip of chips.toml, whose header explains the fields."""

    name: str
    family: str  # chips with the same calibration
    peak: dict[str, Rate]
    memory: Rate
    bandwidth: Rate
    per_node: Count = 8
    within: Rate = 1e9
    between: Rate = 1e9
    watts: NotNegative = 0.0
    source: str
    price: NotNegative | None = None
    price_source: str = ""

    @model_validator(mode="after")
    def _known_precisions(self) -> "Chip":
        unknown = self.peak.keys() - set(PRECISIONS)
        if unknown or "bfloat16" not in self.peak:
            raise ValueError(f"peak needs bfloat16, and takes {', '.join(PRECISIONS)}")
        return self

    def rate(self, precision: str) -> float:
        """FLOP/s of products in a precision; without units for it they run in BF16."""
        return self.peak.get(precision, self.peak["bfloat16"])


def known_chips(more: Path | None = None) -> dict[str, Chip]:
    """By name; `more`: a file of the user's, whose chips replace those of the same name. Raises UserError."""
    found = _read(files("rorqual.plan").joinpath("chips.toml").read_text(), "chips.toml")
    return found | (_read(read_text(more), str(more)) if more else {})


def find_chip(name: str, more: Path | None = None) -> Chip:
    """`cpu` is this machine's processor. Raises UserError for an unknown one."""
    if name.lower() == "cpu":
        from rorqual.plan.this_machine import chip_here  # needs torch, which other plans do not wait for

        return chip_here()
    chips = known_chips(more)
    if name.lower() not in chips:
        raise UserError(
            f"--gpu {name}: no such chip is known; say one of {', '.join(chips)}, cpu, or describe it in a file for "
            "--chips"
        )
    return chips[name.lower()]


# What drivers say beside a chip's name, and what does not make it another one.
BESIDE = re.compile(r"nvidia|amd|geforce|instinct|tesla|gpu|sxm\d*|oam|hbm\w*|\d+gb")
MEMORY_RATIO = 0.85, 1.15  # of a driver's count to the data's: some leave out what is reserved


def chip_called(name: str, memory: float, chips: Mapping[str, Chip]) -> str | None:
    """The chip that a driver calls `name`, such as "NVIDIA A100-SXM4-80GB"; None: none, or another one of its kind.

    memory: in bytes, in which chips of the same name may differ.
    """
    words = "".join(word for word in re.split(r"[\W_]+", name.lower()) if not BESIDE.fullmatch(word))
    for key, chip in chips.items():
        if words == key and MEMORY_RATIO[0] <= memory / chip.memory <= MEMORY_RATIO[1]:
            return key
    return None


def _read(text: str, source: str) -> dict[str, Chip]:
    try:
        raw = tomllib.loads(text)
    except ValueError as e:
        raise UserError(f"{source} is not valid TOML: {e}") from None
    found: dict[str, Chip] = {}
    for name, fields in raw.items():
        try:
            found[name.lower()] = Chip.model_validate(fields)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, (name, *first["loc"])))
            raise UserError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    return found
