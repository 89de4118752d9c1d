"""What the machine computes fastest, and what is said where somebody wants something else."""

import pytest
import torch

from rorqual.kernels import dtypes
from rorqual.kernels.dtypes import compute_dtype, dtype_name, fastest_dtype


@pytest.fixture
def fresh():
    """Every decision is made anew, and nothing of it is left to other tests."""
    caches = (dtypes._fastest, dtypes.bf16_speed, dtypes._warn_emulated)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def set_flag(monkeypatch, bf16):
    """Whether the processor's flags have BF16 units."""
    found = {"architecture": "x86_64", "avx512_bf16": bf16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


@pytest.fixture
def emulated(fresh, monkeypatch):
    monkeypatch.setattr(dtypes, "bf16_speed", lambda: 1 / 70)


@pytest.mark.parametrize(("ratio", "dtype"), [(2.1, torch.bfloat16), (0.014, torch.float32)])
def test_a_measurement_decides_where_flags_do_not(fresh, monkeypatch, ratio, dtype):
    set_flag(monkeypatch, True)
    monkeypatch.setattr(dtypes, "bf16_speed", lambda: ratio)
    assert fastest_dtype() is compute_dtype("auto") is dtype


def test_flags_that_rule_it_out_need_no_measurement(fresh, monkeypatch):
    set_flag(monkeypatch, False)
    monkeypatch.setattr(dtypes, "bf16_speed", lambda: pytest.fail("measured"))
    assert fastest_dtype("cpu") is torch.float32


def test_bf16_where_it_is_emulated_is_honoured_and_its_price_said_once(emulated, monkeypatch, capsys):
    set_flag(monkeypatch, True)
    assert compute_dtype("bfloat16") is compute_dtype("bfloat16") is torch.bfloat16
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in ("bfloat16", "70 times", "float32"))
    compute_dtype("float32")
    assert capsys.readouterr().err == ""


def test_names_go_both_ways():
    assert all(compute_dtype(dtype_name(dtype)) is dtype for dtype in (torch.float32, torch.bfloat16))
