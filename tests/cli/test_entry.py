"""What a person types, and what they get back when it is wrong: one sentence, a non-zero exit, nothing lost."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual import load_model, load_tokenizer, save_model
from rorqual.cli import options
from rorqual.cli.entry import main
from rorqual.engine import load_model as load_model_module
from rorqual.kernels.fp8_weight import FP8Weight

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def rorqual(monkeypatch, capsys):
    """Run the command line; gives (exit status, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["rorqual", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as e:
            status = e.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} and {i + 1} make {2 * i + 1}"}) + "\n" for i in range(300)))
    return path


@pytest.fixture
def recipe(tmp_path, corpus):
    """Write a small pre-training recipe; gives its path. Keyword arguments replace sizes of the model."""

    def write(**sizes):
        model = "\n".join(f"{k} = {json.dumps(v)}" for k, v in (SIZES | sizes).items())
        path = tmp_path / "tiny.toml"
        path.write_text(
            f'name = "tiny"\nout = "{tmp_path}"\n[model.config]\n{model}\n[tokenizer]\nvocab_size = 300\n'
            f'[data]\nsources = [{{path = "{corpus}"}}]\nsequence_length = 16\nvalid_fraction = 0.1\n'
            "[train]\nsteps = 3\nbatch_size = 4\nsave_every = 2\n"
        )
        return path

    return write


def one_sentence(result, *words):
    status, _, err = result
    assert status not in (0, None)
    lines = [line for line in err.strip().splitlines() if line.startswith("rorqual: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert str(word) in lines[0], lines[0]


def test_pretrain_then_generate_then_report(rorqual, recipe, tmp_path):
    status, out, _ = rorqual("pretrain", recipe(), "--dry-run")
    assert status == 0
    assert "parameters" in out
    assert "precision" not in out
    status, out, _ = rorqual("pretrain", recipe(), "--dry-run", "precision=fp8")
    assert "precision fp8: E4M3" in out
    assert "not router" in out
    assert not (tmp_path / "tiny").exists(), "a dry run starts nothing"
    status, out, err = rorqual("pretrain", recipe())
    assert status == 0, err
    assert "report" in out
    assert (tmp_path / "tiny" / "report.html").exists()
    status, out, _ = rorqual(
        "generate", tmp_path / "tiny", "3 and 4", "--raw", "--max-tokens", 5, "--seed", 1, "--json"
    )
    assert status == 0
    assert len(json.loads(out)["tokens"]) <= 5
    status, out, _ = rorqual("report", tmp_path / "tiny")
    assert status == 0
    one_sentence(rorqual("pretrain", recipe()), "already holds a run", "--resume")


def test_dry_run_of_rl_says_what_it_needs_and_starts_nothing(rorqual, recipe, tmp_path):
    rorqual("pretrain", recipe())
    path = tmp_path / "rl.toml"
    path.write_text(
        f'name = "sharp"\nout = "{tmp_path}"\nsteps = 2\n[model]\npath = "{tmp_path}/tiny/model"\n'
        '[[environments]]\nname = "chain_sum"\nprompt = "{expression}"\n[grpo]\nmax_tokens = 16\n'
    )
    status, out, err = rorqual("rl", path, "--dry-run")
    assert status == 0, err
    for word in ("parameters", "active", "memory", "tokens", "FLOP", "s a step (", "rollout", "half of the most"):
        assert word in out
    assert re.match(r"chain_sum, the first prompt of \d+ tokens:\n    .*\d+ [+-] \d+.*\n\nparameters ", out, re.DOTALL)
    assert "for the reference model (grpo.kl)" in out
    assert "FP8" not in out
    status, out, _ = rorqual("rl", path, "--dry-run", "grpo.rollout_weights=fp8", "grpo.kl=0")
    assert "for the fp8 weights that rollouts are sampled from" in out
    assert "reference" not in out
    assert "workers" not in out
    status, out, err = rorqual("rl", path, "--dry-run", "--ray", "local", "rollouts.staleness=2")
    assert status == 0, err
    for words in ("2 on Ray, rollouts up to 2 steps stale", "GB of weights each", "a step", "3 versions", "cores"):
        assert words in out
    one_sentence(rorqual("rl", path, "--dry-run", "rollouts.staleness=2"), "rollouts.staleness = 2 needs Ray", "--ray")
    one_sentence(rorqual("rl", path, "--ray", "here"), "--ray 'here'", "HOST:PORT")
    assert not (tmp_path / "sharp").exists()


def test_help_answers_before_torch_is_loaded():
    """So does Ctrl-C: while it loads there is nobody yet who would catch it."""
    code = (
        "import sys; from rorqual.cli.entry import main; sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "except SystemExit: sys.exit(7 if 'torch' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_missing_recipe(rorqual, tmp_path):
    one_sentence(rorqual("pretrain", tmp_path / "none.toml"), "none.toml", "does not exist")


def test_a_home_and_variables_that_the_shell_left(rorqual, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recipe()
    status, _, err = rorqual("pretrain", "~/tiny.toml", "out=$HERE/runs", "train.steps=1")
    assert status == 0, err
    assert (tmp_path / "runs" / "tiny" / "model").exists()
    assert rorqual("report", "${HERE}/runs/tiny")[0] == 0
    assert rorqual("quantize", "~/runs/tiny", "~/packed", "--format=int8")[0] == 0
    assert (tmp_path / "packed" / "config.json").exists()
    assert rorqual("generate", "~/packed", "a", "--max-tokens=2", "--raw")[0] == 0
    assert not (tmp_path / "~").exists()
    one_sentence(rorqual("generate", "$NO_SUCH_NAME/m", "a"), "$NO_SUCH_NAME/m", "is not set")


def test_fp8_weights(rorqual, recipe, tmp_path, monkeypatch):
    """An unquantised run rounded while loading, and the same as an FP8 release, say the same."""
    assert rorqual("pretrain", recipe(), "train.steps=1", "model.config.initializer_range=0.3")[0] == 0
    tokenizer = load_tokenizer(tmp_path / "tiny/model")
    save_model(load_model(tmp_path / "tiny"), tmp_path / "fp8", tokenizer, fp8="fp32")
    loaded = []
    monkeypatch.setattr(load_model_module, "load_model", lambda *args: loaded.append(load_model(*args)) or loaded[-1])
    words = ("3 and 4", "--raw", "--max-tokens", 8, "--temperature", 0, "--weights", "fp8", "--json")
    found = [rorqual("generate", tmp_path / name, *words) for name in ("tiny", "fp8")]
    assert [status for status, _, _ in found] == [0, 0], found
    texts = [json.loads(out)["text"] for _, out, _ in found]
    assert texts[0] == texts[1] != ""
    assert [isinstance(model.layers[1].mlp.experts.down_proj, FP8Weight) for model in loaded] == [True, True]
    one_sentence(rorqual("generate", tmp_path / "fp8", "3", "--weights", "fp4"), "--weights 'fp4'", "fp8")


def test_recipe_of_another_verb(rorqual, recipe):
    one_sentence(rorqual("sft", recipe(), "kind=pretrain"), "rorqual pretrain")


def test_broken_toml(rorqual, tmp_path):
    (tmp_path / "broken.toml").write_text("name = \n")
    one_sentence(rorqual("rl", tmp_path / "broken.toml"), "broken.toml", "not valid TOML")


def test_misspelt_field(rorqual, recipe):
    one_sentence(rorqual("pretrain", recipe(), "train.stepz=3"), "tiny.toml", "train.stepz", "steps")


def test_wrong_type(rorqual, recipe):
    one_sentence(rorqual("pretrain", recipe(), "train.batch_size=many"), "train.batch_size", "many")


def test_override_without_value(rorqual, recipe):
    one_sentence(rorqual("pretrain", recipe(), "train.steps"), "key=value")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"n_group": 3, "topk_group": 1}, ("n_group = 3", "n_routed_experts = 4")),
        ({"num_experts_per_tok": 5}, ("num_experts_per_tok = 5",)),
        ({"qk_rope_head_dim": 3}, ("qk_rope_head_dim = 3", "even")),
        ({"hidden_size": -1}, ("hidden_size = -1",)),
        ({"model_type": "gpt2"}, ("gpt2", "deepseek_v3")),
        ({"vocab_size": 20}, ("vocab_size = 20", "tokenizer")),
    ],
)
def test_impossible_sizes(rorqual, recipe, tmp_path, sizes, words):
    one_sentence(rorqual("pretrain", recipe(**sizes)), *words)


def test_empty_corpus(rorqual, recipe, corpus):
    corpus.write_text("")
    one_sentence(rorqual("pretrain", recipe()), "text.jsonl")


def test_missing_corpus(rorqual, recipe, corpus):
    corpus.unlink()
    one_sentence(rorqual("pretrain", recipe()), "text.jsonl")


def test_broken_line_of_a_corpus(rorqual, recipe, corpus):
    lines = corpus.read_text().splitlines()
    lines[41] = '{"text": "cut'
    corpus.write_text("\n".join(lines))
    one_sentence(rorqual("pretrain", recipe()), "text.jsonl", "line 42")


def test_disk_full_while_saving_keeps_the_last_checkpoint(rorqual, recipe, tmp_path, monkeypatch):
    import rorqual.train.checkpoints as checkpoints

    real, calls = checkpoints.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_file", full)
    one_sentence(rorqual("pretrain", recipe()), "the disk is full", "step 2 is intact")
    kept = [p.name for p in (tmp_path / "tiny" / "checkpoints").iterdir()]
    assert kept == ["step-2"]
    monkeypatch.setattr(checkpoints, "save_file", real)
    status, _, err = rorqual("pretrain", recipe(), "--resume")
    assert status == 0, err


def test_prompt_longer_than_the_context(rorqual, recipe, tmp_path):
    rorqual("pretrain", recipe())
    one_sentence(rorqual("generate", tmp_path / "tiny", "7 " * 80, "--raw"), "context holds 64")


def test_no_model(rorqual, tmp_path):
    one_sentence(rorqual("chat", tmp_path), tmp_path, "config.json")


@pytest.mark.parametrize("inner", ["run", "run/model", "run/student/model"])
def test_what_a_model_is_called_and_where_it_is(tmp_path, inner):
    (tmp_path / inner).mkdir(parents=True)
    (tmp_path / inner / "config.json").write_text("{}")
    assert options.find_model(str(tmp_path / "run")) == tmp_path / inner
    assert options.served_name(tmp_path / "run") == "run"
    assert options.served_name(tmp_path / "run" / "model") == "run"
    assert options.find_model("a/Tiny.GGUF") == Path("a/Tiny.GGUF")
    assert options.served_name(Path("a/Tiny.v1.GGUF")) == "Tiny.v1"


def test_a_setting_of_the_release_that_cannot_be_honoured(rorqual, recipe, tmp_path):
    rorqual("pretrain", recipe())
    file = tmp_path / "tiny" / "model" / "generation_config.json"
    for value, words in (({"num_beams": 4}, "num_beams = 4"), ({"temperature": "0.6"}, "temperature = '0.6'")):
        file.write_text(json.dumps(value))
        one_sentence(rorqual("generate", tmp_path / "tiny", "3", "--raw"), file, words)


def test_unknown_task(rorqual, recipe, tmp_path):
    rorqual("pretrain", recipe())
    one_sentence(rorqual("eval", tmp_path / "tiny", "--tasks", "countdwn"), "countdwn", "countdown")


def test_eval_in_an_unknown_precision(rorqual, tmp_path):
    status, _, err = rorqual("eval", tmp_path, "--tasks", "chain_sum", "--dtype", "float8")
    assert status != 0
    assert "float8" in err
    assert "bfloat16" in err


@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
def test_guessing_in_an_unknown_way(rorqual, tmp_path, command):
    status, _, err = rorqual(command, tmp_path, "--speculative", "magic")
    one_sentence((status, "", err), "--speculative 'magic'", "ngram, mtp, none")


@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
def test_computing_on_an_unknown_device(rorqual, tmp_path, command):
    one_sentence(rorqual(command, tmp_path, "--device", "tpu"), "--device 'tpu'", "cpu, cuda")


def test_serving_with_an_unknown_cache(rorqual, tmp_path):
    status, _, err = rorqual("serve", tmp_path, "--kv-cache-dtype", "int3")
    assert status != 0
    assert "int3" in err
    assert "int8, fp8" in err


def test_eval_against_another_model_gives_the_gain(rorqual, recipe, tmp_path):
    rorqual("pretrain", recipe())
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('name="x"\nsteps=1\n[model]\npath="y"\n[[environments]]\nname="chain_sum"\nprompt="{expression}"')
    options = ("--tasks", tasks, "--problems", 4, "--samples", 2, "--max-tokens", 4, "--template", "plain")
    status, out, err = rorqual("eval", tmp_path / "tiny", "--against", tmp_path / "tiny", *options, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["against"]["tasks"]["chain_sum"]["scores"] == found["tasks"]["chain_sum"]["scores"]
    assert found["gains"] == {"chain_sum": {"gain": 0.0, "interval": [0.0, 0.0]}}
    _, out, _ = rorqual("eval", tmp_path / "tiny", "--against", tmp_path / "tiny", *options)
    assert "+0.0 [+0.0, +0.0]" in out


def test_report_of_nothing(rorqual, tmp_path):
    one_sentence(rorqual("report", tmp_path / "none"), "none")


def test_speedrun_does_not_overwrite(rorqual, tmp_path):
    (tmp_path / "mine").write_text("precious")
    one_sentence(rorqual("speedrun", "--out", tmp_path), "not empty")
    assert (tmp_path / "mine").read_text() == "precious"


def test_doctor_says_what_is_in_use_and_why(rorqual, monkeypatch):
    code, out, _ = rorqual("doctor")
    assert code == 0
    assert all(word in out for word in ("processor", "compiled functions", "dtype auto", "PyTorch"))
    _, out, _ = rorqual("doctor", "--json")
    assert json.loads(out)["dtype auto"].split(":")[0] in ("float32", "bfloat16")


NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "-1", "1e300")


@pytest.mark.parametrize(
    ("verb", "option", "wrong"),
    [
        ("serve", "--port", ("-1", "65536", "9" * 400)),
        ("serve", "--max-num-seqs", ("0", "-1", "9" * 400)),
        ("serve", "--max-queue", ("-1", "9" * 400)),
        ("serve", "--cache-gb", (*NO_NUMBERS, "0")),
        ("serve", "--timeout", (*NO_NUMBERS, "0")),
        ("generate", "--temperature", NO_NUMBERS),
        ("generate", "--top-p", (*NO_NUMBERS, "0", "1.1")),
        ("generate", "--max-tokens", ("0", "-1", "9" * 400)),
        ("generate", "--thinking-budget", ("-1", "9" * 400)),
        ("generate", "--seed", ("9" * 30,)),
        ("chat", "--temperature", NO_NUMBERS),
        ("chat", "--top-p", (*NO_NUMBERS, "0")),
        ("chat", "--max-tokens", ("0", "-1")),
        ("chat", "--thinking-budget", ("-1",)),
        ("eval", "--samples", ("0", "-1", "9" * 400)),
        ("eval", "--problems", ("0", "-1", "9" * 400)),
        ("eval", "--temperature", NO_NUMBERS),
        ("eval", "--top-p", (*NO_NUMBERS, "0")),
        ("eval", "--max-tokens", ("0", "-1")),
        ("eval", "--thinking-budget", ("-1",)),
        ("eval", "--seed", ("9" * 30,)),
        ("speedrun", "--seed", ("-1", "9" * 30)),
        ("speedrun", "--minutes", (*NO_NUMBERS, "0")),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_done(rorqual, verb, option, wrong):
    words = {"speedrun": (), "eval": ("none", "--tasks", "none")}.get(verb, ("none",))
    for number in wrong:
        one_sentence(rorqual(verb, *words, option, number), option)


def test_a_name_can_be_seen(rorqual):
    for name in ("", " ", "a\nb", "a\udcffb"):
        one_sentence(rorqual("serve", "none", "--name", name), "--name")


def test_quantize_reports_what_it_costs(rorqual, recipe, tmp_path):
    assert rorqual("pretrain", recipe(), "train.steps=1")[0] == 0
    text = tmp_path / "calibration.txt"
    text.write_text("\n".join(f"{i} and {i} make {2 * i}" for i in range(500)))
    model, given = tmp_path / "tiny", ("--calibration", text, "--samples=8", "--sequence-length=32")
    status, out, err = rorqual("quantize", model, tmp_path / "gptq", "--method=gptq", "--json", *given)
    assert status == 0, err
    found = json.loads(out)
    assert (found["format"], found["method"], found["calibration_tokens"]) == ("int4", "gptq", 256)
    assert found["perplexity"]["before"] > 1
    assert found["bytes_after"] < found["bytes_before"]
    status, out, err = rorqual("quantize", model, tmp_path / "awq", "--method=awq", *given)
    assert status == 0, err
    for word in ("model.layers.0", "perplexity on", "held-out tokens", "MB →"):
        assert word in out
    status, out, err = rorqual("quantize", model, tmp_path / "fp8", "--format=fp8")
    assert status == 0, err
    assert "perplexity: not measured, since there is no text" in out
    for name in ("gptq", "awq", "fp8"):
        assert rorqual("generate", tmp_path / name, "a", "--max-tokens=2", "--raw")[0] == 0
    one_sentence(rorqual("quantize", model, tmp_path / "x", "--format=fp8", "--method=awq"), "--method awq", "fp8")
    one_sentence(rorqual("quantize", model, tmp_path / "x", "--method=best"), "--method", "rtn, gptq, awq")
    one_sentence(rorqual("quantize", model, tmp_path / "x", "--sequence-length=3"), "--sequence-length 3")
    assert not (tmp_path / "x").exists()


def test_adapters_from_the_command_line(rorqual, recipe, tmp_path):
    from helpers.adapters import save_random_adapter

    assert rorqual("pretrain", recipe())[0] == 0
    model = tmp_path / "tiny" / "model"
    adapter = save_random_adapter(model, tmp_path / "lora", seed=1)
    asked = ("generate", "x", "--raw", "--max-tokens", "12", "--temperature", "0", "--dtype", "float32")

    def answer(*words):
        status, out, err = rorqual(asked[0], *words, *asked[1:])
        assert status == 0, err
        return out

    merged = answer(model, "--adapter", adapter)
    assert merged != answer(model)
    assert answer(adapter) == merged  # its configuration names the model
    assert rorqual("import", adapter, tmp_path / "whole")[0] == 0
    assert answer(tmp_path / "whole") == merged
    assert answer(adapter, "--weights", "int8")
    for words, sentence in (
        (("generate", model, "x", "--adapter", tmp_path), "is not an adapter: no adapter_config.json in it"),
        (("generate", model, "x", "--adapter", adapter, "--weights", "fp8"), "weights that are not quantised"),
        (("serve", model, "--adapters", "a"), "--adapters 'a': must be NAME=DIR"),
        (("serve", model, "--adapters", f"tiny={adapter}"), "the name tiny is taken"),
        (("serve", model, "--adapters", f"a={adapter}", "--replicas", "2"), "--adapters with --replicas 2"),
    ):
        status, _, err = rorqual(*words)
        assert status != 0
        assert sentence in err
        assert len(err.strip().splitlines()) == 1
