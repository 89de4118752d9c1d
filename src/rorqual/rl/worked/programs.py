"""Worked solutions of small programs: what is to be returned, part by part, and the code tried on an example."""

from random import Random

from rorqual.rl.envs.environment import Problem
from rorqual.rl.envs.programs import solution
from rorqual.rl.worked.style import OPENINGS, Worked


def programs(problem: Problem, rng: Random) -> Worked:
    name = problem.metadata["name"]
    choice, each, result = problem.metadata["parts"]
    code = solution(name, choice, each, result)
    numbers = [rng.randint(-9, 12) for _ in range(rng.randint(3, 5))]
    condition = f" if {choice.code}" if choice.code else ""
    kept = [n for n in numbers if not choice.code or eval(choice.code, {"n": n})]  # our own code
    chosen = [eval(each.code, {"n": n}) for n in kept]
    lines = [rng.choice(OPENINGS)]
    if choice.code:
        lines.append(f"Which numbers: {choice.words}. In Python that is the condition {choice.code}.")
    else:
        lines.append("Which numbers: all of them.")
    if each.words:
        lines.append(f"Of each I need {each.words.removeprefix('the ').removesuffix(' of ').strip()}: {each.code}.")
    lines.append(f"So chosen = [{each.code} for n in numbers{condition}].")
    lines.append(f"The result is {result.code}.")
    value = eval(result.code, {"chosen": chosen})
    lines.append(f"I try it with {numbers}: chosen is {chosen}, so the function returns {value}.")
    return Worked("\n".join(lines), f"\n```python\n{code}\n```\n")
