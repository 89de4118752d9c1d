"""rorqual plan, as typed."""

import json
import re
import sys

import pytest
import torch

from rorqual.cli import entry, plan_stages
from rorqual.plan.chips import chip_called, known_chips


def run(monkeypatch, capsys, *words):
    """→ exit status, what was printed, and the error."""
    monkeypatch.setattr(sys, "argv", ["rorqual", "plan", *words])
    with pytest.raises(SystemExit) as end:
        entry.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_v3_on_its_own_cluster(monkeypatch, capsys):
    """2664 K hours and $5.328 M were published for pre-training (V3, table 1)."""
    words = "deepseek-v3 --gpu h800 --gpus 2048 --tokens 14.8T --precision fp8 --moments bfloat16 --json"
    status, out, _ = run(monkeypatch, capsys, *words.split())
    found = json.loads(out)
    assert status in (0, None)
    assert found["gpu_hours"] == pytest.approx(2664e3, rel=0.1)
    assert found["cost_usd"] == pytest.approx(5.328e6, rel=0.1)
    assert found["gpu_hours_interval"][0] < 2664e3 < found["gpu_hours_interval"][1]
    assert found["days"] * 24 * 2048 == pytest.approx(found["gpu_hours"])
    assert found["params"]["total"] == 671026404352
    assert found["params"]["active"] / 1e9 == pytest.approx(36.6, abs=0.1)
    assert found["cache_bytes_per_token"] == 70272
    assert found["memory_per_gpu_bytes"] < 80e9
    assert found["layout"]["pipeline"] == 16
    assert len(found["other_layouts"]) == 4
    assert sum(found["seconds_by_part"].values()) / 86400 == pytest.approx(found["days"])
    assert found["assumptions"]


def test_as_tables(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "smollm2-135m", "--gpu", "rtx4090", "--tokens", "2B")
    assert status in (0, None)
    for words in ("1 × NVIDIA RTX 4090", "chip hours", "the fastest", "activations", "KV cache"):
        assert words in out, out


def test_as_a_page(monkeypatch, capsys, tmp_path):
    words = ("smollm2-135m", "--gpu", "rtx4090", "--tokens", "2B", "--page")
    status, out, _ = run(monkeypatch, capsys, *words, str(tmp_path / "plan.html"))
    assert status in (0, None)
    assert "the fastest" in out
    assert out.splitlines()[-1].endswith("plan.html")
    assert "<title>Plan: smollm2-135m" in (tmp_path / "plan.html").read_text(encoding="utf-8")
    _, out, _ = run(monkeypatch, capsys, *words, str(tmp_path / "other.html"), "--json")
    assert json.loads(out)["gpus"] == 1
    assert (tmp_path / "other.html").exists()
    status, _, error = run(monkeypatch, capsys, *words, str(tmp_path / "nowhere" / "plan.html"))
    assert status == 2
    assert re.search(r"plan\.html cannot be written", error)


def test_fewest_chips_that_end_in_time(monkeypatch, capsys):
    days = []
    for limit in ("30", "3"):
        _, out, _ = run(monkeypatch, capsys, "qwen2.5-1.5b", "--tokens", "50B", "--days", limit, "--json")
        found = json.loads(out)
        assert found["days"] <= float(limit)
        days.append(found["gpus"])
    assert days[0] < days[1]


