"""The plan of a layout against V3's published numbers, and against what processes have."""

from collections import Counter
from pathlib import Path

import pytest

from helpers.processes import run
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.parallel.mesh import build_mesh
from rorqual.plan.cost import flops_per_token, mtp_flops_per_token
from rorqual.plan.layout import Job, memory_by_rank, of_section
from rorqual.plan.process_memory import memory
from rorqual.recipe import PretrainRecipe, load_recipe
from rorqual.train.dry_run import dry_run_text, recipe_config
from rorqual.train.layout_plan import layout_text, plan_layout
from rorqual.train.traffic_report import computed
from rorqual.train.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def v3():
    """V3's recipe, its config and its plan."""
    recipe = load_recipe(RECIPES / "v3-671b.toml", PretrainRecipe)
    config = recipe_config(recipe)
    return recipe, config, plan_layout(recipe, config)


def test_v3s_parameters_are_all_there(v3):
    """671.0 B and the multi-token module's 11.6 B; of 59 layers' experts a rank has a 64th."""
    plan = v3[2]
    held = sum(rank.parameters for rank in plan.ranks)
    elsewhere = 59 * 256 * 3 * 7168 * 2048 * 63 // 64
    assert (held + elsewhere) / 1e9 == pytest.approx(671.0 + 11.6, abs=0.1)
    layers = [layer for rank in plan.ranks for part in rank.layers for layer in part]
    assert sorted(layers) == list(range(61))


def test_v3_fits_its_gpus(v3):
    """2048 of 80 GB (V3 §3.1), 15360 sequences of 4096 tokens a step."""
    plan = v3[2]
    assert (plan.processes, plan.micro_batches, plan.tokens) == (2048, 120, 15360 * 4096)
    assert len(plan.ranks) == 16
    for rank in plan.ranks:
        assert rank.in_flight == 32 + 1  # DualPipe's README: PP + 1
        assert rank.memory.total < 80e9
        assert rank.memory.gradients == 4 * rank.parameters
        assert rank.memory.weights == pytest.approx(2 * rank.parameters, rel=0.01)  # router and norms are FP32
    # Of a layer in the middle: a rank has 4 with 4 experts each, and ZeRO-1 leaves a half of them to it, since there
    # are two of each, and a 128th of the rest; AdamW's moments are in BF16.
    experts, rest = 4 * 4 * 3 * 7168 * 2048, 4 * (187.1e6 + 3 * 7168 * 2048)
    middle = plan.ranks[8]
    assert middle.parameters == pytest.approx(experts + rest, rel=0.01)
    assert middle.memory.masters == pytest.approx(4 * (experts / 2 + rest / 128), rel=0.01)
    assert middle.memory.moments == pytest.approx(2 * 2 * (experts / 2 + rest / 128), rel=0.01)


def test_v3s_traffic(v3):
    """Hidden states by hand; to experts within V3 §3.2.2's bound of 4 nodes, an eighth of which are the token's own."""
    plan = v3[2]
    tokens = 120 * 4096
    hidden = 2 * 7168 * tokens
    sent = {what: numbers for (what, link), numbers in plan.sent.items() if link == "between nodes"}
    # Down the V and back up, 15 ranks each way, 128 times; the ends have one way, and are on one rank.
    assert sent["hidden states"] == sent["gradients of hidden states"] == (hidden, 2 * hidden, 2 * 15 * 128 * hidden)
    assert not any("embeddings" in what for what in sent)
    there = tokens * (7168 + 56 + 8 * 6 + 7168 + 56)  # a row in FP8 with its scales and weights, and a gradient
    nodes = plan.ranks[8].sent["dispatch", "between nodes"] / there / 4  # its 4 layers
    assert 3 * 7 / 8 < nodes <= 4 * 7 / 8


def test_v3s_time_without_work(v3):
    """The costliest rank, with 5 layers, is the only one that hardly waits."""
    recipe, config, plan = v3
    each = flops_per_token(config, 4096) + mtp_flops_per_token(config, 4096)
    assert 128 * sum(rank.flops for rank in plan.ranks) == pytest.approx(each * plan.tokens)
    busiest = max(plan.ranks, key=lambda rank: rank.flops)
    assert busiest.idle == min(rank.idle for rank in plan.ranks) < 0.06
    for rank in plan.ranks:  # all take the same time
        assert rank.flops / (1 - rank.idle) == pytest.approx(busiest.flops / (1 - busiest.idle))
    assert recipe.train.steps * plan.tokens == pytest.approx(14.8e12, rel=1e-4)


BOX = ["train.threads=1"]


def on_ranks(rank, tokens):
    """What a run's trainer computes and keeps."""
    recipe = load_recipe(RECIPES / "cluster-in-a-box.toml", PretrainRecipe, BOX)
    mesh = build_mesh(recipe.parallel)
    trainer = Trainer(
        Transformer(recipe_config(recipe)), recipe.optimizer, recipe.schedule, recipe.mtp, recipe.balance,
        dtype="float32", mesh=mesh, micro_batches=4,
    )  # fmt: skip
    (sent,) = computed(trainer, tokens, [mesh])
    state, weights = trainer.optimizer.state_bytes(), sum(p.nbytes for p in trainer.model.parameters())
    return dict(sent), (weights, state.masters, state.gradients, state.moments)


