"""Rollouts of a fleet equal those of an undisturbed run, whatever happens to the workers."""

import copy

import pytest
import torch

from helpers.fake_ray import FakeRay, plain
from rorqual.checkpoint.huggingface import save_model
from rorqual.errors import UserError
from rorqual.model.router_hooks import Replay, choices_of
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl import ray_rollouts
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.ray_rollouts import RayFleet
from rorqual.rl.rl_run import check_problems, in_process, on_ray
from rorqual.rl.rollout_logprobs import pack_members, replaying
from rorqual.rl.weight_push import copy_bytes, push_bytes, sampling_model, to_bytes
from rorqual.train.checkpoints import Checkpoints


class Sums(Environment):
    def candidate(self, seed, index):
        a, b = index * 7 % 50, (index + seed) % 40
        return Problem(f"{a}+{b}=", str(a + b), f"{a} {b}", "", self.family)

    def check(self, problem, answer):
        return float(answer == problem.answer)


def checksum(sample, correct):
    """A reward that differs within every group."""
    return sum(map(ord, sample.text)) % 97 / 97


def recipe(rollouts=None, **fields):
    grpo = {"group_size": 4, "questions_per_step": 4, "max_tokens": 12, "micro_tokens": 128, "kl": 0.0}
    return parse_recipe(
        {
            "name": "toy",
            "model": {"path": "unused"},
            "environments": [{"name": "sums"}],
            "template": "plain",
            "steps": 7,
            "seed": 3,
            "reward": {"accuracy": 0.0, "format": 0.0, "verdict": 1.0},
            "optimizer": {"lr": 0.01, "weight_decay": 0.0},
            "grpo": grpo | fields.pop("grpo", {}),
            "rollouts": rollouts or {},
        }
        | fields,
        RLRecipe,
    )


def trainer(model, tokenizer, ray=None, rollouts=None, **fields):
    """With `ray`, its rollouts are a fleet's."""
    checked = recipe(rollouts if ray is None else {"threads": 1} | (rollouts or {}), **fields)
    fleet = None
    if ray is not None:
        checked = on_ray(checked)
        fleet = RayFleet(ray, checked, model.config)
    return GRPOTrainer(model, tokenizer, [Sums("sums", 1.0)], checked, checksum, fleet)


def run(toy, steps=7):
    """What each step logs, but for times."""
    out = []
    for _ in range(steps):
        out.append(logged(toy.step(0.1)))
    return out


def logged(metrics):
    return {name: value for name, value in metrics.to_dict().items() if "second" not in name and value is not None}


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


NETWORKS = [
    ("dense", {"grpo": {"top_p": 0.9}}),
    ("moe", {"grpo": {"rollout_weights": "fp8", "mini_batches": 2}}),
    ("moe", {"grpo": {"rollout_weights": "int4"}}),
]


@pytest.mark.parametrize(("network", "fields"), NETWORKS)
@pytest.mark.parametrize("workers", [1, 2])
def test_without_staleness_a_fleet_changes_nothing(network, fields, workers, tokenizer, request):
    start = request.getfixturevalue(network)
    here, ray = trainer(copy.deepcopy(start), tokenizer, **fields), FakeRay()
    apart = trainer(copy.deepcopy(start), tokenizer, ray, {"staleness": 0, "workers": workers}, **fields)
    alone, fleet = run(here, 3), run(apart, 3)
    assert [line.pop("staleness") for line in fleet] == [0, 0, 0]
    assert {line.pop("pushed_bytes") for line in fleet} == {
        push_bytes(start.config, torch.float32, fields["grpo"].get("rollout_weights"))
    }
    if workers == 1:
        assert fleet == alone
        assert equal(weights(here.model), weights(apart.model))
    else:  # products of half the rows may round otherwise
        assert [line["reward"] for line in fleet] == [line["reward"] for line in alone]
        for one, other in zip(fleet, alone, strict=True):
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert all(plain(value) for value in ray.crossed)


def test_what_is_pushed_is_what_samples(moe):
    made = sampling_model(moe.config, torch.float32, None, None)
    tokens = torch.arange(9).view(1, 9)
    assert not torch.equal(made(tokens), moe(tokens))
    copy_bytes(made, to_bytes(moe))
    assert torch.equal(made(tokens), moe(tokens))
    assert not made.mtp_modules
    with pytest.raises(ValueError, match="another model's"):
        copy_bytes(made, {})


@pytest.mark.parametrize(("network", "fields"), NETWORKS)
def test_staleness_is_bounded_logged_and_corrected(network, fields, tokenizer, request):
    toy = trainer(request.getfixturevalue(network), tokenizer, FakeRay(), {"staleness": 2}, **fields)
    used = {}
    submit = toy.rollouts.fleet.submit

    def spy(step, version, model, *rest):
        used[step] = version
        submit(step, version, model, *rest)

    toy.rollouts.fleet.submit = spy
    lines = run(toy)
    assert used == {step: max(0, step - 2) for step in range(7)}
    assert [line["staleness"] for line in lines] == [0, 1, 2, 2, 2, 2, 2]
    assert [line["pushed_bytes"] > 0 for line in lines] == [True] * 5 + [False] * 2  # the last versions sample nothing
    assert all(line["mismatch_logprob"] > 0.01 for line in lines[1:])  # after a step of this learning rate
    assert not toy.rollouts.fleet._weights