def test_a_config_and_chips_of_ones_own(monkeypatch, capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "eos_token_id": [1, 2],
    }))  # fmt: skip
    chips = tmp_path / "chips.toml"
    chips.write_text(
        '[mine]\nname = "Mine"\nfamily = "own"\npeak = { bfloat16 = 1e12 }\nmemory = 1e9\nbandwidth = 1e11\n'
        'source = "me"\n'
    )
    words = [str(config), "--gpu", "mine", "--chips", str(chips), "--tokens", "1M", "--price", "2", "--json"]
    _, out, _ = run(monkeypatch, capsys, *words)
    found = json.loads(out)
    assert found["gpu"] == "Mine"
    assert found["cost_usd"] == pytest.approx(2 * found["gpu_hours"])
    assert "no published run of own" in found["assumptions"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("deepseek-v3 --tokens 0", "--tokens 0: must be above 0"),
        ("deepseek-v3 --tokens=-3", "--tokens -3: must be a number such as 14.8T"),
        ("deepseek-v3 --tokens many", "--tokens many: must be a number"),
        ("deepseek-v3", "say on how many tokens"),
        ("deepseek-v3 --tokens 1T --gpus=-1", "--gpus -1: input should be greater than or equal to 1"),
        ("deepseek-v3 --tokens 1T --gpu abacus", "--gpu abacus: no such chip is known; say one of h100"),
        (
            "deepseek-v3 --tokens 1T --precision int3",
            "--precision int3: input should be 'fp8', 'bfloat16' or",
        ),
        ("deepseek-v3 --tokens 1T --price=-1", "--price -1.0: input should be greater than or equal to 0"),
        ("deepseek-v3 --tokens 1T --gpus 8", "does not fit on 8 × NVIDIA H100 SXM: .* more than there is"),
        (
            "deepseek-v9 --tokens 1T",
            "deepseek-v9 is neither a model's directory nor a known model; did you mean deepseek-v",
        ),
        ("smollm2-135m --tokens 1T --gpus 1 --chips nowhere.toml", "nowhere.toml"),
        ("deepseek-v3 --tokens 100000T --days 0.001", "--days 0.001: too few even for 131072"),
    ],
)
def test_nonsense_is_one_sentence(monkeypatch, capsys, words, said):
    status, out, err = run(monkeypatch, capsys, *words.split())
    assert (status, out) == (2, "")
    assert re.search(said, err), err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_deepseeks_serving_day(monkeypatch, capsys):
    """$87 072 of cost, $562 027 of income: 608 B tokens in, 56.3 % of them cached, 168 B out, 4989 tokens of context on
    average, 21 tokens/s a user (DeepSeek's inference system, 2025-02). As many users as make 168 B tokens."""
    users = 168e9 / 86400 / 21
    words = f"deepseek-v3 --for serve --gpu h800 --users {users} --prompt 4384 --answer 1211 --hit 0.563 --speed 21"
    _, out, _ = run(monkeypatch, capsys, *words.split(), "--prices", "0.14:0.55:2.19", "--json")
    found = json.loads(out)
    assert found["cost_usd"] == pytest.approx(87072, rel=0.1)
    assert found["income_usd_a_day"] == pytest.approx(562027, rel=0.001)
    assert found["margin"] + 1 == pytest.approx(6.45, rel=0.1)
    assert found["decode"]["tokens_per_second_node"] == pytest.approx(14800, rel=0.1)
    assert found["prefill"]["tokens_per_second_node_with_hits"] == pytest.approx(73700, rel=0.15)


def test_r1_zeros_hours(monkeypatch, capsys):
    """101 K H800 hours on 512: 10 400 steps of which 16 share a rollout of 8192 answers. Mean lengths are read off the
    paper's figure: 1 to 10 thousand until the limit is raised after 8200 steps, then 10 to 14 thousand."""
    hours = 0.0
    for steps, lengths, limit in ((512, "1000:10000", 32768), (138, "10000:14000", 65536)):
        words = (
            f"deepseek-v3 --for rl --gpu h800 --gpus 512 --precision fp8 --weights fp8 --questions 512 --steps {steps}"
        )
        _, out, _ = run(monkeypatch, capsys, *words.split(), "--lengths", lengths, "--limit", str(limit), "--json")
        hours += json.loads(out)["gpu_hours"]
    assert hours == pytest.approx(101e3, rel=0.1)


