from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.registry import open_environment

ENVIRONMENT = open_environment(EnvironmentSection(name="programs"))


def test_programs_are_judged_by_their_tests():
    problem = ENVIRONMENT.problems("train", 1, seed=0)[0]
    name = problem.metadata["name"]
    assert f"`{name}(numbers)`" in problem.question
    reply = f"<think>so</think><answer>\n```python\n{problem.answer}\n```\n</answer>"
    assert ENVIRONMENT.read(problem, reply) == problem.answer + "\n"
    assert ENVIRONMENT.correct(problem, ENVIRONMENT.read(problem, reply))
    assert ENVIRONMENT.correct(problem, problem.answer.replace("chosen", "found"))
    assert not ENVIRONMENT.correct(problem, problem.answer.replace("return ", "return None and "))
    assert not ENVIRONMENT.correct(problem, "the sum of the even ones")


def test_problems_of_one_sentence_are_of_one_split():
    train = {p.key for p in ENVIRONMENT.problems("train", 200, seed=0)}
    test = {p.key for p in ENVIRONMENT.problems("test", 60, seed=0)}
    assert not train & test
    assert len(train) > 150