def test_processes_have_what_was_planned():
    recipe = load_recipe(RECIPES / "cluster-in-a-box.toml", PretrainRecipe, [*BOX, "model.dtype=float32"])
    plan = plan_layout(recipe, recipe_config(recipe))
    found = run(4, on_ranks, 8 * 128)
    together = sum((Counter(sent) for sent, _ in found), Counter())
    assert {key: total for key, (_, _, total) in plan.sent.items()} == dict(together)
    for rank in plan.ranks:
        m = rank.memory
        assert (m.weights, m.masters, m.gradients, m.moments) == found[rank.rank][1]
        assert rank.sent == Counter(found[rank.rank][0])


def test_data_alone_is_one_process_with_fewer_rows(make_recipe):
    recipe = make_recipe(parallel={"data": 2}, train__micro_batch=1, optimizer={"name": "adamw"}, train__ema=0.9)
    recipe.model.dtype = "float32"
    config = recipe_config(recipe)
    plan = plan_layout(recipe, config)
    alone = memory(config, recipe.data.sequence_length, optimizer=recipe.optimizer, ema=True)
    (rank,) = plan.ranks
    assert rank.idle == 0
    for name in ("weights", "gradients", "activations"):
        assert getattr(rank.memory, name) == getattr(alone, name)
    for name in ("moments", "ema"):  # but for tensors of few rows
        assert getattr(rank.memory, name) == pytest.approx(getattr(alone, name) / 2, rel=0.1)


def test_micro_batches_that_are_not_alike_are_counted(make_recipe):
    recipe = make_recipe(parallel={"data": 2}, train__batch_size=12, train__micro_batch=4)  # 4 + 2 sequences a rank
    assert plan_layout(recipe, recipe_config(recipe)).micro_batches == 2


def test_micro_batches_that_take_turns_are_both_in_memory(make_recipe):
    ranks = []
    for overlap in (True, False):
        layout = {"data": 2, "experts": 2, "overlap": overlap}
        recipe = make_recipe(parallel=layout, train__micro_batch=1)
        ranks += plan_layout(recipe, recipe_config(recipe)).ranks
    both, one = ranks
    assert (both.in_flight, one.in_flight) == (2, 1)
    assert both.memory.activations == 2 * one.memory.activations


@pytest.mark.parametrize(
    ("layout", "train", "said"),
    [
        ({"data": 4, "experts": 3}, {}, "parallel.experts = 3: .* make it one of 1, 2, 4"),
        ({"data": 8, "experts": 8}, {"batch_size": 8}, "the model has 4 routed experts"),
        ({"pipeline": 2}, {"batch_ramp": (2, 0.5)}, "train.batch_ramp with parallel.pipeline"),
        ({"pipeline": 2}, {}, "schedule dualpipev on 2 ranks needs at least 3"),
        ({"pipeline": 2}, {"micro_batch": 1}, "needs 4 stages of at least one layer, and the model has 2"),
        ({"pipeline": 4, "schedule": "1f1b"}, {}, "needs 4 stages of at least one layer"),
    ],
)
def test_layouts_that_a_run_refuses(make_recipe, layout, train, said):
    recipe = make_recipe(parallel=layout, **{f"train__{name}": value for name, value in train.items()})
    with pytest.raises(UserError, match=said):
        dry_run_text(recipe)


def test_the_text_says_what_is_estimated(make_recipe):
    layout = {"pipeline": 2, "schedule": "1f1b", "data": 2, "experts": 2}
    recipe = make_recipe(parallel=layout, train__micro_batch=1)
    text = layout_text(plan_layout(recipe, recipe_config(recipe)))
    assert "4 processes" in text
    assert "Activations are estimated" in text
    assert "Rank 0 also has the embedding, rank 2 norm, head and multi-token modules" in text
    assert "gradients, within a node" in text
    assert not recipe.run_dir.exists()


def test_the_planner_counts_the_same(v3):
    """plan/layout.py, which needs no ranks, against ranks of V3 and of small layouts."""
    recipe, config, counted = v3
    layouts = [(recipe, config, counted)]
    for overrides in (
        ["parallel.pipeline=2", "parallel.data=2", "parallel.experts=2", "train.micro_batch=1"],
        ["parallel.pipeline=2", "parallel.data=1", "parallel.experts=1", "parallel.schedule=1f1b"],
        ["parallel.pipeline=1", "parallel.data=4", "parallel.experts=2", "train.micro_batch=2"],
        ["parallel.pipeline=1", "parallel.data=4", "parallel.experts=1", "parallel.sharding=full", "recompute=full"],
    ):
        small = load_recipe(RECIPES / "cluster-in-a-box.toml", PretrainRecipe, [*overrides, "model.dtype=bfloat16"])
        layouts.append((small, recipe_config(small), plan_layout(small, recipe_config(small))))
    for recipe, config, counted in layouts:
        precision = "fp8" if recipe.precision else "bfloat16"
        layout = of_section(recipe.parallel, counted.micro_batch, 8, precision, recipe.recompute)
        job = Job(config, counted.length, recipe.train.batch_size, moments=recipe.optimizer.moments,
                  ema=recipe.train.ema is not None)  # fmt: skip
        for ours, rank in zip(memory_by_rank(job, layout), counted.ranks, strict=True):
            for use, size in vars(rank.memory).items():
                assert getattr(ours, use) == pytest.approx(size, rel=0.03, abs=0.003 * rank.memory.total), use
