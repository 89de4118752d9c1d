"""Times against what can be worked out by hand."""

from dataclasses import replace

import pytest

from rorqual.plan.chips import find_chip
from rorqual.plan.cost import flops_per_token
from rorqual.plan.known_models import find_model
from rorqual.plan.layout import Job, Layout, stages
from rorqual.plan.step_time import forward_work, step_time

CHIP = find_chip("h100")
DENSE = Job(find_model("llama-3.1-8b"), 4096, 64)
V2_LITE = Job(find_model("deepseek-v2-lite"), 4096, 64)


def test_products_and_attention_are_the_flops_over_the_peak():
    found = step_time(DENSE, Layout(data=1), CHIP, 0.5)
    flops = flops_per_token(DENSE.config, 4096) * 64 * 4096
    assert found.products + found.attention == pytest.approx(flops / (0.5 * 989.4e12))
    assert (found.bubble, found.travel, found.sums, found.tensor) == pytest.approx((0, 0, 0, 0), abs=1e-9)


def test_recomputation_costs_a_forward_pass():
    plain, again = (step_time(DENSE, Layout(recompute=how), CHIP, 0.5) for how in ("none", "full"))
    assert again.products == pytest.approx(plain.products * 4 / 3)


def test_fp8_halves_products_but_for_the_head():
    plain, fp8 = (step_time(DENSE, Layout(precision=how), CHIP, 0.5) for how in ("bfloat16", "fp8"))
    head = 6 * 128256 * 4096 * 64 * 4096 / (0.5 * 989.4e12)
    assert fp8.products - head == pytest.approx((plain.products - head) * 989.4 / 1978.9)
    assert fp8.attention == plain.attention


def test_without_units_for_fp8_it_is_bf16s_time():
    chip = find_chip("a100")
    assert step_time(DENSE, Layout(precision="fp8"), chip, 0.5) == step_time(DENSE, Layout(), chip, 0.5)


def test_overlap_hides_travel():
    """A pipeline of DualPipeV hides what 1F1B waits for; two micro-batches that take turns hide it too."""
    wide = replace(V2_LITE, batch=512)
    base = Layout(pipeline=2, data=8, experts=8, schedule="1f1b")
    waits, hides = (step_time(wide, replace(base, schedule=name), CHIP, 0.5) for name in ("1f1b", "dualpipev"))
    assert waits.travel > 0
    assert hides.travel == pytest.approx(0, abs=1e-9)
    assert step_time(wide, Layout(data=8, experts=8), CHIP, 0.5).travel == pytest.approx(0, abs=1e-9)


def test_slow_links_cannot_be_hidden():
    slow = CHIP.model_copy(update={"within": 1e8, "between": 1e8})
    found = step_time(V2_LITE, Layout(data=8, experts=8), slow, 0.5)
    assert found.travel > found.products


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipev"])
def test_steps_in_the_middle_are_alike(schedule, monkeypatch):
    """The pipeline is simulated with few micro-batches; with all of them it takes as long."""
    job, layout = replace(V2_LITE, batch=64), Layout(pipeline=4, data=1, schedule=schedule)
    few = step_time(job, layout, CHIP, 0.5).total
    monkeypatch.setattr("rorqual.plan.step_time.FEW", 100)
    assert step_time(job, layout, CHIP, 0.5).total == pytest.approx(few, rel=0.01)


def test_the_bubble_of_1f1b_is_the_formula():
    """(PP − 1)(F + B), for stages that are alike."""
    config = replace(find_model("llama-3.1-8b"), vocab_size=2, tie_word_embeddings=True)
    job, layout = Job(config, 4096, 64), Layout(pipeline=4, data=1, schedule="1f1b")
    assert {len(part) for part in stages(config, "1f1b", 4)[0]} == {8}
    work = forward_work(job, layout, CHIP, 0.5, 0.0)[0]
    assert step_time(job, layout, CHIP, 0.5).bubble == pytest.approx(3 * 3 * work.computed, rel=0.01)


def test_interleaving_and_tensor_parallelism():
    job, layout = replace(DENSE, batch=64), Layout(pipeline=4, data=1, schedule="1f1b")
    plain = step_time(job, layout, CHIP, 0.5)
    assert step_time(job, replace(layout, interleave=4), CHIP, 0.5).bubble == pytest.approx(plain.bubble / 4)
    split = step_time(job, replace(layout, tensor=4), CHIP, 0.5)
    assert split.products == pytest.approx(plain.products / 4)
    # By hand: twice a layer a gather and a scatter, three fourths of 4096 tokens of 4096 values in BF16 each.
    layers = max(len(part) for part in stages(job.config, "1f1b", 4)[0])
    once = 4 * 3 / 4 * 4096 * 4096 * 2 / (0.9 * 450e9)
    assert split.tensor == pytest.approx(64 * layers * 3 * once, rel=0.1)


def test_without_overlap_nothing_is_hidden():
    layout = Layout(data=8, experts=8)
    hides, waits = (step_time(V2_LITE, replace(layout, overlap=how), CHIP, 0.5) for how in (True, False))
    assert hides.travel == pytest.approx(0, abs=1e-9)
    assert waits.travel > 0
    assert waits.sums == pytest.approx(2 * hides.sums)


def test_stages_of_as_many_layers():
    """Of Llama 3.1 70B cut to 12: a balanced last stage has fewer, since the head is in it."""
    config = find_model("llama-3.1-70b").replace(num_hidden_layers=12)
    assert [len(part) for part in stages(config, "1f1b", 2, balanced=False)[0]] == [6, 6]
    assert [len(part) for part in stages(config, "1f1b", 2)[0]] == [7, 5]


def test_ranks_that_share_a_sequence():
    """Tokens are shared, attention too; by hand, what three of four ranks send of 2 · 8 · 128 values in BF16, in a
    forward and a backward pass of 32 layers."""
    job = Job(DENSE.config, 131072, 8)
    alone, shared = (step_time(job, Layout(data=1, context=n), CHIP, 0.5) for n in (1, 4))
    assert shared.products == pytest.approx(alone.products / 4)
    assert shared.attention == pytest.approx(alone.attention / 4)
    once = 3 / 4 * 131072 * 2 * 8 * 128 * 2 / (0.9 * 450e9)
    assert shared.tensor == pytest.approx(8 * 32 * 2 * once)


def test_each_rank_computes_keys_of_latents_that_it_sees():
    """By hand: of a quarter of a sequence, in two pieces, it sees 4.5 quarters together."""
    config = replace(V2_LITE.config, n_routed_experts=None, first_k_dense_replace=99)
    job = Job(config, 32768, 8)
    alone, shared = (step_time(job, Layout(data=1, context=n), CHIP, 0.5) for n in (1, 4))
    keys = 2 * 512 * 16 * (128 + 128) * 32768 * 8 * 27 * 3 / (0.5 * 989.4e12)
    assert shared.products == pytest.approx(alone.products / 4 + 3.5 * keys / 4, rel=1e-3)
