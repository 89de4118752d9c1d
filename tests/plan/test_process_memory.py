"""Memory of a training step against what PyTorch allocates in one, by its own record."""

import pytest
import torch

from rorqual.data.loader import Batch
from rorqual.kernels.dtypes import fastest_dtype
from rorqual.model import ModelConfig, Transformer
from rorqual.plan.optimizer_state import predict_state, update_bytes
from rorqual.plan.process_memory import memory
from rorqual.recipe import OptimizerSection, ScheduleSection
from rorqual.train.trainer import Trainer

CONFIG = ModelConfig(
    model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
ROWS, LENGTH = 8, 64


def allocated_at_most(work):
    """Above what is there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    total = most = 0
    for _, size in events:
        total += size
        most = max(most, total)
    return most


def trainer_of(**section):
    torch.manual_seed(0)
    return Trainer(
        Transformer(CONFIG), OptimizerSection(**section), ScheduleSection(name="constant", warmup=0), dtype="float32",
        notify=lambda _: None,
    )  # fmt: skip


def batch():
    ids = torch.randint(0, CONFIG.vocab_size, (ROWS, LENGTH + 1))
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(ROWS, LENGTH), positions, None)


@pytest.fixture
def compiled_functions():
    """The references keep more than the compiled functions."""
    from rorqual.kernels import cpu

    if cpu.capability() is None:
        pytest.skip("no compiled functions")


@pytest.mark.usefixtures("compiled_functions")
def test_a_step_allocates_activations_and_loss():
    """Gradients come as activations go: there are more of these here."""
    trainer, needed = trainer_of(), memory(CONFIG, ROWS * LENGTH)
    trainer.step([batch()], 0.5)
    assert needed.activations + needed.loss > 2 * needed.gradients
    found = allocated_at_most(lambda: trainer.step([batch()], 0.5))
    assert needed.activations + needed.loss == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_muons_update_allocates(moments):
    trainer = trainer_of(name="muon", moments=moments)
    trainer.step([batch()], 0.5)
    trainer._accumulate([batch()], objective_of(trainer))
    wanted = sum(update_bytes(CONFIG, trainer.optimizer.section))
    assert allocated_at_most(lambda: trainer.optimizer.step(1.0)) == pytest.approx(wanted, rel=0.05)


def objective_of(trainer):
    from rorqual.train.objective import Objective

    return Objective(trainer.model, [float(ROWS * LENGTH)], 0.0, 0.0, float(ROWS))


def test_muons_stacks_by_hand():
    """Of feed-forward parts: three matrices a layer, as they are, in an iterate and the next, and two squares each."""
    kept, large = update_bytes(CONFIG, OptimizerSection(name="muon"))
    size = fastest_dtype().itemsize
    hidden = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128)
    assert kept == 4 * hidden + 12 * 352 * 128 * (4 + 2 * size) + 2 * size * 12 * 128**2
    assert large == 0
    assert update_bytes(CONFIG, OptimizerSection()) == (0, 0)


def test_several_micro_batches_have_two_sets_of_gradients():
    one, several = (memory(CONFIG, 64, accumulated=how) for how in (False, True))
    assert several.gradients == 2 * one.gradients
    half = memory(CONFIG, 64, dtype="bfloat16", accumulated=True)
    assert half.gradients == predict_state(CONFIG, "bfloat16", OptimizerSection()).gradients + half.weights
