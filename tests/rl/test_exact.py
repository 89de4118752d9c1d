"""In the exact mode the engine's log-probabilities are the trainer's, bit for bit, over real updates."""

import copy

import pytest
import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.model.router_hooks import choices_of
from rorqual.precision.exact import make_exact
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.rollout_logprobs import target_logprobs, target_states
from rorqual.rl.rollout_packing import pack_rollout
from rorqual.train.checkpoints import Checkpoints


class Sums(Environment):
    def candidate(self, seed, index):
        a, b = index * 7 % 50, (index + seed) % 40
        return Problem(f"{a}+{b}=", str(a + b), f"{a} {b}", "", self.family)

    def check(self, problem, answer):
        return float(answer == problem.answer)


def share_of_sevens(sample, correct):
    return sample.text.count("7") / sample.length


def recipe(exact=True, optimizer=None, **fields):
    grpo = {"group_size": 4, "questions_per_step": 4, "max_tokens": 12, "micro_tokens": 128, "kl": 0.0}
    raw = {
        "name": "toy",
        "exact": exact,
        "model": {"path": "unused", "dtype": "float32"},
        "environments": [{"name": "sums"}],
        "template": "plain",
        "steps": 100,
        "seed": 3,
        "reward": {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
        "optimizer": {"lr": 0.01, "weight_decay": 0.0} | (optimizer or {}),
        "balance": {"bias_speed": 0.01, "sequence_loss": 0.01},
    }
    for name, value in fields.items():
        (raw if name in RLRecipe.model_fields else grpo)[name] = value
    return parse_recipe(raw | {"grpo": grpo}, RLRecipe)


def trainer(model, tokenizer, **fields):
    return GRPOTrainer(model, tokenizer, [Sums("sums", 1.0)], recipe(**fields), verdict=share_of_sevens)


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


MANY = {"mini_batches": 2, "kl": 0.05, "micro_tokens": 64, "temperature": 0.7, "rollout_max_num_seqs": 9}


@pytest.mark.parametrize("network", ["dense", "moe"])
@pytest.mark.parametrize(
    "fields",
    [{"top_p": 0.9, "top_k": 40}, MANY, {"optimizer": {"name": "muon"}, "recompute": "v3"}, {"recompute": "full"}],
)
def test_no_bit_differs_over_updates(network, fields, tokenizer, request):
    toy = trainer(request.getfixturevalue(network), tokenizer, **fields)
    start = weights(toy.model)
    for _ in range(3):
        update = toy.step().update
        assert (update.mismatch_share, update.mismatch_max) == (0.0, 0.0)
    assert not equal(start, weights(toy.model))


@pytest.mark.parametrize("network", ["dense", "moe"])
def test_without_it_bits_differ_a_little(network, tokenizer, request):
    update = trainer(request.getfixturevalue(network), tokenizer, exact=False).step().update
    assert 0.0 < (update.mismatch_share or 0.0) <= 1.0
    assert 0.0 < (update.mismatch_max or 0.0) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("network", ["dense", "moe"])
def test_a_hundred_steps_without_a_differing_bit(network, tokenizer, request):
    toy = trainer(request.getfixturevalue(network), tokenizer, optimizer={"lr": 0.003})
    updates = [toy.step().update for _ in range(100)]
    compared = [update for update in updates if update.mismatch_share is not None]  # some group had a gradient
    assert len(compared) > 80
    assert all((update.mismatch_share, update.mismatch_max) == (0.0, 0.0) for update in compared)


@pytest.mark.parametrize("network", ["dense", "moe"])
def test_a_resumed_run_ends_as_the_undisturbed_one(network, tokenizer, tmp_path, request):
    start = request.getfixturevalue(network)
    whole = trainer(copy.deepcopy(start), tokenizer, **MANY)
    expected = [whole.step(0.1) for _ in range(3)]
    first = trainer(copy.deepcopy(start), tokenizer, **MANY)
    for _ in range(2):
        first.step(0.1)
    Checkpoints(tmp_path, keep=1).save(2, first.tensors(), first.state())
    _, tensors, state = Checkpoints(tmp_path, keep=1).load_latest()
    torch.manual_seed(99)
    resumed = trainer(copy.deepcopy(start), tokenizer, **MANY)
    resumed.load(tensors, state)
    for metrics in expected[2:]:
        again = resumed.step(0.1)
        assert (again.update.entropy, again.update.grad_norm) == (metrics.update.entropy, metrics.update.grad_norm)
    assert equal(weights(whole.model), weights(resumed.model))


# Of the engine: sequences at a time, tokens a step, blocks of 16 tokens in the KV cache, prefix cache, drafts.
ENGINES = {
    "alone": {"max_num_seqs": 1},
    "many at a time": {},
    "chunks": {"max_prefill_tokens": 7},
    "preempted": {"blocks": 14},
    "prefix hits": {"prefix_cache": True, "max_num_seqs": 3},
    "drafts": {"speculative": "ngram"},
}


@pytest.mark.parametrize("network", ["dense", "moe"])
def test_the_engine_samples_the_same_bits_however_it_batches(network, tokenizer, request):
    """Against the trainer's packed forward pass; and the experts chosen while sampling are those that are trained."""
    model = request.getfixturevalue(network).eval()
    make_exact(model)
    prompts = [[5, 6, 7] * 9, [5, 6, 7] * 9 + [8, 9], [3], list(range(4, 44))]
    params = SamplingParams(n=3, temperature=0.8, max_tokens=20, seed=1)
    found = {}
    for name, settings in ENGINES.items():
        settings = dict(settings)
        engine = Engine(model, tokenizer, record_routing=network == "moe", **settings_of(model, settings))
        found[name] = engine.generate(prompts, params)
        if name == "prefix hits":
            found["hit"] = engine.generate(prompts, params)
            assert engine.status().counters.cached_tokens > 0
        if name == "preempted":
            assert engine.status().counters.preemptions > 0
    completions = found["alone"]
    for other in found.values():
        assert [c.tokens for c in other] == [c.tokens for c in completions]
        assert [c.logprobs for c in other] == [c.logprobs for c in completions]
    packed = pack_rollout(prompts, [c.tokens for c in completions], [i // 3 for i in range(12)], 100, lambda t: t)
    assert len(packed) > 1
    flat = torch.tensor([p for c in completions for p in c.logprobs])
    for part in packed:
        with torch.no_grad(), choices_of(model) as chosen:
            logprobs, _ = target_logprobs(model, target_states(model, part), part, 0.8)
        assert torch.equal(logprobs, flat[part.offset])
        if network == "moe":
            recorded = torch.cat([c.routing[len(prompts[i // 3]) :] for i, c in enumerate(completions)])
            own = part.origin >= sum(map(len, prompts))  # tokens of completions
            before = torch.tensor([0] + [len(c.tokens) - 1 for c in completions]).cumsum(0)
            starts = torch.tensor([0] + [len(c.tokens) for c in completions]).cumsum(0)
            index = part.origin[own] - sum(map(len, prompts))
            which = torch.searchsorted(starts, index, right=True) - 1
            expected = recorded[before[which] + index - starts[which]].long()
            assert torch.equal(torch.stack(chosen, 1)[own], expected)


def settings_of(model, settings):
    blocks = settings.pop("blocks", None)
    return settings if blocks is None else settings | {"kv_cache_bytes": blocks * Engine(model).block_bytes}


@pytest.mark.parametrize("network", ["dense", "moe"])
def test_hidden_states_and_gradients_are_the_ordinary_models(network, request):
    model = request.getfixturevalue(network)
    other = copy.deepcopy(model)
    make_exact(other)
    assert isinstance(other, type(model))
    assert other.state_dict().keys() == model.state_dict().keys()
    tokens = torch.arange(3, 51).view(2, 24)
    gradients = []
    for network in (model, other):
        logits = network.logits(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"path": "x"}}, "exact = true with model.dtype = 'auto': it computes in FP32, so set model.dtype"),
        ({"model": {"path": "x", "dtype": "bfloat16"}}, "model.dtype = 'bfloat16'"),
        ({"device": "cuda"}, "exact = true with device = 'cuda': it computes on a CPU"),
        ({"lora": {}}, "exact = true with lora: low-rank updates are not computed exactly"),
        ({"precision": "fp8"}, "exact = true with precision = 'fp8': it rounds nothing"),
        ({"rollout_weights": "fp8"}, "exact = true with grpo.rollout_weights = 'fp8': it samples what is trained"),
    ],
)
def test_what_cannot_be_exact_is_refused(fields, message):
    with pytest.raises(UserError, match="recipe: exact = true") as error:
        recipe(**fields)
    assert message in str(error.value)


def test_a_model_in_other_numbers_is_refused(dense):
    with pytest.raises(UserError, match=r"embed_tokens\.weight is bfloat16; set model\.dtype = .float32."):
        make_exact(dense.to(torch.bfloat16))
