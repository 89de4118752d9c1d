import pytest
import torch

from rorqual.errors import UserError
from rorqual.plan.optimizer_state import predict_state
from rorqual.recipe import OptimizerSection
from rorqual.train.muon import as_matrices, orthogonalise
from rorqual.train.optimizer import Optimizer


def learn(model, optimizer, batch, steps, micro=1):
    losses = []
    for _ in range(steps):
        for inputs, targets in zip(batch.inputs.chunk(micro), batch.targets.chunk(micro), strict=True):
            hidden = model(inputs).to(model.head_weight.dtype)
            logits = (hidden @ model.head_weight.T).float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / micro
            loss.backward()
            optimizer.accumulate()
        losses.append(loss.item() * micro)
        optimizer.step(1.0)
    return losses


def test_adamw_is_torchs_adamw(make_model, make_batch):
    ours, theirs, batch = make_model(), make_model(), make_batch()
    section = OptimizerSection(lr=1e-2, clip=0.5)
    losses = learn(ours, Optimizer(ours, section, torch.float32), batch, 5)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=section.betas, eps=section.eps)
    for expected in losses:
        loss = torch.nn.functional.cross_entropy(theirs.logits(batch.inputs).flatten(0, 1), batch.targets.flatten())
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        reference.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_brings_singular_values_near_one(shape, dtype):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e3])[: shape[0], None, None]
    values = torch.linalg.svdvals(orthogonalise(matrices, dtype=dtype).float())
    # The quintic's limits are 0.68 and 1.13; a square Gaussian matrix may have values too small to arrive in 5 steps.
    low = 0.65 if shape[1] != shape[2] else 0.0
    assert values.max() < 1.25
    assert values.min() > low
    assert values.median() > 0.65


