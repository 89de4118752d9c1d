from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs import knights_knaves
from rorqual.rl.envs.registry import open_environment

TOLD = {
    "names": ["Ava", "Liam"],
    "statements": (("lying", 1), ("->", ("telling-truth", 0), ("not", ("or", ("telling-truth", 1), ("lying", 0))))),
    "knight_knave_terms": {"knight": "saint", "knave": "sinner"},
}


def test_claims_in_few_words():
    expected = "Ava: Liam sinner. Liam: Ava saint -> not (Liam saint or Ava sinner)."
    assert knights_knaves.claims(TOLD) == expected


def test_a_puzzle_with_other_names_is_in_the_same_split():
    other = TOLD | {"names": ["Emma", "Noah"], "knight_knave_terms": {"knight": "angel", "knave": "devil"}}
    assert knights_knaves.key(other) == knights_knaves.key(TOLD)


def test_as_an_environment_it_asks_in_few_words_and_takes_a_short_answer():
    section = EnvironmentSection(name="knights_knaves", config={"n_people": 3}, prompt="who is who? {claims}")
    environment = open_environment(section)
    for problem in environment.problems("train", 20, 1):
        assert problem.question.startswith("who is who? ")
        assert problem.question.count(": ") == 3
        assert problem.difficulty == "people=3"
        terms = problem.metadata["knight_knave_terms"]
        roles = [terms["knight" if honest else "knave"] for honest in problem.metadata["solution"]]
        short = ",".join(f"{name} {role}" for name, role in zip(problem.metadata["names"], roles, strict=True))
        assert environment.correct(problem, short)
        assert not environment.correct(problem, short.replace(roles[0], "elf", 1))
