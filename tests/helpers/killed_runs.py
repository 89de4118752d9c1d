"""A run killed again and again beside the same run undisturbed, for pre-training and for reinforcement learning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Forks a fresh run for each kill, so that torch is imported once and a kill takes a second. Every other kill waits
# for a checkpoint's writing.
HARNESS = """
import importlib, os, random, signal, sys, time
from rorqual.recipe import PretrainRecipe, RLRecipe, load_recipe
import transformers, tokenizers

verb, module = sys.argv[1:3]
if verb == "rl":
    import reasoning_gym
kills = int(sys.argv[5])
run = getattr(importlib.import_module(module), verb)
whole, killed = (load_recipe(path, {"pretrain": PretrainRecipe, "rl": RLRecipe}[verb]) for path in sys.argv[3:5])
checkpoints = killed.run_dir / "checkpoints"

def start(recipe):
    pid = os.fork()
    if pid == 0:
        run(recipe, resume=True)
        os._exit(0)
    return pid

began = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
took = time.monotonic() - began
generator = random.Random(0)
while_writing = 0
for number in range(kills):
    pid = start(killed)
    time.sleep(generator.uniform(0.0, 0.8 * took / kills))  # so that all of them do not get to the end
    if number % 2:
        while not list(checkpoints.glob(".writing-*")):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended"
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
    while_writing += bool(list(checkpoints.glob(".writing-*")))
assert os.waitpid(start(killed), 0)[1] == 0
print(while_writing)
"""


KILLS = [4, pytest.param(20, marks=pytest.mark.slow)]


def run_whole_and_killed(verb: str, module: str, whole: Path, killed: Path, kills: int) -> None:
    """Run both recipes to their end, the second through so many SIGKILLs, a quarter of them or more while it writes
    a checkpoint.

    verb, module: the function that runs a recipe, such as `rl`, and the module that has it.
    """
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, verb, module, str(whole), str(killed), str(kills)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= kills // 4