@pytest.mark.parametrize("staleness", [0, 2])
def test_workers_that_die_or_hang_change_nothing(staleness, moe, tokenizer, monkeypatch):
    monkeypatch.setattr(ray_rollouts, "HANG_SECONDS", 0.0)
    monkeypatch.setattr(ray_rollouts, "PULSE_SECONDS", 0.0)
    rollouts = {"staleness": staleness, "replay_routing": True}
    whole = trainer(copy.deepcopy(moe), tokenizer, FakeRay(), rollouts)
    expected = run(whole)
    faults = FakeRay({1: "dies", 4: "hangs", 5: "dies", 7: "dies", 8: "dies", 12: "hangs"})
    hit = trainer(copy.deepcopy(moe), tokenizer, faults, rollouts)
    notes, found = [], []
    for _ in range(7):
        metrics = hit.step(0.1)
        notes += metrics.notes
        found.append(logged(metrics))
    assert found == expected
    assert equal(weights(whole.model), weights(hit.model))
    assert faults.killed == len(notes) == faults.started - 2 >= 4
    assert any(n.endswith("is replaced: The actor died") for n in notes)
    assert any(n.endswith("is replaced: it computed nothing for 0 seconds") for n in notes)


def test_workers_that_only_fail_end_the_run(dense, tokenizer):
    toy = trainer(dense, tokenizer, FakeRay(dict.fromkeys(range(99), "dies")))
    with pytest.raises(UserError, match=r"failed 5 times in a row, the last: The actor died; .*--resume"):
        toy.step()


def test_what_a_worker_raises_ends_the_run(dense, tokenizer):
    toy = trainer(dense, tokenizer, FakeRay(), grpo={"max_tokens": 12})
    prompts = [[1] * 600]
    toy.rollouts.fleet.submit(0, 0, dense, prompts * 4, toy.rollouts._params(0))
    with pytest.raises(UserError, match="prompt 1 has 600 tokens, but the model's context holds 512"):
        toy.rollouts.fleet.collect(0)


def test_a_rollout_of_other_weights_is_refused(dense, tokenizer):
    toy = trainer(dense, tokenizer, FakeRay(), {"staleness": 0})
    collect = toy.rollouts.fleet.collect

    def older(step):
        shards = collect(step)
        shards[1].version.fill_(7)
        return shards

    toy.rollouts.fleet.collect = older
    with pytest.raises(UserError, match=r"step 1: a worker sampled from the weights of step 7, not 0"):
        toy.step()


@pytest.mark.parametrize(
    ("staleness", "steps"), [(1, (3,)), (3, (1, 6)), pytest.param(1, (1, 6), marks=pytest.mark.slow)]
)
def test_rollouts_in_flight_are_resumed(staleness, steps, moe, tokenizer, tmp_path):
    rollouts = {"staleness": staleness, "replay_routing": True}
    whole = trainer(copy.deepcopy(moe), tokenizer, FakeRay(), rollouts)
    expected = run(whole)
    for step in steps:
        first = trainer(copy.deepcopy(moe), tokenizer, FakeRay(), rollouts)
        assert run(first, step) == expected[:step]
        checkpoints = Checkpoints(tmp_path / str(step), keep=1)
        checkpoints.save(step, first.tensors(), first.state())
        assert run(first, 7 - step) == expected[step:]  # a checkpoint disturbs nothing
        _, tensors, state = checkpoints.load_latest()
        resumed = trainer(copy.deepcopy(moe), tokenizer, FakeRay(), rollouts)
        resumed.load(tensors, state)
        assert run(resumed, 7 - step) == expected[step:]
        assert equal(weights(whole.model), weights(resumed.model))
        assert resumed.state()["streams"] == whole.state()["streams"]


def test_a_run_that_is_over_waits_for_no_rollout(moe, tokenizer):
    """It has a time budget, or it would have sampled none ahead."""
    ray = FakeRay()
    toy = trainer(moe, tokenizer, ray, {"staleness": 2})
    run(toy, 2)
    assert toy.rollouts.state()["in_flight"] == [2, 3]
    toy.rollouts.close()
    assert not [name for name in toy.tensors() if name.startswith("rollouts.")]
    assert "in_flight" not in toy.state()
    assert (ray.sampled, ray.calls, ray.killed) == (4, 8, 2)  # two workers' parts of two steps, and of those ahead
    alone = trainer(moe, tokenizer)
    for step in range(2):
        alone.rollouts.draw(step)
    assert toy.state()["streams"] == alone.state()["streams"]
    toy.rollouts.close()
    assert ray.killed == 2


