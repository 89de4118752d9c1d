"""A model in the exact mode computes the same bits on every class of processor."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.kernels import cpu
from rorqual.kernels.cpu import bindings
from rorqual.kernels.cross_entropy import token_logprobs
from rorqual.model import Transformer
from rorqual.precision.exact import make_exact
from rorqual.processor import CLASSES, VARIABLE

CONFIGS = {"grouped": GROUPED, "latent": LATENT}


def fingerprint(name: str) -> str:
    """Of the log-probabilities of a text, by a model of NumPy's random numbers."""
    model = Transformer(CONFIGS[name])
    random = np.random.default_rng(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(random.normal(0, 0.3, p.shape).astype(np.float32)))
        make_exact(model)
        tokens = torch.from_numpy(random.integers(0, 60, (1, 33)))
        hidden = model(tokens)[0]
        found, _ = token_logprobs(hidden[:-1], model.head_weight, tokens[0, 1:], 0.7, exact=True)
    assert found.isfinite().all()
    return hashlib.sha256(hidden.numpy().tobytes() + found.numpy().tobytes()).hexdigest()


@pytest.mark.skipif(bool(os.environ.get(VARIABLE)), reason=f"{VARIABLE} is set")
@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_classes_of_processors_agree(level):
    if cpu.capability() is None or CLASSES.index(level) >= CLASSES.index(cpu.capability()):
        pytest.skip("not lower than what the other tests run in")
    if isinstance(why := bindings._load(level), str):
        pytest.skip(why)
    run = f"from test_exact import *; assert cpu.capability() == {level!r}; print(*map(fingerprint, CONFIGS))"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    environment = os.environ | {VARIABLE: level, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", f"import rorqual; {run}"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [fingerprint(name) for name in CONFIGS]