def test_serve_and_rl_as_tables(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, *["deepseek-r1", "--for", "serve", "--gpu", "h200", "--users", "100"])
    assert "8 × NVIDIA H200" in out
    assert "tokens/s each" in out
    _, out, _ = run(monkeypatch, capsys, *["r1-distill-qwen-7b", "--for", "rl", "--gpus", "8", "--steps", "100"])
    assert "rollouts, with less than half of the answers open" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("deepseek-v3 --for serve --tokens 5", "--tokens is for pretrain and sft, not for serve; leave it out"),
        ("deepseek-v3 --for sft --tokens 1T --users 4", "--users is for serve, not for sft; leave it out"),
        ("deepseek-v3 --for rl --context 64", "--context is for pretrain and sft, not for rl; leave it out"),
        (
            "deepseek-v3 --tokens 1T --prompt 5",
            "--prompt is for rl, distill, eval and serve, not for",
        ),
        ("deepseek-v3 --for dance", "--for dance: must be one of pretrain, sft, rl, distill, eval, serve"),
        ("deepseek-v3 --for rl", "say how many rollouts the run has"),
        ("deepseek-v3 --for rl --steps 10 --gpus 8", "does not fit on 8 × NVIDIA H100"),
        ("smollm2-135m --for rl --steps 10 --gpus 8 --lengths 4", "--lengths 4: must be 2 numbers with : between"),
        ("smollm2-135m --for rl --steps 10 --gpus 8 --lengths 1:9000", "9000 tokens on average with at most 8192"),
        ("deepseek-v3 --for serve --gpu rtx4090", "does not fit: on 128 × NVIDIA RTX 4090 its weights take"),
        ("llama-3.1-405b --for serve --speed 900", "--speed 900: NVIDIA H100 SXM reaches .* for one user at most"),
        ("llama-3.1-8b --for serve --hit 2", "--hit 2.0: input should be less than or equal to 0.999"),
        ("llama-3.1-8b --for serve --prices 1", "--prices 1: must be 3 numbers"),
    ],
)
def test_nonsense_about_rl_and_serving_is_one_sentence(monkeypatch, capsys, words, said):
    status, out, err = run(monkeypatch, capsys, *words.split())
    assert (status, out) == (2, "")
    assert re.search(said, err), err
    assert err.count("\n") == 1


def test_a_budget_is_spent(monkeypatch, capsys):
    """On more tokens of a model that is named, or on the largest model for which they are enough."""
    _, out, _ = run(monkeypatch, capsys, *["smollm2-135m", "--budget", "100", "--json"])
    found = json.loads(out)
    assert found["cost_usd"] == pytest.approx(100, rel=0.005)
    assert found["cost_usd"] <= 100
    _, out, _ = run(monkeypatch, capsys, *["--budget", "1000", "--json"])
    found = json.loads(out)
    assert found["cost_usd"] == pytest.approx(1000, rel=0.005)
    # nanochat's d32, 1.9 G parameters on 38 G tokens, is sold as "the $1000 tier".
    assert found["params"]["total"] == pytest.approx(1.9e9, rel=0.1)
    assert found["tokens"] == pytest.approx(38e9, rel=0.15)
    assert found["compute_optimal_tokens"] <= found["tokens"]
    assert found["config"]["hidden_size"] % 128 == 0


def test_days_on_given_chips_are_spent_too(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, *["smollm2-135m", "--days", "0.5", "--gpus", "8", "--json"])
    found = json.loads(out)
    assert found["days"] == pytest.approx(0.5, rel=0.005)
    assert found["gpus"] == 8


