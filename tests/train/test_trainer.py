import time

import pytest
import torch

from rorqual.kernels.cross_entropy import linear_cross_entropy
from rorqual.model import Transformer
from rorqual.plan.cost import flops_per_token, mtp_flops_per_token
from rorqual.recipe import BalanceSection, MTPSection, OptimizerSection, ScheduleSection
from rorqual.train.balance import max_violations, update_correction_bias
from rorqual.train.checkpoints import Checkpoints
from rorqual.train.ema import EMA
from rorqual.train.trainer import Trainer
from rorqual.train.training_run import split

CONSTANT = ScheduleSection(name="constant", warmup=0)
MTP = MTPSection(weight=0.3, final_weight=0.1)


def trainer_of(model: Transformer, **kwargs) -> Trainer:
    kwargs = {"mtp": MTP, "balance": BalanceSection()} | kwargs
    return Trainer(model, OptimizerSection(lr=3e-3), CONSTANT, **kwargs)


def nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_loss_is_the_papers(make_model, make_batch):
    """Cross-entropy + λ/D·Σ multi-token losses + α·balance, and its gradient (V3 eq. 24, 25)."""
    model, batch = make_model(num_nextn_predict_layers=2), make_batch()
    trainer = trainer_of(model, balance=BalanceSection(sequence_loss=0.01))
    tokens = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
    routing = []
    hidden = model(batch.inputs, routing=routing)
    main = nll(hidden @ model.head_weight.T, tokens[:, 1:])
    ahead = []
    for k, state in enumerate(model.mtp_hidden_states(hidden, batch.inputs, routing=routing)):
        ahead.append(nll((state @ model.head_weight.T)[:, : -(k + 1)], tokens[:, k + 2 :]))
    (main + 0.3 * sum(ahead) / 2 + 0.01 * sum(r.sequence_loss for r in routing)).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    model.zero_grad()
    metrics = trainer.step([batch], 0.0)
    assert metrics.loss == pytest.approx(main.item(), rel=1e-5)
    assert metrics.mtp_loss == pytest.approx(sum(a.item() for a in ahead) / 2, rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("recompute", ["none", "v3", "full"])
def test_recomputation_changes_no_bit(make_model, make_batch, recompute):
    def trained(**options):
        trainer = trainer_of(make_model(), precision="fp8", notify=lambda _: None, **options)
        return [trainer.step([make_batch()], 0.0) for _ in range(3)], trainer.optimizer.masters

    (steps, masters), (steps_, masters_) = trained(), trained(recompute=recompute)
    assert steps == steps_
    assert all(torch.equal(w, masters_[name]) for name, w in masters.items())


def test_fp8_trains_and_says_what_it_rounds(make_model, make_batch):
    said = []
    rounded = trainer_of(make_model(), precision="fp8", notify=said.append)
    plain = trainer_of(make_model())
    assert said[0].startswith("precision fp8: E4M3")
    first = rounded.step([make_batch()], 0.0)
    assert first.loss != plain.step([make_batch()], 0.0).loss
    for _ in range(40):
        last, exact = rounded.step([make_batch()], 0.0), plain.step([make_batch()], 0.0)
    assert last.loss < first.loss / 2
    assert last.loss == pytest.approx(exact.loss, rel=0.15)


@pytest.mark.parametrize("documents", [False, True])
def test_micro_batches_make_the_same_step(make_model, make_batch, documents):
    batch = make_batch(documents=documents)
    batch.weights[0, :9] = 0  # unequal micro batches: each token still weighs the same
    whole, parts = trainer_of(make_model()), trainer_of(make_model())
    a, b = whole.step([batch], 0.0), parts.step(split(batch, 1), 0.0)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert a.mtp_loss == pytest.approx(b.mtp_loss, rel=1e-5)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    assert a.max_vio_per_layer == pytest.approx(b.max_vio_per_layer)
    assert whole.state() == pytest.approx(parts.state())


def test_isolated_documents_do_not_see_each_other(make_model, make_batch):
    batch = make_batch(documents=True)
    model = make_model()
    trainer = trainer_of(model)
    batch.weights[:, :8] = 0  # loss on the second document only …
    first = trainer.step([batch], 0.0).loss
    batch.inputs[:, :8] = 0  # … must not depend on the first
    again = trainer_of(make_model()).step([batch], 0.0).loss
    assert first == pytest.approx(again, rel=1e-5)


def test_correction_bias_moves_against_the_load(make_model):
    model = make_model()
    update_correction_bias(model, [torch.tensor([9, 1, 5, 5]), torch.tensor([0, 0, 0, 8])], 0.01)
    main, ahead = (layer.gate.e_score_correction_bias for layer in model.moe_layers())
    torch.testing.assert_close(main, torch.tensor([-0.01, 0.01, 0, 0]))
    torch.testing.assert_close(ahead, torch.tensor([0.01, 0.01, 0.01, -0.01]))
    assert max_violations([torch.tensor([9, 1, 5, 5])]) == [pytest.approx(0.8)]


def test_bias_balancing_frees_a_collapsed_router(make_model, make_batch):
    def last(speed):
        model = make_model(n_routed_experts=8)
        for layer in model.moe_layers():
            layer.gate.e_score_correction_bias[:2] = 0.3  # every token goes to the first two
        trainer = trainer_of(model, balance=BalanceSection(bias_speed=speed, sequence_loss=0))
        return [trainer.step([make_batch(i, 8)], 0.0).to_dict()["max_vio"] for i in range(40)][-10:]

    assert min(last(0.0)) > 2
    assert max(last(0.02)) < 1


def test_bias_stands_still_after_its_time_and_mtp_weight_switches(make_model, make_batch):
    trainer = trainer_of(make_model(), mtp=MTPSection(weight=0.3, final_weight=0.0, switch_at=0.5))
    bias = trainer.model.moe_layers()[0].gate.e_score_correction_bias
    early = trainer.step([make_batch()], 0.4)
    moved = bias.clone()
    late = trainer.step([make_batch()], 0.98)
    assert early.mtp_loss is not None
    assert late.mtp_loss is None
    assert moved.abs().max() > 0
    assert torch.equal(moved, bias)
    assert len(late.max_vio_per_layer) == 1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_skips_the_step(make_model, make_batch, where, monkeypatch):
    trainer = trainer_of(make_model(), ema=0.5)
    trainer.step([make_batch()], 0.0)
    before = {n: t.clone() for n, t in trainer.tensors().items()}
    with monkeypatch.context() as patch:
        if where == "loss":
            real = linear_cross_entropy
            patch.setattr("rorqual.train.objective.linear_cross_entropy", lambda *a: real(*a) * float("nan"))
        else:
            weight = trainer.model.model.norm.weight
            handle = weight.register_hook(lambda g: g * float("inf"))
        metrics = trainer.step([make_batch()], 0.0)
    assert metrics.skipped
    assert (metrics.grad_norm is not None) == (where == "gradient")
    assert all(torch.equal(before[n], t) for n, t in trainer.tensors().items())
    assert trainer.skipped_in_a_row == 1
    if where == "gradient":
        handle.remove()
    assert not trainer.step([make_batch()], 0.0).skipped
    assert trainer.skipped_in_a_row == 0


def test_ema_is_the_average_and_is_what_is_released(make_model, make_batch):
    trainer = trainer_of(make_model(), ema=0.75)
    name = "model.layers.1.mlp.experts.down_proj"
    weight = trainer.optimizer.masters[name]
    expected = weight.clone()
    for i in range(3):
        trainer.step([make_batch(i)], 0.0)
        expected = 0.75 * expected + 0.25 * weight
    own = weight.clone()
    with trainer.released_weights():
        torch.testing.assert_close(dict(trainer.model.named_parameters())[name].data, expected)
    assert torch.equal(trainer.optimizer.masters[name], own)


def test_an_average_that_takes_long_is_the_same(make_model, make_batch, monkeypatch):
    """The optimizer, checkpoints and the release wait for the thread."""
    prompt = EMA._update

    def late(self, copied):
        time.sleep(0.05)
        prompt(self, copied)

    monkeypatch.setattr(EMA, "_update", late)
    trainer = trainer_of(make_model(), ema=0.75)
    expected = {name: w.clone() for name, w in trainer.optimizer.masters.items()}
    for i in range(3):
        trainer.step([make_batch(i)], 0.0)
        for name, w in trainer.optimizer.masters.items():
            expected[name].lerp_(w, 0.25)
    with trainer.released_weights():
        assert all(torch.equal(expected[name], p) for name, p in trainer.model.named_parameters())
    assert all(torch.equal(expected[name], trainer.ema.average[name]) for name in expected)
    trainer.step([make_batch(3)], 0.0)
    saved = {name: t.clone() for name, t in trainer.tensors().items()}
    for name, w in trainer.optimizer.masters.items():
        assert torch.equal(saved[f"ema.{name}"], expected[name].lerp_(w, 0.25))


def test_a_thread_that_fails_stops_the_training(make_model, make_batch, monkeypatch):
    def fail(self, copied):
        raise RuntimeError("no average")

    monkeypatch.setattr(EMA, "_update", fail)
    trainer = trainer_of(make_model(), ema=0.75)
    trainer.step([make_batch()], 0.0)
    before = {name: w.clone() for name, w in trainer.optimizer.masters.items()}
    with pytest.raises(RuntimeError, match="no average"):
        trainer.step([make_batch()], 0.0)
    assert all(torch.equal(before[name], w) for name, w in trainer.optimizer.masters.items())
    trainer.ema.update()
    with pytest.raises(RuntimeError, match="no average"):
        trainer.tensors()


def test_bits_per_byte(make_model, make_batch):
    model, batch = make_model(), make_batch()
    model.lm_head.weight.data.zero_()  # uniform over 64 tokens: 6 bits a token
    trainer = trainer_of(model)
    batch.weights[:, 0] = 0
    assert trainer.bits_per_byte([(batch, 3 * int(batch.weights.sum()))]) == pytest.approx(2.0)


@pytest.mark.parametrize(("dtype", "optimizer"), [
    ("float32", {"name": "adamw"}), ("bfloat16", {"name": "adamw"}),
    ("float32", {"name": "muon"}), ("bfloat16", {"name": "muon"}),
    ("float32", {"moments": "bfloat16"}), ("float32", {"moments": "bfloat16", "stochastic_rounding": True}),
    ("float32", {"moments": "8bit"}), ("bfloat16", {"moments": "8bit", "name": "muon"}),
])  # fmt: skip
def test_a_restored_trainer_goes_on_bit_for_bit(make_model, make_batch, optimizer, dtype, tmp_path):
    def make(seed):
        model = make_model(seed, hidden_size=64, moe_intermediate_size=32)  # with tensors large enough for 8 bits
        section = OptimizerSection(lr=3e-3, **optimizer)
        return Trainer(model, section, CONSTANT, MTP, BalanceSection(), dtype=dtype, ema=0.9)

    straight = make(0)
    for i in range(3):
        straight.step([make_batch(i)], 0.0)
    Checkpoints(tmp_path, keep=1).save(3, straight.tensors(), dict(straight.state()))
    _, tensors, state = Checkpoints(tmp_path, keep=1).load_latest()
    resumed = make(1)
    resumed.load(tensors, state)
    for i in range(3, 6):
        a, b = straight.step(split(make_batch(i), 2), 0.0), resumed.step(split(make_batch(i), 2), 0.0)
        assert a == b
    assert all(torch.equal(straight.tensors()[n], t) for n, t in resumed.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True))


