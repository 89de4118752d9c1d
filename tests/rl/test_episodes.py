"""Episodes of several turns, against tokens and masks written by hand and a model whose words are known."""

import copy
from types import SimpleNamespace

import pytest
import torch

from helpers.killed_runs import KILLS, run_whole_and_killed
from helpers.scripted_models import CHAT, END, LETTER, puppet, vocabulary
from rorqual.checkpoint.huggingface import save_model
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.recipe import RLRecipe, parse_recipe
from rorqual.rl.envs.environment import Environment, Problem, RewardError
from rorqual.rl.envs.registry import open_environment
from rorqual.rl.episodes import sample_rollout
from rorqual.rl.grpo_trainer import GRPOTrainer
from rorqual.rl.mtp_update import predictions
from rorqual.rl.rollout_logprobs import pack_members
from rorqual.rl.turns import Turns

GREEDY = SamplingParams(temperature=0, max_tokens=20, seed=1)
ASKED = Problem("q", "ab", "q", "", "echo")


class Echo(Environment):
    """Says x after the first turn, and nothing after the second."""

    turns = 3

    def candidate(self, seed, index):
        return ASKED

    def check(self, problem, answer):
        return float(answer == problem.answer)

    def respond(self, episode):
        said = sum(m["role"] == "assistant" for m in episode.messages)
        return [{"role": "user", "content": "x"}] if said == 1 else None


class Endless(Echo):
    turns = 2

    def respond(self, episode):
        return [{"role": "user", "content": "x"}]


class Broken(Echo):
    def respond(self, episode):
        raise RewardError("it broke")


def speaker(template=CHAT, **settings):
    """A model that says "ab" in every turn."""
    tokenizer = vocabulary(template=template)
    ids = tokenizer.get_vocab()
    return Engine(puppet(tokenizer, {"<say>": "a", "a": "b"}), tokenizer, **settings), ids


@pytest.mark.parametrize("settings", [{}, {"prefix_cache": True}])
def test_tokens_and_mask_by_hand(settings):
    engine, ids = speaker(**settings)
    (rollout,) = [sample_rollout(engine, [ASKED], "chat", GREEDY, {"echo": Echo("echo", 1.0)})]
    a, b, x, end, turn, say = (ids[t] for t in ("a", "b", "x", END, "<turn>", "<say>"))
    assert rollout.prompts == [[ids["q"], turn, say]]
    assert rollout.completions == [[a, b, end, turn, x, turn, say, a, b, end]]
    assert rollout.sampled == [[True] * 3 + [False] * 4 + [True] * 3]
    assert rollout.lengths.tolist() == [6]
    assert len(rollout.logprobs[0]) == 6
    (sample,) = rollout.samples
    assert (sample.text, sample.length, sample.truncated) == ("ab", 6, False)
    assert [m["content"] for m in sample.messages] == ["q", "ab", "x", "ab"]


def test_an_end_of_turn_of_the_template_is_not_written_twice():
    """Where the model ends its turn as the template does."""
    ended = CHAT.replace("<turn>", END)
    engine, ids = speaker(ended)
    turns = Turns(engine.tokenizer, "chat", engine.end_tokens)
    assert turns.tokens([{"role": "user", "content": "x"}], None, ids[END]) == [ids["x"], ids[END], ids["<say>"]]


def test_marks_in_a_reply_are_text():
    engine, ids = speaker()
    turns = Turns(engine.tokenizer, "chat", engine.end_tokens)
    found = turns.tokens([{"role": "user", "content": "<say>"}], None, ids[END])
    letters = [ids[LETTER[byte]] for byte in b"<say>"]
    assert found == [ids["<turn>"], *letters, ids["<turn>"], ids["<say>"]]


@pytest.mark.parametrize(("max_tokens", "tokens"), [(7, 3), (8, 8), (9, 9), (20, 10)])
def test_limits_end_an_episode_as_truncated(max_tokens, tokens):
    """3 tokens of the model, 4 of the reply, 3 of the model; then its two turns are over."""
    engine, _ = speaker()
    params = SamplingParams(temperature=0, max_tokens=max_tokens, seed=1)
    rollout = sample_rollout(engine, [ASKED], "chat", params, {"echo": Endless("echo", 1.0)})
    assert len(rollout.completions[0]) == tokens
    assert rollout.samples[0].truncated
    assert rollout.sampled[0][-1]


