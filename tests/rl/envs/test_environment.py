import pytest

from rorqual.errors import UserError
from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.environment import CACHED_CHUNKS, CHUNK
from rorqual.rl.envs.registry import open_environment, split_of

COUNTDOWN = {"min_numbers": 3, "max_numbers": 3, "max_value": 30, "min_target": 1, "max_target": 99}
SMALL = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


def environment(name="countdown", config=COUNTDOWN, **fields):
    return open_environment(EnvironmentSection(name=name, config=config, **fields))


def numbers_in(problem):
    return tuple(sorted(problem.metadata["numbers"]))


def test_no_number_multiset_is_in_two_splits():
    countdown, found = environment(), {}
    for split in ("train", "dev", "test"):
        # Different seeds and prompts, as stages have them, must not matter.
        problems = countdown.problems(split, 2000 if split == "train" else 400, seed=len(split))
        found[split] = {numbers_in(p) for p in problems}
        assert len({p.question for p in problems}) == len(problems)
    assert not found["train"] & found["test"]
    assert not found["train"] & found["dev"]
    assert not found["dev"] & found["test"]


def test_countdown_splits_by_numbers_whatever_the_target():
    by_numbers = {}
    for problem in environment().problems("train", 500):
        by_numbers.setdefault(numbers_in(problem), set()).add(problem.metadata["target"])
    assert max(map(len, by_numbers.values())) > 1
    assert all(p.key == " ".join(map(str, numbers_in(p))) for p in environment().problems("dev", 50))


def test_other_datasets_share_no_question_either():
    sums = environment("chain_sum", SMALL)
    texts = {split: {p.key for p in sums.problems(split, 150)} for split in ("train", "dev", "test")}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["dev"]


def test_shares_of_the_splits():
    counts = {"train": 0, "dev": 0, "test": 0}
    for n in range(20_000):
        counts[split_of(f"{n} {n + 1}")] += 1
    assert counts["train"] / 20_000 == pytest.approx(0.8, abs=0.02)
    assert counts["dev"] / 20_000 == pytest.approx(0.1, abs=0.01)


def test_same_seed_same_problems():
    first, again = (environment().problems("test", 50, seed=3) for _ in range(2))
    assert [p.question for p in first] == [p.question for p in again]
    assert [p.question for p in environment().problems("test", 50, seed=4)] != [p.question for p in first]


def test_a_stream_resumes_from_its_index():
    stream = environment().stream("train", seed=5)
    for _ in range(100):
        next(stream)
    index = stream.index
    expected = [next(stream).question for _ in range(100)]
    resumed = environment().stream("train", seed=5, index=index)
    assert [next(resumed).question for _ in range(100)] == expected


def test_too_few_problems_says_how_many():
    with pytest.raises(UserError, match=r"1000 distinct test problems .* only \d+ exist"):
        environment("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}).problems(
            "test", 1000
        )


def test_prompt_is_a_format_over_the_metadata():
    problem = environment(prompt="make {target} from {numbers}").problems("dev", 1)[0]
    numbers = " ".join(map(str, problem.metadata["numbers"]))
    assert problem.question == f"make {problem.metadata['target']} from {numbers}"


@pytest.mark.parametrize(
    "prompt", ["make {goal}", "make {}", "make {target", "{answer}", "{target:{width}}", "{target.x}"]
)
def test_bad_prompt_is_one_sentence(prompt):
    with pytest.raises(UserError, match="environment countdown: prompt") as error:
        environment(prompt=prompt)
    assert "\n" not in str(error.value)


def test_the_prompt_does_not_move_a_problem_to_another_split():
    plain = {p.metadata["question"]: p.split for p in environment().problems("train", 200, seed=1)}
    for problem in environment(prompt="{question} Think first.").problems("train", 200, seed=1):
        assert plain[problem.metadata["question"]] == problem.split


def test_the_chunk_that_is_asked_for_is_kept_however_old():
    sums = environment("chain_sum", SMALL)
    sums.chunked(0, 0)
    for chunk in range(CACHED_CHUNKS - 2):  # so that of seed 0 only the chunk ahead is left, the oldest of all
        sums.chunked(1, chunk * CHUNK)
    assert next(iter(sums._chunks)) == (0, 1)
    assert sums.chunked(0, CHUNK) == environment("chain_sum", SMALL).candidate(0, CHUNK)
    assert len(sums._chunks) == CACHED_CHUNKS