RECIPE = """
name = "{name}"
{more}
[train]
steps = 100
batch_size = 8
"""
SIZES = """
[model.config]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
n_routed_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 32
[data]
sources = [{ path = "a.txt" }]
sequence_length = 128
"""
CHATS = """
[model]
path = "{path}"
[data]
path = "chats.jsonl"
sequence_length = 64
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A model is pre-trained, and then tuned on chats."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first.toml").write_text(RECIPE.format(name="first", more=SIZES))
    (tmp_path / "second.toml").write_text(RECIPE.format(name="second", more=CHATS.format(path="runs/first/model")))
    return tmp_path


def test_recipes_follow_each_other(recipes, monkeypatch, capsys):
    """The second tunes the model that the first will write, on this machine, or on other chips."""
    _, out, err = run(monkeypatch, capsys, "first.toml", "train.steps=50", "second.toml", "--price", "2", "--json")
    found = json.loads(out)
    first, second = found["stages"]
    assert (first["kind"], second["kind"]) == ("pretrain", "sft")
    assert (first["tokens"], second["tokens"]) == (50 * 8 * 128, 100 * 8 * 64)
    assert first["params"] == second["params"]
    for name in ("gpu_hours", "cost_usd"):
        assert found[name] == pytest.approx(first[name] + second[name])
        for end in (0, 1):
            ends = [stage[f"{name}_interval"][end] for stage in (first, second)]
            assert found[f"{name}_interval"][end] == pytest.approx(sum(ends))
    assert found["cost_usd"] == pytest.approx(2 * found["gpu_hours"])
    _, out, err = run(monkeypatch, capsys, "first.toml", "second.toml", "--gpu", "h100", "--json")
    assert [stage["gpu"] for stage in json.loads(out)["stages"]] == 2 * ["NVIDIA H100 SXM"], err


def test_a_recipes_own_layout(recipes, monkeypatch, capsys):
    layout = ["parallel.pipeline=2", "parallel.data=2", "train.micro_batch=1"]
    _, _, err = run(monkeypatch, capsys, "first.toml", *layout, "--gpu", "h100")
    assert "the layout is not possible: " in err  # DualPipeV has four stages on two ranks, the model two layers
    words = ["first.toml", *layout, "parallel.schedule=1f1b", "--gpu", "h100", "--json"]
    _, out, _ = run(monkeypatch, capsys, *words)
    found = json.loads(out)
    assert (found["gpus"], found["layout"]["pipeline"], found["layout"]["data"]) == (4, 2, 2)
    assert found["layout"]["precision"] == "bfloat16"
    assert found["other_layouts"] == []
    _, out, _ = run(monkeypatch, capsys, *words, "--precision", "fp8")
    assert json.loads(out)["layout"]["precision"] == "fp8"


def test_a_recipe_is_rehearsed(recipes, monkeypatch, capsys):
    monkeypatch.setenv("RORQUAL_CALIBRATION", str(recipes / "calibration.json"))
    _, out, err = run(monkeypatch, capsys, "first.toml", "--rehearse", "2", "--json")
    assert "rehearsed in 2 steps" in json.loads(out)["assumptions"][0]
    assert "first, step 2 of 2" in err
    _, out, _ = run(monkeypatch, capsys, "first.toml", "train.steps=7", "--json")
    assert "rehearsed in 2 steps" in json.loads(out)["assumptions"][0]


def test_a_pipelines_file(recipes, monkeypatch, capsys):
    (recipes / "all.toml").write_text(
        'name = "all"\ngpu = "h100"\nprice = 2.0\n[[stage]]\nrecipe = "first.toml"\n'
        '[[stage]]\nfor = "eval"\nname = "graded"\nproblems = 100\nanswer = 50\n[[stage]]\nfor = "serve"\nusers = 3\n'
    )
    _, out, _ = run(monkeypatch, capsys, "all.toml", "--json")
    found = json.loads(out)
    first, graded, served = found["stages"]
    assert graded["params"] == served["params"] == first["params"]
    assert graded["tokens"] == 100 * 16 * 50
    # A service goes on for ever, and is not in the sum.
    assert found["gpu_hours"] == pytest.approx(first["gpu_hours"] + graded["gpu_hours"])
    _, out, _ = run(monkeypatch, capsys, "all.toml")
    assert "before serving" in out
    # The file's price is of its own chip.
    _, out, _ = run(monkeypatch, capsys, "all.toml", "--gpu", "b200", "--json")
    assert {stage["price_per_gpu_hour"] for stage in json.loads(out)["stages"]} == {6.25}
    assert "first" in out


@pytest.fixture
def gpu(recipes, monkeypatch):
    """Sets the GPU that PyTorch finds here."""

    def found(name, memory):
        monkeypatch.setattr(plan_stages, "find_device", lambda name, processes: torch.device("cuda", 0))
        monkeypatch.setattr(plan_stages, "gpu_name", lambda device: name)
        monkeypatch.setattr(plan_stages, "memory_total", lambda device: memory)

    return found


def test_recipes_run_on_the_gpu_that_is_found(recipes, gpu, monkeypatch, capsys):
    (recipes / "all.toml").write_text('[[stage]]\nrecipe = "first.toml"\n')
    gpu("NVIDIA H100 80GB HBM3", 84.9e9)
    for file in ("first.toml", "all.toml"):
        _, out, err = run(monkeypatch, capsys, file, "--json")
        assert (json.loads(out)["gpu"], json.loads(out)["gpus"]) == ("NVIDIA H100 SXM", 1), err
        _, out, err = run(monkeypatch, capsys, file, "--gpu", "cpu", "--json")
        assert "H100" not in json.loads(out)["gpu"], err
    _, _, err = run(monkeypatch, capsys, "first.toml", "--rehearse", "2")
    assert "first is planned for a chip, not run on this machine; leave it out, or add --gpu cpu" in err
    gpu("NVIDIA H100 PCIe", 84.9e9)
    status, _, err = run(monkeypatch, capsys, "all.toml")
    assert status == 2
    assert "first would run on this machine's NVIDIA H100 PCIe, which is none of the chips that are known; say" in err


@pytest.mark.parametrize(
    ("name", "gigabytes", "chip"),
    [
        ("NVIDIA H200", 150.1, "h200"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "a100"),
        ("NVIDIA A100-SXM4-40GB", 42.4, None),
        ("NVIDIA GeForce RTX 4090", 25.3, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 17.2, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10.2, None),
        ("NVIDIA H100 NVL", 100.0, None),
        ("AMD Instinct MI300X", 206.1, "mi300x"),
        ("NVIDIA L40", 47.8, None),
    ],
)
def test_chips_by_their_drivers_names(name, gigabytes, chip):
    assert chip_called(name, gigabytes * 1e9, known_chips()) == chip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tokens 1B", "say which model is trained"),
        ("--budget 1 --tokens 5B smollm2-135m", "give either --tokens or --budget"),
        ("--budget 0.00001", "--budget 1e-05: too little for a model of 128 wide"),
        ("smollm2-135m --shape mixture --tokens 1B", "--shape is for a model that is sought"),
        ("smollm2-135m --budget 5 --gpu cpu", "no price; say it with --price"),
        ("smollm2-135m --for distill", "say whose answers the model learns from"),
        ("smollm2-135m deepseek-v3 --tokens 5", "deepseek-v3: one model is planned at a time"),
        ("nowhere.toml", "nowhere.toml does not exist"),
        ("first.toml --for sft", "--for sft: a recipe says itself what it is for"),
        ("first.toml --tokens 5B", "--tokens: a recipe on this machine is planned as it is; change it by key=value"),
        ("first.toml --gpu h100 --rehearse 2", "--rehearse 2: first is planned for a chip"),
        ("first.toml parallel.data=2", "first is for 2 processes, and plans on this machine are of one"),
        ("first.toml parallel.data=2 --gpu h100 --gpus 4", "--gpus 4: the recipe's .parallel. is for 2 processes"),
        ("smollm2-135m --rehearse 2 --tokens 1B", "--rehearse 2: a recipe's steps are rehearsed"),
        ("first.toml train.steps=x", "first.toml: train.steps = 'x'"),
        ("second.toml", "runs/first/model"),
        ("broken.toml", "broken.toml: stage 2: say either its recipe, or what it is for"),
        ("unknown.toml", "unknown.toml: stage 1: length is unknown; known are batch, budget, context"),
        ("other.toml", "other.toml: field colour is unknown; known are name, out, gpu"),
    ],
)
def test_nonsense_about_pipelines_is_one_sentence(recipes, monkeypatch, capsys, words, said):
    (recipes / "broken.toml").write_text(
        '[[stage]]\nfor = "serve"\nmodel = "smollm2-135m"\n[[stage]]\nmodel = "smollm2-135m"\n'
    )
    (recipes / "unknown.toml").write_text('[[stage]]\nfor = "pretrain"\nmodel = "smollm2-135m"\nlength = 5\n')
    (recipes / "other.toml").write_text('colour = "red"\n[[stage]]\nfor = "serve"\nmodel = "smollm2-135m"\n')
    status, out, err = run(monkeypatch, capsys, *words.split())
    assert (status, out) == (2, ""), err
    assert re.search(said, err), err
    assert err.count("\n") == 1
