"""`rorqual reward`: pairs from a file or made by rule, to a released reward model."""

import json
from random import Random

import pytest
import torch

from helpers.training import stopped_after
from rorqual.checkpoint.huggingface import load_reward_model, save_model
from rorqual.cli.entry import main
from rorqual.data.preference_pairs import ConversationEncoder
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.model.reward_model import RewardModel
from rorqual.recipe import RewardRecipe, TokenizerSection, parse_recipe
from rorqual.rl import written_pairs
from rorqual.rl.reward_training import dry_run_text, reward
from rorqual.rl.written_pairs import cut_off, pair_rows, repeated, whole_answer
from rorqual.train.reward_run import _padding, read_result


@pytest.fixture
def made(tmp_path, dense, tokenizer):
    """Makes recipes: of pairs in which digits are better than letters."""
    save_model(dense, tmp_path / "start", tokenizer)
    pairs = [{"prompt": f"{n}?", "chosen": f"{n} {n + k}", "rejected": "abcd"[k]} for n in range(20) for k in range(2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def make(name="reward", **fields):
        raw = {
            "name": name, "out": str(tmp_path / "runs"), "model": {"path": str(tmp_path / "start")},
            "data": {"path": str(tmp_path / "pairs.jsonl"), "valid_fraction": 0.2, "sequence_length": 64},
            "optimizer": {"lr": 3e-3},
            "train": {"epochs": 3, "batch_size": 4, "eval_every": 5, "save_every": 5, "threads": 1},
        }  # fmt: skip
        return parse_recipe(raw | fields, RewardRecipe)

    return make


def logged(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_reward_model_tells_the_better_answers(made, tokenizer):
    run_dir = reward(made())
    result = read_result(run_dir)
    assert result["valid_accuracy"] == 1.0
    assert result["pairs"] + result["held_out"] == 40
    lines = logged(run_dir)
    assert 0.4 < lines[0]["loss"] < 1.5
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    assert [line["step"] for line in lines if "valid_accuracy" in line] == [5, 10, 15, 20, 25, lines[-1]["step"]]
    model = load_reward_model(run_dir / "model").eval()
    read = ConversationEncoder(tokenizer)
    prompt = {"role": "user", "content": "99?"}
    tokens = [read([prompt, {"role": "assistant", "content": answer}]) for answer in ("99 99", "c")]
    with torch.no_grad():
        better, worse = (float(model.scores(model(torch.tensor([t]))[0, -1])) for t in tokens)
    assert better > model.score_mean > worse
    assert (model.score_mean, model.score_std) == (result["score_mean"], result["score_std"])
    config = json.loads((run_dir / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["num_labels"] == 1
    assert "pad_token_id" not in config  # the only one there is ends conversations
    card = (run_dir / "model" / "README.md").read_text()
    assert f"| accuracy | 100.0 % of {result['held_out']} held-out pairs right |" in card
    assert "pipeline_tag: text-classification" in card
    ledger = json.loads((run_dir / "ledger.json").read_text())
    assert set(ledger["stages"]) == {"reward"}
    assert ledger["predicted"]["flops"] > 0


def test_padding_is_no_end_token(dense):
    section = TokenizerSection(vocab_size=270, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = train_tokenizer(["a b"], section)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    name, config = _padding(tokenizer, RewardModel.of(dense))
    assert name == tokenizer.convert_ids_to_tokens(config.pad_token_id)
    assert config.pad_token_id not in (tokenizer.eos_token_id, *dense.released.end_tokens)


def test_a_stopped_run_ends_the_same(made):
    whole = reward(made("a", model={"path": made().model.path, "dtype": "bfloat16"}))
    recipe = made("b", model={"path": made().model.path, "dtype": "bfloat16"})
    with stopped_after(8):
        reward(recipe)
    with pytest.raises(UserError, match=r"already holds a run; continue it with --resume"):
        reward(recipe)
    run_dir = reward(recipe, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (run_dir / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    dropped = {"seconds", "tokens_per_second", "utilisation", "memory_gb"}
    kept = [[{k: v for k, v in line.items() if k not in dropped} for line in logged(d)] for d in (run_dir, whole)]
    assert kept[0] == kept[1]
    assert read_result(run_dir) == read_result(whole)


def test_the_command(made, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "reward.toml"
    recipe.write_text(
        f'kind = "reward"\nname = "c"\nout = "{tmp_path}/runs"\nmodel.path = "{made().model.path}"\n'
        f'data.path = "{tmp_path}/pairs.jsonl"\ntrain = {{ steps = 2, batch_size = 2 }}\n'
    )

    def run(*words):
        monkeypatch.setattr("sys.argv", ["rorqual", *words])
        with pytest.raises(SystemExit) as e:
            main()
        assert not e.value.code
        return capsys.readouterr().out

    said = run("reward", str(recipe), "--dry-run")
    assert "memory " in said
    assert "pairs        34, of " in said
    assert not (tmp_path / "runs").exists()
    assert "training" in run("plan", str(recipe), "--gpu", "cpu")
    assert " held-out pairs right" in run("reward", str(recipe), "data.valid_fraction=0.3").splitlines()[-1]


def test_the_plan_counts_no_language_head(made, dense):
    recipe, config = made(), dense.config
    text = dry_run_text(recipe)
    assert "compute" in text
    from rorqual.plan.cost import flops_per_token
    from rorqual.plan.reward_here import predict_reward

    plan = predict_reward(config, recipe, rows=32, length=20)
    head = 6 * config.hidden_size * (config.vocab_size - 1)
    assert plan["flops_per_token"] == pytest.approx(flops_per_token(config, 20) - head)
    assert plan["tokens"] == 3 * 32 * 20


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"data": {}}, r"give either data.path \(a file of pairs\) or \[pairs\]"),
        ({"pairs": {"prompts": "p", "model": "m"}}, r"give either data.path"),
        ({"data": {"path": "p", "valid": 0.1}}, r"field data.valid is unknown; did you mean one of .*valid_fraction"),
        ({"data": {}, "pairs": {"prompts": "p", "model": "m", "twins": 5}}, r"pairs.twins = 5: "),
        ({"data": {}, "pairs": {"prompts": "p"}}, r"field pairs.model is missing; add it"),
        ({"lora": {"rank": 2}}, r"field lora is unknown"),
        ({"train": {"steps": 1, "compile": True}}, r"train.compile: batches of pairs differ in length"),
    ],
)
def test_recipes_that_are_refused(made, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        made(**fields)


def test_a_start_that_is_none(made, tmp_path):
    with pytest.raises(UserError, match=r"model.path is missing: this recipe starts from a trained model"):
        reward(made(model={"config": {"hidden_size": 8}}))
    run_dir = reward(made("first", train={"steps": 1}))
    with pytest.raises(UserError, match=r"is a reward model .*; give a language model"):
        reward(made("second", model={"path": str(run_dir / "model")}))
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(UserError, match=r"pairs\.jsonl has no lines"):
        reward(made("third"))


def test_twins():
    text = "First one. Second one.\n\nThird, and last."
    assert repeated(text, Random(0)).split("\n\n").count("Third, and last.") == 2
    assert repeated("One.", Random(0)) == "One.\n\nOne."
    long = " ".join(f"word{n}." for n in range(20))
    for seed in range(20):
        cut = cut_off(long, Random(seed)) or ""
        assert long.startswith(cut)
        assert 6 <= len(cut.split()) <= 16
        assert not cut.endswith(".")
    assert cut_off("Too short to cut.", Random(0)) is None
    assert whole_answer("<think>a</think>Yes. It is so. But", True) == "Yes. It is so."
    assert whole_answer("<think>a</think><answer>Yes</answer>", False) == "Yes"
    assert whole_answer("<think>never said", True) is None
    assert whole_answer("no end", True) is None


def test_rows_of_pairs():
    answers = [(f"prompt {n}", f"This is the answer number {n} of all.", f"hot {n}") for n in range(6)]
    answers += [("silent", None, "hot"), ("same", answers[0][1], answers[0][1])]
    rows = pair_rows(answers, 4, seed=1)
    assert rows == pair_rows(answers, 4, seed=1)
    assert {row["prompt"] for row in rows} == {*[f"prompt {n}" for n in range(6)], "same"}
    assert len(rows) == 6 * 4 + 3  # what was sampled hot is the answer itself once
    assert all(row["chosen"] != row["rejected"] for row in rows)
    for row in rows:
        if row["twin"] == "off-topic":
            assert row["rejected"] in {answer for _, answer, _ in answers}
    two = pair_rows(answers, 2, seed=1)
    assert len(two) == 14
    assert {row["twin"] for row in two} == {"off-topic", "cut-off", "repeated", "hot"}


def test_pairs_made_from_prompts_and_resumed(made, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(5)))
    section = {"prompts": str(tmp_path / "prompts.jsonl"), "model": made().model.path, "max_tokens": 12, "hot": 3.0}
    monkeypatch.setattr(written_pairs, "AT_ONCE", 2)
    monkeypatch.setattr(  # random models end no sentence
        written_pairs, "whole_answer", lambda text, truncated: text.removeprefix("say").replace("<think>", "") + " ok"
    )

    def recipe(name):
        return made(name, data={"sequence_length": 256}, pairs=section, train={"steps": 2, "batch_size": 2})

    assert "sampling     about" in dry_run_text(recipe("a"))
    whole = reward(recipe("a"))
    rows = [json.loads(line) for line in (whole / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 5
    assert not (whole / "samples.partial.jsonl").exists()
    calls = []
    generate = written_pairs.Engine.generate

    def killed(self, *arguments):
        if len(calls) == 2:
            raise RuntimeError("killed here")
        calls.append(1)
        return generate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(written_pairs.Engine, "generate", killed)
        with pytest.raises(RuntimeError, match="killed here"):
            reward(recipe("b"))
    with (tmp_path / "runs" / "b" / "samples.partial.jsonl").open("a") as file:
        file.write('["cut sh')
    monkeypatch.setattr(written_pairs.Engine, "generate", lambda *a: calls.append(1) or generate(*a))
    run_dir = reward(recipe("b"), resume=True)
    assert len(calls) == 3  # of three sampling calls each one once
    assert (run_dir / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    name = "model/model.safetensors"
    assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
    assert ModelConfig.load(run_dir / "model").tie_word_embeddings