def test_a_limit_of_a_turn():
    engine, _ = speaker()
    environment = Echo("echo", 1.0)
    environment.turn_tokens = 2
    rollout = sample_rollout(engine, [ASKED], "chat", GREEDY, {"echo": environment})
    assert rollout.lengths.tolist() == [2]
    assert rollout.samples[0].truncated


def test_an_episode_that_breaks_off_says_why():
    engine, _ = speaker()
    rollout = sample_rollout(engine, [ASKED], "chat", GREEDY, {"echo": Broken("echo", 1.0)})
    assert rollout.samples[0].error == "it broke"


FORGETS = CHAT.replace("{{ m['content'] }}", "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}")


def test_a_template_that_changes_earlier_turns_is_refused():
    engine, _ = speaker(FORGETS)
    with pytest.raises(UserError, match=r"environment echo: the chat template changes the model's earlier turns"):
        Turns(engine.tokenizer, "chat", engine.end_tokens).check(Echo("echo", 1.0))


# -- training

SEVENS = '''
from rorqual.rl.envs.tools import python

class Sevens:
    """After the model's turn a program in the sandbox counts its letters; the more sevens, the better."""

    turns = 3

    def problem(self, rng):
        return {"question": f"{rng.randrange(1000)}?"}

    def reply(self, text, state, rng):
        state["turns"] = state.get("turns", 0) + 1
        if state["turns"] == 2:
            return None
        return python(f"print({len(text)} % 7, random.randrange(3))", rng)

    def reward(self, messages):
        said = "".join(m["content"] for m in messages if m["role"] == "assistant")
        return said.count("7") / (1 + len(said)) + len(said) / 1000
'''


def recipe(folder, path, **fields):
    (folder / "sevens.py").write_text(SEVENS)
    sizes = {"group_size": 4, "questions_per_step": 3, "max_tokens": 40, "micro_tokens": 256, "kl": 0.0}
    return {
        "name": "run",
        "out": str(folder),
        "seed": 3,
        "model": {"path": str(path)},
        "environments": [{"name": "sevens", "python": f"{folder / 'sevens.py'}:Sevens", "turn_tokens": 12}],
        "template": "plain",
        "steps": 20,
        "reward": {"format": 0.0},
        "optimizer": {"lr": 0.01},
        "grpo": sizes | fields.pop("grpo", {}),
    } | fields


def trainer(model, tokenizer, folder, **fields):
    checked = parse_recipe(recipe(folder, "unused", **fields), RLRecipe)
    return GRPOTrainer(model, tokenizer, [open_environment(s) for s in checked.environments], checked)


@pytest.fixture
def ends_soon(dense, tokenizer):
    """Turns of different lengths, most of which the model ends itself."""
    dense.head_weight.data[tokenizer.eos_token_id] *= 6
    return dense


def test_allowed_tokens_are_kept_of_every_turn():
    engine, ids = speaker()
    params = SamplingParams(temperature=1.0, top_p=0.5, max_tokens=20, seed=1, record_allowed=True)
    rollout = sample_rollout(engine, [ASKED], "chat", params, {"echo": Echo("echo", 1.0)})
    (allowed,) = rollout.allowed
    chosen = [t for t, own in zip(rollout.completions[0], rollout.sampled[0], strict=True) if own]
    assert rollout.lengths.tolist() == [len(chosen)]
    mask = allowed.mask(torch.arange(len(chosen)))
    assert mask.shape == (len(chosen), len(ids))
    assert mask[torch.arange(len(chosen)), torch.tensor(chosen)].all()
    assert not mask.all()


