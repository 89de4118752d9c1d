import pytest

from rorqual.errors import UserError
from rorqual.recipe import RewardSection
from rorqual.rl import rewards
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.rewards import Sample


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>1</answer>", 1),
        (" <think>a\nb</think>\n<answer>1</answer>\n", 1),
        ("<think>a</think>so <answer>1</answer>", 0),
        ("<think>a</think><answer>1</answer> done", 0),
        ("<think></think><answer>1</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a<think>b</think><answer>1</answer>", 0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0),
        ("a</think><answer>1</answer>", 0),
        ("1", 0),
    ],
)
def test_format(text, reward):
    assert rewards.format_reward(text) == reward


@pytest.mark.parametrize(
    ("text", "target", "reward"),
    [
        ("<think>one two three</think><answer>四</answer>", "en", 1.0),
        ("<think>one two 三四</think>", "en", 0.5),
        ("<think>one two 三四</think>", "zh", 0.5),
        ("<think>我们 think</think>", "zh", 2 / 3),
        ("<think>x1 = 5²</think>", "en", 1.0),
        ("<think>12 + 30</think>", "zh", 1.0),
        ("да нет yes", "ru", 2 / 3),
        ("café naïve", "fr", 1.0),
    ],
)
def test_language(text, target, reward):
    assert rewards.language_reward(text, target) == pytest.approx(reward)


def test_unknown_language():
    with pytest.raises(UserError, match=r"reward.target_language = 'tlh'"):
        rewards.language_reward("a", "tlh")


@pytest.mark.parametrize(("length", "reward"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (120, -1.0)])
def test_length(length, reward):
    assert rewards.length_reward(length, 100) == pytest.approx(reward)


def test_truncation_costs_everything():
    assert rewards.length_reward(10, 100, truncated=True) == -1.0


@pytest.mark.parametrize(
    ("text", "correct", "reward"),
    [
        ("<think>1 ✗ 2 ✓</think>", True, 1.0),
        ("<think>1 ✗ 2 ✓</think>", False, -1.0),
        ("<think>1 ✓ 2 ✗</think>✓", True, 0.0),
        ("<think>1 ✗</think>", False, 0.0),
        ("<think>1</think>", True, 0.0),
    ],
)
def test_verdict(text, correct, reward):
    assert rewards.marked_verdict(Sample(None, text, 1, False), correct) == reward


class Equal(Environment):
    def candidate(self, seed, index):
        return None

    def check(self, problem, answer):
        return float(answer == problem.answer)


def sample(text, length=10):
    return Sample(Problem("q", "3", "k", "", "sums"), text, length, length == 100)


GOOD, WRONG, BARE = "<think>a ✓</think><answer>3</answer>", "<think>a ✓</think><answer>4</answer>", "I cannot say"


def test_total_is_the_weighted_sum_and_parts_stay_apart():
    section = RewardSection(accuracy=2.0, format=0.5, length=1.0, verdict=0.25)
    found = rewards.score([sample(GOOD), sample(WRONG, 100), sample(BARE)], {"sums": Equal("sums", 1.0)}, section, 100)
    assert found.parts["accuracy"].tolist() == [1, 0, 0]
    assert found.parts["format"].tolist() == [1, 1, 0]
    assert found.parts["length"].tolist() == [0, -1, 0]
    assert found.parts["verdict"].tolist() == [1, -1, 0]
    assert "language" not in found.parts
    assert found.total.tolist() == pytest.approx([2.75, -0.75, 0.0])
    assert found.correct.tolist() == [True, False, False]


def test_a_truncated_answer_is_not_right():
    found = rewards.score([sample(GOOD, 100)], {"sums": Equal("sums", 1.0)}, RewardSection(), 100)
    assert not found.correct.any()
    assert found.parts["accuracy"].tolist() == [0]


def test_accuracy_is_known_even_where_it_does_not_count():
    found = rewards.score([sample(GOOD)], {"sums": Equal("sums", 1.0)}, RewardSection(accuracy=0.0), 100)
    assert found.parts["accuracy"].tolist() == [1]
    assert found.total.tolist() == [1]  # format alone


def test_another_verdict_can_be_plugged_in():
    section = RewardSection(accuracy=0.0, format=0.0, verdict=1.0)
    environments = {"sums": Equal("sums", 1.0)}
    found = rewards.score([sample(GOOD)], environments, section, 100, verdict=lambda s, correct: 7.0 * correct)
    assert found.total.tolist() == [7.0]
