"""Against trying every layout."""

import random
from dataclasses import replace

import pytest

from rorqual.model import ModelConfig
from rorqual.plan.chips import find_chip
from rorqual.plan.known_models import find_model
from rorqual.plan.layout import Job, check, memory_by_rank
from rorqual.plan.search import USABLE, layouts, search
from rorqual.plan.step_time import least_seconds, step_time

H800 = find_chip("h800")


def random_job(generator):
    pick = generator.choice
    heads = pick([4, 8, 16, 32])
    sizes = {
        "vocab_size": pick([1000, 32000, 128000]), "hidden_size": pick([512, 1024, 4096]),
        "intermediate_size": pick([1024, 8192]), "num_hidden_layers": pick([4, 12, 30]), "num_attention_heads": heads,
    }  # fmt: skip
    if generator.random() < 0.5:
        config = ModelConfig(model_type="llama", num_key_value_heads=heads // 2, **sizes)
    else:
        config = ModelConfig(
            model_type="deepseek_v3", kv_lora_rank=256, q_lora_rank=pick([None, 256]), qk_nope_head_dim=64,
            qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=pick([8, 64]), num_experts_per_tok=pick([2, 4]),
            moe_intermediate_size=pick([256, 1024]), n_shared_experts=1, first_k_dense_replace=1,
            num_nextn_predict_layers=pick([0, 1]), **sizes,
        )  # fmt: skip
    return Job(config, pick([512, 4096, 16384]), pick([8, 32, 256]), moments=pick(["float32", "bfloat16", "8bit"]))


@pytest.mark.parametrize("seed", range(12))
def test_search_equals_trying_all(seed):
    generator = random.Random(seed)
    job, chips = random_job(generator), generator.choice([1, 4, 8, 16])
    chip = H800.model_copy(update={"memory": generator.choice([2e9, 20e9, 80e9])})
    every = []
    for layout in layouts(job, chips, chip.per_node, ("bfloat16",)):
        if check(layout, job) is None:
            memory = max(m.total for m in memory_by_rank(job, layout))
            if memory <= USABLE * chip.memory:
                every.append(step_time(job, layout, chip, 0.5).total)
    found = search(job, chip, chips, 0.5, count=3)
    assert [f.time.total for f in found.best] == pytest.approx(sorted(every)[:3])
    assert found.fitting == len(every)
    assert (found.nearest is None) == bool(every)


@pytest.mark.parametrize("seed", range(200))
def test_what_is_called_feasible_fits(seed):
    """On 200 random models and clusters, by its own count."""
    generator = random.Random(1000 + seed)
    job, chips = random_job(generator), generator.choice([1, 2, 8, 32])
    chip = H800.model_copy(update={"memory": generator.choice([1e9, 8e9, 24e9, 80e9])})
    for found in search(job, chip, chips, 0.4, count=2).best:
        assert check(found.layout, job) is None
        assert found.layout.chips == chips
        assert max(m.total for m in memory_by_rank(job, found.layout)) == found.memory.total <= USABLE * chip.memory


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_one(seed):
    generator = random.Random(seed)
    job = random_job(generator)
    for layout in layouts(job, 16, 8, ("bfloat16", "fp8")):
        if check(layout, job) is None and generator.random() < 0.1:
            assert least_seconds(job, layout, H800, 0.4) <= 1.0001 * step_time(job, layout, H800, 0.4).total


def test_v3_is_trained_as_deepseek_did():
    """16 pipeline ranks, V3's recomputation, experts over several nodes, DualPipeV."""
    job = Job(find_model("deepseek-v3"), 4096, 15360, moments="bfloat16")
    best = search(job, H800, 2048, 0.5, precisions=("fp8",), count=1).best[0].layout
    assert (best.pipeline, best.schedule, best.recompute, best.micro_batch) == (16, "dualpipev", "v3", 1)
    assert best.experts in (32, 64)


def test_more_memory_is_never_slower():
    job = Job(replace(find_model("deepseek-v2-lite")), 4096, 64)
    times = []
    for memory in (40e9, 80e9, 160e9):
        best = search(job, H800.model_copy(update={"memory": memory}), 8, 0.5, count=1).best
        times.append(best[0].time.total if best else float("inf"))
    assert times == sorted(times, reverse=True)