def test_newton_schulz_keeps_singular_vectors():
    torch.manual_seed(0)
    matrix = torch.randn(1, 12, 40)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    product = u.mT @ orthogonalise(matrix, dtype=torch.float32) @ v.mT
    torch.testing.assert_close(product, torch.diag_embed(product.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)


def test_gate_and_up_are_separate_matrices():
    stack = torch.arange(2 * 6 * 4.0).view(2, 6, 4)
    matrices = as_matrices("mlp.experts.gate_up_proj", stack)
    assert matrices.shape == (4, 3, 4)
    assert torch.equal(matrices[2], stack[1, :3])  # expert 1's gate
    assert torch.equal(matrices[3], stack[1, 3:])  # expert 1's up


def test_muon_update_has_the_rms_of_adamw_and_leaves_the_rest_to_adamw(make_model, make_batch):
    model = make_model()
    section = OptimizerSection(name="muon", lr=1e-3, muon_lr=1e-3, weight_decay=0.0, clip=1e9)
    optimizer = Optimizer(model, section, torch.float32)
    assert set(optimizer.adamw.masters) == {n for n, p in model.named_parameters() if p.ndim < 2} | {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(n for n, _ in model.named_parameters() if n.endswith("mlp.gate.weight")),
    }
    before = {n: w.clone() for n, w in optimizer.masters.items()}
    learn(model, optimizer, make_batch(), 1)
    for name in optimizer.muon.masters:
        if "layers.2" in name:
            continue  # the multi-token module, which this loss does not reach
        update = (optimizer.masters[name] - before[name]).square().mean().sqrt()
        assert 0.1e-3 < update < 0.25e-3, name


def test_bfloat16_keeps_fp32_masters_norms_and_router(make_model, make_batch):
    model = make_model()
    exact = make_model()
    optimizer = Optimizer(model, OptimizerSection(lr=1e-3), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["model.layers.1.mlp.experts.gate_up_proj"] == torch.bfloat16
    assert dtypes["model.layers.1.mlp.gate.weight"] == torch.float32
    assert dtypes["model.norm.weight"] == torch.float32
    assert all(torch.equal(optimizer.masters[n], p) for n, p in exact.named_parameters())
    # Steps of 1e-6 vanish in bfloat16 (8 bits) and must add up in the masters.
    optimizer.section.lr = 1e-6
    learn(model, optimizer, make_batch(), 3)
    name = "model.embed_tokens.weight"
    moved = optimizer.masters[name] - dict(exact.named_parameters())[name]
    assert moved.abs().max() > 2e-6
    assert torch.equal(model.model.embed_tokens.weight, optimizer.masters[name].bfloat16())


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_learns_in_place(make_model, make_batch, name, dtype):
    model = make_model()
    place = model.model.embed_tokens.weight
    optimizer = Optimizer(model, OptimizerSection(name=name, lr=1e-2, muon_lr=1e-2), dtype)
    losses = learn(model, optimizer, make_batch(), 30)
    assert losses[-1] < losses[0] / 3
    assert model.model.embed_tokens.weight is place


def test_accumulation_equals_the_whole_batch(make_model, make_batch):
    whole, parts, batch = make_model(), make_model(), make_batch()
    learn(whole, Optimizer(whole, OptimizerSection(lr=1e-3), torch.float32), batch, 3)
    learn(parts, Optimizer(parts, OptimizerSection(lr=1e-3), torch.float32), batch, 3, micro=2)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing(make_model):
    model = make_model()
    optimizer = Optimizer(model, OptimizerSection(name="muon"), torch.float32)
    before = {n: t.clone() for n, t in optimizer.tensors().items()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.model.norm.weight.grad[0] = float("nan")
    optimizer.accumulate()
    assert optimizer.step(1.0).skipped
    assert all(torch.equal(before[n], t) for n, t in optimizer.tensors().items())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.accumulate()
    assert not optimizer.step(1.0).skipped  # and the bad gradient is gone


def grow(model):
    """A gradient for every parameter, also those that a loss does not reach."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)


BIG = {"hidden_size": 64, "moe_intermediate_size": 48}  # some tensors are above 4096 elements, some no multiple of 256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_bytes_of_the_state_are_those_predicted(make_model, dtype, name, moments):
    model = make_model(**BIG)
    section = OptimizerSection(name=name, moments=moments)
    optimizer = Optimizer(model, section, getattr(torch, dtype))
    assert optimizer.state_bytes() == predict_state(model.config, dtype, section)
    grow(model)
    optimizer.accumulate()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def stored(tensors):
        return sum(t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().data_ptr() not in weights)

    moment_tensors = [t for n, t in optimizer.tensors().items() if n.startswith(("adamw.", "muon.")) and t.ndim]
    assert vars(optimizer.state_bytes()) == {
        "masters": stored(optimizer.masters.values()),
        "gradients": stored(optimizer.grads.values()),
        "moments": stored(moment_tensors),
    }
    count = sum(p.numel() for p in model.parameters())
    assert optimizer.state_bytes().moments <= {"float32": 8, "bfloat16": 4, "8bit": 4}[moments] * count


def test_small_tensors_keep_fp32_moments_beside_8_bits(make_model):
    model = make_model(**BIG)
    adamw = Optimizer(model, OptimizerSection(moments="8bit"), torch.float32).adamw
    for name, p in model.named_parameters():
        expected = torch.uint8 if p.numel() >= 4096 else torch.float32
        assert adamw.first[name].dtype == adamw.second[name].dtype == expected, name
    assert adamw.first["model.norm.weight"].dtype == torch.float32
    assert sum(t.dtype == torch.uint8 for t in adamw.first.values()) >= 5


@pytest.mark.parametrize("section", [
    {"moments": "bfloat16"}, {"moments": "bfloat16", "stochastic_rounding": True}, {"moments": "8bit"},
])  # fmt: skip
def test_steps_with_small_moments_are_nearly_fp32s(make_model, section):
    exact, rounded = make_model(**BIG), make_model(**BIG)
    before = {n: p.detach().clone() for n, p in exact.named_parameters()}
    optimizers = [
        Optimizer(model, OptimizerSection(lr=1e-2, weight_decay=0.2, **how), torch.float32)
        for model, how in ((exact, {}), (rounded, section))
    ]
    for step in range(4):
        for model, optimizer in zip((exact, rounded), optimizers, strict=True):
            torch.manual_seed(step)
            grow(model)
            optimizer.accumulate()
            optimizer.step(0.5)
    for (name, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        moved = (a - before[name]).norm()
        assert (a - b).norm() < 0.05 * moved, name
        if section["moments"] == "bfloat16":
            assert not torch.equal(a, b)


def test_rounding_by_chance_depends_on_the_runs_seed_alone(make_model):
    found = []
    for seed in (0, 0, 1):
        model = make_model(0)
        torch.manual_seed(seed)
        optimizer = Optimizer(model, OptimizerSection(moments="bfloat16", stochastic_rounding=True), torch.float32)
        torch.manual_seed(5)
        grow(model)
        optimizer.accumulate()
        optimizer.step(1.0)
        found.append(optimizer.adamw.second["lm_head.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_muon_keeps_its_momentum_in_bfloat16(make_model):
    exact, rounded = make_model(), make_model()
    optimizers = [
        Optimizer(model, OptimizerSection(name="muon", moments=moments), torch.float32)
        for model, moments in ((exact, "float32"), (rounded, "8bit"))
    ]
    for step in range(2):
        for model, optimizer in zip((exact, rounded), optimizers, strict=True):
            torch.manual_seed(step)
            grow(model)
            optimizer.accumulate()
            optimizer.step(1.0)
    for name, kept in optimizers[1].muon.momentum.items():
        assert kept.dtype == torch.bfloat16
        momentum = optimizers[0].muon.momentum[name]
        assert (kept - momentum).abs().max() <= 2**-7 * momentum.abs().max()
        assert not torch.equal(kept.float(), momentum)


def test_moments_of_another_dtype_are_refused(make_model):
    plain = Optimizer(make_model(), OptimizerSection(), torch.float32)
    small = Optimizer(make_model(), OptimizerSection(moments="bfloat16"), torch.float32)
    with pytest.raises(UserError, match=r"adamw\.first\..* has dtype torch.float32, not torch.bfloat16"):
        small.load_tensors(plain.tensors())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_small_moments_learn_as_well_as_fp32(make_model, make_batch, name):
    """Mean loss of the last 20 of 150 steps, on new sequences each; the noise is that of FP32 over seeds."""

    def last(seed, **how):
        model = make_model(seed, **BIG, num_nextn_predict_layers=0)
        optimizer = Optimizer(model, OptimizerSection(name=name, lr=3e-3, muon_lr=3e-3, **how), torch.float32)
        losses = [learn(model, optimizer, make_batch(1000 * seed + i, sequences=8), 1)[0] for i in range(150)]
        assert losses[0] > 4
        return sum(losses[-20:]) / 20

    seeds = range(4)
    exact = torch.tensor([last(seed) for seed in seeds])
    assert exact.max() < 1.5  # it learns, so that the comparison means something
    for how in ({"moments": "bfloat16"}, {"moments": "bfloat16", "stochastic_rounding": True}, {"moments": "8bit"}):
        found = torch.tensor([last(seed, **how) for seed in seeds])
        print(name, how, exact.tolist(), found.tolist())
        assert abs(found.mean() - exact.mean()) < 2 * exact.std(), how


def test_another_models_tensors_are_refused(make_model):
    small = Optimizer(make_model(), OptimizerSection(), torch.float32)
    wide = Optimizer(make_model(moe_intermediate_size=24), OptimizerSection(), torch.float32)
    with pytest.raises(UserError, match=r"weights\..*experts.*shape"):
        wide.load_tensors(small.tensors())
    with pytest.raises(UserError, match="missing"):
        small.load_tensors({})
