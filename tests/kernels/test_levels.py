"""Lower classes of processors say what the references say, on whatever this machine is.

A library is loaded once a process, so a chosen few tests run in another one for every class; all of them do by
RORQUAL_CPU=portable pytest tests/kernels tests/engine.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.kernels import cpu
from rorqual.kernels.cpu import bindings
from rorqual.processor import CLASSES, VARIABLE

ROOT = Path(__file__).parents[2]
CHOSEN = [
    "tests/kernels/test_quantized_linear.py",
    "tests/kernels/test_dense_attention.py",
    "tests/kernels/test_paged_attention.py",
    "tests/kernels/test_kv_int8.py",
    "tests/kernels/test_kv_fp8.py",
    "tests/kernels/test_elementwise.py",
    "tests/kernels/test_adamw.py",
    "tests/kernels/exact",
    "tests/kernels/test_block_scaled.py",
    "tests/kernels/test_rotary.py",
    "tests/kernels/test_moe_permute.py",
    "tests/kernels/test_sample.py::test_without_temperature_the_first_of_the_most_probable",
    "tests/kernels/test_sample.py::test_what_is_forbidden_is_never_drawn",
    "tests/engine/test_sampling.py",
    "tests/engine/test_fused_cpu.py::test_logits_are_the_networks",
    "tests/engine/test_fused_cpu.py::test_several_tokens_of_a_sequence_at_once",
]
LONGER = [
    "tests/engine/test_fused_cpu.py::test_a_cache_of_8_bits_keeps_and_says_what_the_reference_does",
    "tests/engine/test_fused_cpu.py::test_an_fp8_cache_keeps_and_says_what_the_reference_does",
]
# Of decode steps two networks of ten, in FP32, which are most of the code; of products a large and an odd shape.
LEFT_OUT = (
    "not (logits_are and not (grouped or experts)) and not (logits_are and bfloat16) and not (products and bfloat16)"
)


def in_use() -> str:
    if cpu.has_matrix_unit():
        return "amx"
    if cpu.has_dot_products():
        return "avx512-bf16"
    return "avx512-vnni" if cpu.has_byte_products() else cpu.capability() or "none"


@pytest.mark.skipif(bool(os.environ.get(VARIABLE)), reason=f"{VARIABLE} is set: all tests run in one class")
# CI runs all tests of kernels and engine on classes avx2 and none.
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("portable", CHOSEN),
        pytest.param("portable", LONGER, marks=pytest.mark.slow),
        *(
            pytest.param(name, CHOSEN + LONGER, marks=pytest.mark.slow)
            for name in ("none", "avx2", "avx512", "avx512-bf16")
        ),
    ],
)
def test_a_lower_class_agrees(name, chosen):
    if CLASSES.index(name) >= CLASSES.index(in_use()):
        pytest.skip("not lower than what the other tests run in")
    level = name.partition("-")[0]
    if level in cpu.LEVELS and isinstance(why := bindings._load(level), str):
        pytest.skip(why)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {VARIABLE: name, "OMP_NUM_THREADS": "1"}
    run = f"""
import sys
import pytest
from rorqual.kernels import cpu
assert cpu.capability() == {None if level == "none" else level!r}, cpu.capability()
sys.exit(pytest.main(sys.argv[1:]))"""
    command = [sys.executable, "-c", run, "-p", "no:cacheprovider", "--tb=short", "-k", LEFT_OUT, *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
