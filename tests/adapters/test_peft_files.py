"""Adapters in peft's layout, in and out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.adapters import save_random_adapter
from helpers.small_configs import GROUPED, LATENT
from rorqual.adapters.lora import add_lora, lora_parameters, merge
from rorqual.adapters.peft_files import import_adapter, read_adapter, save_adapter
from rorqual.checkpoint.huggingface import load_model, save_model
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.sections import LoRASection

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(params=[GROUPED, LATENT], ids=["grouped", "latent"])
def base(request, tmp_path):
    torch.manual_seed(0)
    save_model(Transformer(request.param), tmp_path / "base")
    return tmp_path / "base"


def write_adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


Q = "model.layers.0.self_attn.q_proj"


def one_update(rank=2):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, 32, generator=generator), torch.randn(32, rank, generator=generator)
    return {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}


@pytest.mark.parametrize(("config", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5)])
def test_an_adapter_written_by_hand_is_merged_by_hand(tmp_path, config, scale):
    torch.manual_seed(0)
    model = Transformer(GROUPED)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tensors = one_update()
    merge(model, read_adapter(write_adapter(tmp_path / "a", tensors, lora_alpha=6, **config)).updates)
    A, B = tensors.values()
    expected = before.pop(f"{Q}.weight") + scale * B @ A
    torch.testing.assert_close(model.state_dict()[f"{Q}.weight"], expected, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_a_routed_expert_is_merged_into_its_place_in_the_stack(tmp_path):
    torch.manual_seed(0)
    model = Transformer(LATENT)
    stack = model.model.layers[1].mlp.experts.gate_up_proj.detach().clone()
    name = "model.layers.1.mlp.experts.2.up_proj"
    A, B = torch.ones(1, 32), torch.ones(16, 1)
    folder = write_adapter(tmp_path / "a", {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, lora_alpha=0.5)
    merge(model, read_adapter(folder).updates)
    stack[2, 16:] += 0.5
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj, stack)


def test_what_is_written_has_pefts_names(base, tmp_path):
    folder = save_random_adapter(base, tmp_path / "a", seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, str(base))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    assert tensors[f"{name}.lora_A.weight"].shape[0] == tensors[f"{name}.lora_B.weight"].shape[1] == 3
    targets = set(config["target_modules"])
    for name in tensors:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        assert path in targets or path.rpartition(".")[2] in targets


def test_importing_an_adapter_merges_it(base, tmp_path):
    folder = save_random_adapter(base, tmp_path / "a", seed=1)
    import_adapter(folder, tmp_path / "whole", base)
    found = load_model(tmp_path / "whole")
    expected = load_model(base)
    merge(expected, read_adapter(folder).updates)
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in expected.state_dict().items())
    with pytest.raises(UserError, match="is the source model itself"):
        import_adapter(folder, base, base)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .*lm_head.* is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern = .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"some_later_field": 3}, "some_later_field = 3 is not supported"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x' is not a number"),
    ],
)
def test_what_changes_the_result_is_refused(tmp_path, config, sentence):
    folder = write_adapter(tmp_path / "a", one_update(), **config)
    with pytest.raises(UserError, match=sentence):
        read_adapter(folder)


def test_damaged_files_are_named(tmp_path):
    A, B = one_update().values()
    with pytest.raises(UserError, match=r"q_proj lacks an A \[r, in\] and a B \[out, r\] that fit"):
        read_adapter(write_adapter(tmp_path / "a", {f"{Q}.lora_A.weight": A}))
    with pytest.raises(UserError, match=r"q_proj lacks an A"):
        read_adapter(write_adapter(tmp_path / "a", {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B[:, :1].clone()}))
    with pytest.raises(UserError, match="magnitude_vector is not the A or B"):
        read_adapter(write_adapter(tmp_path / "a", one_update() | {f"{Q}.lora_magnitude_vector": torch.ones(3)}))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="Python pickle"):
        read_adapter(tmp_path / "a")
    wide = {f"{Q}.lora_A.weight": torch.ones(1, 33), f"{Q}.lora_B.weight": torch.ones(32, 1)}
    with pytest.raises(UserError, match=r"q_proj as 32 × 33, but the model's is 32 × 32"):
        merge(Transformer(GROUPED), read_adapter(write_adapter(tmp_path / "b", wide)).updates)
    other = {f"{Q}x.lora_A.weight": A, f"{Q}x.lora_B.weight": B}
    with pytest.raises(UserError, match="q_projx, which the model does not have"):
        merge(Transformer(GROUPED), read_adapter(write_adapter(tmp_path / "c", other)).updates)


ATTENTION = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def test_ours_in_peft_and_pefts_here_give_the_same_logits(base, tmp_path):
    """Of the latent model attention alone is adapted: peft takes its feed-forwards' names for routed experts."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def released():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    model = load_model(base)
    linears = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in ATTENTION if name in linears]
    section = LoRASection(rank=4, alpha=8.0, targets="all" if "k_proj" in linears else targets)
    add_lora(model, section, seed=0)
    for name, p in lora_parameters(model).items():
        if name.endswith("lora_B"):
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    save_adapter(model, tmp_path / "ours", section, str(base))
    theirs = peft.PeftModel.from_pretrained(released(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model.logits(TOKENS), atol=1e-5, rtol=1e-5)
    for rslora in (False, True):
        config = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, use_rslora=rslora,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        theirs = peft.get_peft_model(released(), config).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        here = load_model(base)
        merge(here, read_adapter(tmp_path / "theirs").updates)
        with torch.no_grad():
            torch.testing.assert_close(here.logits(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)
