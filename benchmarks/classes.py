"""Each processor class that this machine has or can lower itself to, against peers limited to the same class.

Runs decode.py, train.py and rl_step.py in processes of their own, whose settings limit Rorqual's kernels, PyTorch,
oneDNN and MKL to the class, with a llama.cpp that is built for it. Ratios are named CLASS/WORK/PEER. What is kept of
other classes and works stays, so they can be run one at a time; --classes and --works choose.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, program, report
from machines import instruction_class
from peers import llama_python
from rorqual.errors import UserError
from rorqual.processor import MKL, ONEDNN, VARIABLE

# Of a class: what llama.cpp is built with, each beside those before it.
LLAMA = {
    "avx2": ("AVX", "AVX2", "FMA", "F16C", "BMI2"),
    "avx512": ("AVX512",),
    "avx512-vnni": ("AVX512_VNNI",),
    "avx512-bf16": ("AVX512_BF16",),
    "amx": ("AMX_TILE", "AMX_INT8", "AMX_BF16"),
}
# Of a program: its ratios that are kept, and their names here.
WORKS = {
    "decode": {
        "decode-b1-int4/llama.cpp-q4_0": "decode-b1-int4/llama.cpp-q4_0",
        "decode-b32-int4/llama.cpp-q4_0": "decode-b32-int4/llama.cpp-q4_0",
        "prefill-512-int4/llama.cpp-q4_0": "prefill-512-int4/llama.cpp-q4_0",
        "moe-decode-b1/dense-active-size": "moe-decode-b1/dense-active-size",
    },
    "train": {"tokens-per-second/transformers": "train/transformers"},
    "rl_step": {"step/trl": "rl-step/trl"},
}


def own_class() -> str:
    """The highest class of this machine that is in LLAMA."""
    found = instruction_class()
    if found not in LLAMA:
        raise UserError(f"the compiled kernels in use are {found}; the lowest class measured is avx2")
    return found


def settings(name: str, own: str) -> dict[str, str]:
    """The environment of a class's processes."""
    if name == own:
        return {}
    classes = list(LLAMA)
    built = [flag for each in classes[: classes.index(name) + 1] for flag in LLAMA[each]]
    path = [str(llama_python(name, built)), os.environ.get("PYTHONPATH", "")]
    return {
        VARIABLE: name,
        "ATEN_CPU_CAPABILITY": "avx2" if name == "avx2" else "avx512",
        "ONEDNN_MAX_CPU_ISA": ONEDNN[name],
        "MKL_ENABLE_INSTRUCTIONS": MKL[name],
        "PYTHONPATH": os.pathsep.join(path),
    }


def measured(work: str, environment: dict[str, str], quick: bool) -> dict[str, Any]:
    """The object that a benchmark ends with."""
    command = [sys.executable, Path(__file__).with_name(f"{work}.py"), *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        done = subprocess.run([*command, "--out", out], env=os.environ | environment, stdout=sys.stderr)
        if not out.exists():
            raise UserError(f"{work}.py ended with {done.returncode} and kept nothing")
        return json.loads(out.read_text())


def main() -> None:
    # Of all works; each program has limits for its own contestants.
    args = arguments(__doc__, classes="", works=" ".join(WORKS))
    own = own_class()
    every = list(LLAMA)[: list(LLAMA).index(own) + 1]
    classes = args.classes.split() or every
    for given, known, what in ((classes, every, "classes"), (args.works.split(), list(WORKS), "works")):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"--{what} {unknown[0]}: not here; there are {', '.join(known)}")
    figures: dict[str, Any] = {}
    if args.out and args.out.exists():
        figures = json.loads(args.out.read_text())["figures"]
    failed: dict[str, str] = {}
    for name in classes:
        environment = settings(name, own)
        for work in args.works.split():
            print(f"{name}: {work}.py", file=sys.stderr, flush=True)
            found = measured(work, environment, args.quick)
            figures.setdefault(name, {})[work] = {key: found[key] for key in ("ratios", "failed", "versions", "commit")}
            failed |= {f"{name}/{contestant}": why for contestant, why in found["failed"].items()}
    ratios: dict[str, float] = {}
    for name, works in figures.items():
        for work, found in works.items():
            kept = WORKS[work].items()
            ratios |= {f"{name}/{to}": found["ratios"][key] for key, to in kept if key in found["ratios"]}
    columns = list(dict.fromkeys(key.partition("/")[2] for key in ratios))
    rows = [[name, *(ratios.get(f"{name}/{column}", "–") for column in columns)] for name in figures]
    report(
        "classes", args, ratios, figures, [("Ratios to the peer, of one class each", ["class", *columns], rows)],
        ["torch", "llama-cpp-python", "transformers", "trl"], failed,
    )  # fmt: skip


if __name__ == "__main__":
    program(main)