def test_a_replay_makes_the_trainer_choose_what_the_sampler_chose(moe, tokenizer):
    toy = trainer(moe, tokenizer, FakeRay(), {"staleness": 1, "replay_routing": True})
    toy.step()
    served = toy.rollouts.next(1).rollout
    members = [0, 1, 5, 14]
    (packed, *_) = pack_members(served, members, toy.section, moe)
    with replaying(moe, packed, counts := Replay()), choices_of(moe) as chosen, torch.no_grad():
        moe(packed.tokens, packed.positions, packed.mask)
    trained = torch.stack(chosen, 1)[packed.source]  # by target
    flat = torch.cat([served.routing[i][len(served.prompts[i // 4]) - 1 :] for i in members])
    assert torch.equal(trained, flat[packed.offset].long())
    assert counts.replayed > counts.differ > 0  # one step of this learning rate moves routers


def test_a_replay_holds_in_recomputed_passes(moe, tokenizer):
    """The routers' choices would differ between the passes otherwise, or the gradients from those kept."""
    ends = []
    for how in ("none", "v3", "full"):
        fields = {"staleness": 1, "replay_routing": True}
        toy = trainer(copy.deepcopy(moe), tokenizer, FakeRay(), fields, recompute=how, precision="fp8")
        lines = run(toy, 3)
        assert lines[-1]["routers_differ"] > 0
        ends.append(weights(toy.model))
    assert equal(ends[0], ends[1])
    assert equal(ends[0], ends[2])


def test_replay_without_ray(moe, tokenizer):
    """From the same numbers there is nothing to replay; from FP8 there is."""
    plain_, replayed = (trainer(copy.deepcopy(moe), tokenizer, rollouts={"replay_routing": on}) for on in (False, True))
    run(plain_, 2)
    assert run(replayed, 2)[-1]["routers_differ"] == 0.0
    assert equal(weights(plain_.model), weights(replayed.model))
    rounded = trainer(moe, tokenizer, rollouts={"replay_routing": True}, grpo={"rollout_weights": "fp8"})
    assert run(rounded, 2)[-1]["routers_differ"] > 0


def test_threads_are_the_clusters_cpus_shared(dense):
    checked = on_ray(recipe({"workers": 3}))
    assert RayFleet(FakeRay(cpus=(8, 8)), checked, dense.config)._threads == 4
    with pytest.raises(UserError, match=r"rollouts.workers = 3: Ray's machines have 2 CPUs, room for 2 workers"):
        RayFleet(FakeRay(cpus=(2,)), checked, dense.config)
    with pytest.raises(UserError, match=r"room for 2 workers with rollouts.threads = 5"):
        RayFleet(FakeRay(cpus=(8, 8)), on_ray(recipe({"workers": 3, "threads": 5})), dense.config)


def test_settings_that_need_ray_are_refused_without(tmp_path):
    for name in ("workers", "staleness", "threads"):
        with pytest.raises(UserError, match=rf"rollouts.{name} = 1 needs Ray; add --ray local, or leave it out"):
            in_process(recipe({name: 1}))
    assert in_process(recipe()).rollouts.workers is None
    chosen = on_ray(recipe()).rollouts
    assert (chosen.workers, chosen.staleness) == (2, 1)


def test_recipes(dense, moe, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"rollouts.workers = 5: .* grpo.questions_per_step = 4"):
        recipe({"workers": 5})
    assert recipe({"staleness": 1}, grpo={"importance_cap": 3.0}).grpo.importance_cap == 3.0
    with pytest.raises(UserError, match=r"nothing is rounded or stale"):
        recipe({"staleness": 0}, grpo={"importance_cap": 3.0})
    save_model(dense, tmp_path / "dense", tokenizer)
    replaying = recipe({"replay_routing": True}, model={"path": str(tmp_path / "dense")})
    with pytest.raises(UserError, match=r"rollouts.replay_routing = true: the model has no experts"):
        check_problems(replaying, tokenizer, [Sums("sums", 1.0)])


def test_in_the_exact_mode_a_fleet_of_any_size_samples_the_trainers_bits(moe, tokenizer):
    fields = {"exact": True, "model": {"path": "unused", "dtype": "float32"}}
    ends = []
    for workers in (1, 2):
        checked = recipe({"threads": 1, "workers": workers, "staleness": 0}, **fields)
        fleet = RayFleet(FakeRay(), checked, moe.config)
        toy = GRPOTrainer(copy.deepcopy(moe), tokenizer, [Sums("sums", 1.0)], checked, checksum, fleet)
        for _ in range(2):
            update = toy.step().update
            assert (update.mismatch_share, update.mismatch_max) == (0.0, 0.0)
        ends.append(weights(toy.model))
    assert equal(*ends)
