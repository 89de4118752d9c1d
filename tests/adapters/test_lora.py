import math

import pytest
import torch

from helpers.training import CONFIG, rows_of
from rorqual.adapters.lora import AdapterReference, add_lora, lora_parameters, merge_lora, updates
from rorqual.adapters.low_rank import LowRank
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.plan.optimizer_state import predict_state
from rorqual.plan.process_memory import memory
from rorqual.recipe import (
    BalanceSection,
    LoRASection,
    MTPSection,
    OptimizerSection,
    RLRecipe,
    ScheduleSection,
    SFTRecipe,
    parse_recipe,
)
from rorqual.train.trainer import Trainer

RANK4 = LoRASection(rank=4, alpha=8.0)
TOKENS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def trainer_of(model, dtype="float32", recompute="none", **optimizer):
    section = OptimizerSection(lr=1e-2, **optimizer)
    schedule = ScheduleSection(name="constant", warmup=0)
    return Trainer(model, section, schedule, MTPSection(), BalanceSection(), dtype=dtype, recompute=recompute)


def disturbed(model, seed=3):
    """A model with LoRA whose updates are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in lora_parameters(model).items():
        if name.endswith("lora_B"):
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model


def test_an_update_by_hand():
    # A = (1 2), B = (3 4)ᵀ, α/r = 2/1: s·B·A = ((6 12), (8 16)), and for x = (1 1): A·x = 3, s·B·3 = (18 24).
    update = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 2.0)
    assert update(torch.tensor([1.0, 1.0])).tolist() == [18.0, 24.0]
    assert update.added_to(torch.ones(2, 2)).tolist() == [[7.0, 13.0], [9.0, 17.0]]


def test_training_starts_at_the_base_bit_for_bit(latent):
    before = latent.logits(TOKENS)
    add_lora(latent, RANK4, seed=0)
    assert torch.equal(latent.logits(TOKENS), before)
    A = latent.model.layers[0].self_attn.o_proj.lora_A
    assert A.abs().max() <= 1 / math.sqrt(A.shape[1])  # uniform, and not 0
    assert A.std() > 0.4 / math.sqrt(A.shape[1])


def test_merged_equals_unmerged(latent):
    disturbed(latent_with(latent, RANK4))
    with torch.no_grad():
        before = latent.logits(TOKENS)
        merge_lora(latent)
        assert not lora_parameters(latent)
        assert all(p.requires_grad for p in latent.parameters())
        after = latent.logits(TOKENS)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    assert (after - Transformer(CONFIG).logits(TOKENS)).abs().max() > 0.01  # the updates do count


def latent_with(model, section):
    add_lora(model, section, seed=0)
    return model


def test_all_linears_but_the_head_and_chosen_ones(latent):
    add_lora(latent, RANK4, seed=0)
    names = {path.rpartition(".")[2] for path in updates(latent)}
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert names == attention | {"gate_proj", "up_proj", "down_proj", "eh_proj"}
    other = Transformer(CONFIG)
    add_lora(other, LoRASection(targets=["kv_b_proj"]), seed=0)
    assert list(updates(other)) == [f"model.layers.{i}.self_attn.kv_b_proj" for i in range(5)]


@pytest.mark.parametrize(("target", "sentence"), [("experts", "routed experts are stacked"), ("qq", "no such linear")])
def test_unknown_targets_are_refused(latent, target, sentence):
    with pytest.raises(UserError, match=rf"lora.targets: '{target}': .*{sentence}.*kv_b_proj"):
        add_lora(latent, LoRASection(targets=[target]), seed=0)
    assert all(p.requires_grad for p in latent.parameters())  # nothing was changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_updates_are_trained_and_have_state(latent, dtype):
    add_lora(latent, RANK4, seed=0)
    trained = lora_parameters(latent)
    count = sum(p.numel() for p in trained.values())
    base = {name: p.detach().clone() for name, p in latent.named_parameters() if name not in trained}
    trainer = trainer_of(latent, dtype)
    state = trainer.optimizer.state_bytes()
    # FP32 gradients and two moments of what is trained, and masters where that is BF16.
    assert (state.gradients, state.moments) == (4 * count, 8 * count)
    assert state.masters == (0 if dtype == "float32" else 4 * count)
    assert predict_state(CONFIG, dtype, trainer.optimizer.section, RANK4) == state
    whole = memory(CONFIG, 48, dtype=dtype)
    planned = memory(CONFIG, 48, dtype=dtype, lora=RANK4)
    size = 4 if dtype == "float32" else 2
    assert planned.weights - whole.weights == size * count
    assert planned.masters + planned.gradients + planned.moments < 0.5 * (
        whole.masters + whole.gradients + whole.moments
    )
    kinds = {name.split(".")[0] for name in trainer.tensors()}
    assert kinds == {"weights", "buffers", "adamw", "rng"}
    assert {n.removeprefix("weights.") for n in trainer.tensors() if n.startswith("weights.")} == set(trained)
    losses = [trainer.step([rows_of(0, 4)], 0.5).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05
    for name, p in latent.named_parameters():
        if name in base:
            assert torch.equal(p, base[name].to(p.dtype)), name
        elif name.endswith("lora_B"):
            assert p.abs().sum() > 0, name
    linears = [p for n, p in latent.named_parameters() if n.endswith("_proj.weight")]
    assert {p.dtype for p in linears} == {trainer.dtype}  # the frozen base too


@pytest.mark.parametrize("recompute", ["v3", "full"])
def test_recomputed_activations_give_the_same_bits(latent, recompute):
    plain = Transformer(CONFIG)
    plain.load_state_dict(latent.state_dict())
    for model, how in ((latent, recompute), (plain, "none")):
        disturbed(latent_with(model, RANK4))
        trainer_of(model, recompute=how).step([rows_of(0, 4)], 0.5)
    for (name, a), b in zip(latent.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_resumed_trainer_ends_with_the_same_bits(latent):
    base = Transformer(CONFIG)
    base.load_state_dict(latent.state_dict())
    whole = trainer_of(latent_with(latent, RANK4))
    for i in range(2):
        whole.step([rows_of(i, 4)], 0.5)
    saved, state = {name: t.clone() for name, t in whole.tensors().items()}, whole.state()
    whole.step([rows_of(2, 4)], 0.5)
    resumed = trainer_of(latent_with(base, RANK4))
    resumed.load(saved, state)
    resumed.step([rows_of(2, 4)], 0.5)
    for (name, a), b in zip(latent.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b), name


@torch.no_grad()
def test_the_reference_is_the_base_until_it_is_refreshed(latent):
    start = latent(TOKENS)
    add_lora(latent, RANK4, seed=0)
    reference = AdapterReference(latent)
    disturbed(latent)
    assert torch.equal(reference(TOKENS), start)
    assert not torch.allclose(latent(TOKENS), start, atol=1e-3)  # called in between, the policy is as it was
    reference.load_state_dict(latent.state_dict())
    assert torch.equal(reference(TOKENS), latent(TOKENS))


SFT = {"name": "x", "model": {"path": "m"}, "data": {"path": "d.jsonl"}, "train": {"steps": 1}, "lora": {}}
RL = {"name": "x", "model": {"path": "m"}, "environments": [{"name": "e"}], "steps": 1, "lora": {}}


def test_the_learning_rate_is_ten_times_the_default_unless_it_is_given():
    assert parse_recipe(SFT, SFTRecipe).optimizer.lr == pytest.approx(1e-4)
    assert parse_recipe(SFT | {"lora": None}, SFTRecipe).optimizer.lr == pytest.approx(1e-5)
    assert parse_recipe(RL, RLRecipe).optimizer.lr == pytest.approx(3e-5)
    assert parse_recipe(RL | {"optimizer": {"lr": 2e-6}}, RLRecipe).optimizer.lr == 2e-6
    once = parse_recipe(SFT, SFTRecipe)
    assert parse_recipe(once.model_dump(), SFTRecipe) == once  # as a saved recipe is read


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"precision": "fp8"}, "lora with precision = 'fp8'"),
        ({"train": {"steps": 1, "compile": True}}, "lora with train.compile"),
        ({"parallel": {"data": 2}}, "lora with parallel of several processes"),
        ({"optimizer": {"name": "muon"}}, 'lora with optimizer.name = "muon"'),
        ({"lora": {"rank": 0}}, "lora.rank = 0"),
        ({"lora": {"targets": []}}, "lora.targets"),
    ],
)
def test_what_lora_does_not_go_with_is_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_recipe(SFT | fields, SFTRecipe)
