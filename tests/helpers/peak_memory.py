"""Peak memory of loading a model, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

# Not getrusage, whose peak survives exec and so begins with the parent's.
MEASURE = r"""
import re, sys
from pathlib import Path
from rorqual.kernels.fp8_weight import FP8Weight
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.process_tuning import release_memory
memory = lambda field: 1024 * int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
load(sys.argv[2])  # libraries load their code at first use
release_memory()
before = memory("VmRSS")
model = load(sys.argv[1])
size = sum(p.nbytes for p in model.parameters())
size += sum(v.data.nbytes for m in model.modules() for v in vars(m).values() if isinstance(v, QuantizedWeight))
size += sum(
    v.codes.nbytes + v.scales.nbytes for m in model.modules() for v in vars(m).values() if isinstance(v, FP8Weight)
)
print((memory("VmHWM") - before) / size, size)
"""


def loading_peak(load: str, large: Path, small: Path) -> tuple[float, float]:
    """(peak memory ÷ the model's bytes, the model's bytes) of loading `large`, after `small` was loaded. Linux only.

    load: code that defines a function `load(path)`, which returns a model.
    """
    command = [sys.executable, "-c", load + MEASURE, str(large), str(small)]
    ratio, size = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(ratio), float(size)
