"""What `rorqual quantize` has found: perplexity, errors by layer, sizes."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rorqual.checkpoint.model_reader import stored_tensors


@dataclass(frozen=True)
class LayerError:
    """Relative errors ‖quantised − exact‖ / ‖exact‖ of a layer's linears, by their names in it."""

    layer: str
    linears: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.linears.values()) / len(self.linears)

    @property
    def largest(self) -> str:
        return max(self.linears, key=self.linears.__getitem__)


@dataclass(frozen=True)
class Perplexity:
    """On held-out text, with the unquantised and with the written weights, both computed in FP32."""

    before: float
    after: float
    tokens: int
    text: str

    @property
    def change(self) -> float:
        return self.after / self.before - 1


@dataclass
class QuantizationReport:
    """`calibration`: the text; None: no calibration, and `layers` has errors of weights, not of outputs.

    `rounded_to_nearest`: linears that received too few rows for the method.
    """

    format: str
    method: str
    calibration: str | None
    calibration_tokens: int = 0
    layers: list[LayerError] = field(default_factory=list)
    rounded_to_nearest: list[str] = field(default_factory=list)
    perplexity: Perplexity | None = None
    bytes_before: int = 0
    bytes_after: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found["error_of"] = "weights" if self.calibration is None else "outputs"
        found["layers"] = [asdict(layer) | {"error": layer.mean} for layer in self.layers]
        if self.perplexity is not None:
            found["perplexity"] |= {"change": self.perplexity.change}
        return found


def relative(squared_error: float, squared_norm: float) -> float:
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0


def weight_bytes(directory: Path) -> int:
    """Bytes of a directory's safetensors files."""
    return sum(path.stat().st_size for path in {tensor.path for tensor in stored_tensors(directory).values()})
