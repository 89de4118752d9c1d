"""RORQUAL_CPU lowers the class, here and in PyTorch; nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual import processor
from rorqual.errors import UserError
from rorqual.kernels import cpu
from rorqual.kernels.cpu import bindings

TORCH = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def python(code, **environment):
    """What a fresh interpreter prints."""
    clean = {key: value for key, value in os.environ.items() if key not in (*TORCH, processor.VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


def test_names_are_the_same_in_cpp():
    header = (Path(cpu.__file__).parent / "csrc" / "cpu_class.h").read_text()
    table = re.search(r"CPU_CLASSES\[\] = {(.*)}", header)[1]
    assert tuple(re.findall(r'"([^"]+)"', table)) == processor.CLASSES
    numbers = re.search(r"enum CpuClass {(.*)}", header)[1].strip().split(", ")
    assert [name.lower().replace("_", "-") for name in numbers] == list(processor.CLASSES)


def test_a_class_leaves_those_below(monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, "avx512")
    assert [name for name in processor.CLASSES if processor.allows(name)] == ["none", "portable", "avx2", "avx512"]
    for unset in ("", None):
        monkeypatch.setenv(processor.VARIABLE, "") if unset == "" else monkeypatch.delenv(processor.VARIABLE)
        assert processor.highest() == "amx"


def test_an_unknown_class_is_one_sentence(monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, "sse9")
    processor.lower_torch()  # leaves it to what comes
    with pytest.raises(
        UserError, match=r"RORQUAL_CPU=sse9: not a processor class.* none, portable, avx2, avx512, .*amx"
    ):
        processor.highest()


@pytest.mark.parametrize("name", ["none", "portable"])
def test_torch_obeys_too(name):
    code = "from rorqual.kernels.cpu.bindings import *; print(torch.backends.cpu.get_cpu_capability(), capability());"
    code += "from rorqual.kernels import cpu; print(*cpu.describe(), sep='\\n')"
    found, said = python(code, RORQUAL_CPU=name)
    capabilities, *described = found.splitlines()
    assert capabilities.split()[0] in ("DEFAULT", "NO")  # "NO AVX" in some versions
    assert capabilities.split()[-1] in ("None", name)
    assert "torch was imported before" not in said
    assert sum("used=False, why='RORQUAL_CPU=none'" in line for line in described) >= (3 if name == "none" else 0)


def test_its_own_variables_come_first(monkeypatch):
    for key in TORCH:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv(processor.VARIABLE, "portable")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    with pytest.warns(UserWarning, match="torch was imported before rorqual"):
        processor.lower_torch()
    assert [os.environ.get(key) for key in TORCH] == ["avx2", None, "AVX2", "SSE4_2"]


def test_lowering_torch_lowers_the_functions():
    code = "from rorqual.kernels import cpu; print(cpu.capability())"
    assert python(code, ATEN_CPU_CAPABILITY="default")[0] in ("portable", "None")


def test_what_is_used_is_described(monkeypatch):
    parts = {part: (used, why) for part, used, why in cpu.describe()}
    assert [part for part, (used, _) in parts.items() if used and part.startswith("compiled")] == (
        [f"compiled functions, {cpu.capability()}"] if cpu.capability() else []
    )
    assert all(why for _, why in parts.values())
    monkeypatch.setattr(bindings, "INTERFACE", -1)
    if cpu.capability() not in (None, "portable"):
        why = next(use.why for use in cpu.describe() if use.part == "compiled functions, portable")
        assert "of other sources" in why or "not built" in why