def test_the_multi_token_module_predicts_within_a_turn():
    """Of four sampled tokens, two by two, only the last stands two places after the first of its turn's."""
    sequence, source = torch.zeros(4, dtype=torch.long), torch.tensor([5, 6, 9, 10])
    packed = SimpleNamespace(sequence=sequence, source=source, targets=torch.tensor([20, 21, 22, 23]))
    rows, targets = predictions(packed, 1)
    assert (rows.tolist(), targets.tolist()) == ([9], [23])


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_what_is_trained_on_is_what_was_sampled(ends_soon, tokenizer, tmp_path, mini_batches):
    toy = trainer(ends_soon, tokenizer, tmp_path, grpo={"mini_batches": mini_batches})
    toy.model.eval()
    rollout = toy.rollouts.next(0).rollout
    assert any(not all(mask) for mask in rollout.sampled)
    members = list(range(len(rollout.completions)))
    flat = [
        token
        for tokens, mask in zip(rollout.completions, rollout.sampled, strict=True)
        for token, own in zip(tokens, mask, strict=True)
        if own
    ]
    targets, sequence = torch.full((len(flat),), -1), torch.full((len(flat),), -1)
    for packed in pack_members(rollout, members, toy.section, toy.model):
        targets[packed.offset], sequence[packed.offset] = packed.targets, packed.sequence
    assert targets.tolist() == flat
    assert torch.bincount(sequence).tolist() == rollout.lengths.tolist()
    # Under the model that sampled them, by a plain pass over all tokens, replies included.
    with torch.no_grad():
        for i, (tokens, mask) in enumerate(zip(rollout.completions, rollout.sampled, strict=True)):
            prompt = rollout.prompts[i // 4]
            logp = toy.model.logits(torch.tensor([prompt + tokens]))[0].log_softmax(-1)
            own = [float(logp[len(prompt) + k - 1, t]) for k, t in enumerate(tokens) if mask[k]]
            assert rollout.logprobs[i] == pytest.approx(own, abs=1e-4)
        before = toy.update.logprobs_before(rollout, members)
    assert [p for row in before for p in row] == pytest.approx([p for row in rollout.logprobs for p in row], abs=1e-4)
    metrics = toy.step()
    assert 1 < metrics.rollout.turns <= 2
    assert metrics.update.grad_norm > 0


@pytest.mark.slow
def test_an_environment_with_a_tool_is_learnt(ends_soon, tokenizer, tmp_path):
    toy = trainer(ends_soon, tokenizer, tmp_path, grpo={"questions_per_step": 6, "group_size": 6})
    rewards = [toy.step().rollout.reward for _ in range(40)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


@pytest.mark.parametrize("kills", [2, KILLS[1]])
def test_kills_change_nothing_where_there_are_tools(ends_soon, tokenizer, tmp_path, kills):
    save_model(ends_soon, tmp_path / "start", tokenizer)
    paths = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        fields = recipe(tmp_path / name, tmp_path / "start", save_every=2)
        paths.append(tmp_path / name / "recipe.toml")
        paths[-1].write_text(toml(fields))
    run_whole_and_killed("rl", "rorqual.rl.rl_run", *paths, kills)
    whole, killed = ((tmp_path / n / "run" / "model" / "model.safetensors").read_bytes() for n in ("whole", "killed"))
    assert whole == killed
    assert whole != (tmp_path / "start" / "model.safetensors").read_bytes()


def toml(fields):
    """A recipe as TOML: tables of plain values, and the one environment."""
    (environment,) = fields.pop("environments")
    tables = {name: value for name, value in fields.items() if isinstance(value, dict)}
    lines = [f"{name} = {plain(value)}" for name, value in fields.items() if name not in tables]
    for name, table in (*tables.items(), ("[environments]", environment)):
        lines += [f"[{name}]", *(f"{key} = {plain(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def plain(value):
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_a_copy_of_a_step_is_the_same_step(ends_soon, tokenizer, tmp_path):
    """Whatever the engine has allocated before."""
    first, second = (trainer(copy.deepcopy(ends_soon), tokenizer, tmp_path) for _ in range(2))
    second.engine.generate([[5] * 300], SamplingParams(max_tokens=50, seed=0))
    for toy in (first, second):
        toy.model.eval()
    one, other = (toy.rollouts.next(0).rollout for toy in (first, second))
    assert one.completions == other.completions
    assert one.logprobs == other.logprobs