def test_flops_and_tokens_are_counted(make_model, make_batch):
    trainer = trainer_of(make_model())
    trainer.step([make_batch(), make_batch(1)], 0.0)
    config = trainer.model.config
    assert trainer.tokens == 2 * 4 * 16
    each = flops_per_token(config, 16) + mtp_flops_per_token(config, 16)
    assert trainer.flops == pytest.approx(trainer.tokens * each)
    assert trainer.state()["steps"] == 1


def test_without_a_compiler_it_says_so_and_runs(make_model, make_batch, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    said = []
    trainer = trainer_of(make_model(), compile=True, notify=said.append)
    plain = trainer_of(make_model())
    assert trainer.step([make_batch()], 0.0) == plain.step([make_batch()], 0.0)
    assert said == ["train.compile: no C++ compiler found; running without torch.compile"]


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(make_model, make_batch):
    said = []
    fast, plain = (
        trainer_of(make_model(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0), **how)
        for how in ({"compile": True, "notify": said.append}, {})
    )
    for i in range(5):
        a, b = fast.step([make_batch(i)], 0.0), plain.step([make_batch(i)], 0.0)
        assert a.loss == pytest.approx(b.loss, abs=1e-4)
        assert a.max_vio_per_layer == pytest.approx(b.max_vio_per_layer, abs=1e-6)
    assert said == []
