from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs import graph_coloring
from rorqual.rl.envs.registry import open_environment

PUZZLE = {"vertices": [0, 1, 2, 3], "edges": [(0, 1), (1, 2), (0, 2), (1, 3)], "num_colors": 3}


def test_a_graph_in_few_words():
    assert graph_coloring.before(PUZZLE) == {0: [], 1: [0], 2: [0, 1], 3: [1]}
    assert graph_coloring.neighbors(PUZZLE) == "0,1(0),2(0,1),3(1)"


def test_as_an_environment_the_short_prompt_tells_the_whole_graph():
    config = {"min_num_vertices": 4, "max_num_vertices": 7, "edge_probability": 0.4}
    environment = open_environment(EnvironmentSection(name="graph_color", config=config, prompt="color {neighbors}"))
    difficulties = set()
    for problem in environment.problems("train", 40, 1):
        told = problem.question.removeprefix("color ")
        puzzle = problem.metadata["puzzle"]
        assert told == graph_coloring.neighbors(puzzle)
        assert sum(map(len, graph_coloring.before(puzzle).values())) == len(puzzle["edges"])
        difficulties.add(problem.difficulty)
    assert difficulties == {f"num_vertices={n}" for n in (4, 5, 6, 7)}
