"""`write(problem, rng)`: the worked solution of a problem, by its family."""

from collections.abc import Callable
from random import Random

from rorqual.rl.envs.environment import Problem
from rorqual.rl.worked.arithmetic import chain_sum, leg_counting, simple_equations
from rorqual.rl.worked.instructions import instructions
from rorqual.rl.worked.logic import knights_knaves
from rorqual.rl.worked.programs import programs
from rorqual.rl.worked.style import Worked
from rorqual.rl.worked.word_problems import gsm_symbolic

# A writer returns None for a problem of a form that it does not know.
WRITERS: dict[str, Callable[[Problem, Random], Worked | None]] = {
    "chain_sum": chain_sum,
    "gsm_symbolic": gsm_symbolic,
    "instructions": instructions,
    "knights_knaves": knights_knaves,
    "leg_counting": leg_counting,
    "programs": programs,
    "simple_equations": simple_equations,
}


def write(problem: Problem, rng: Random) -> Worked | None:
    """None where the problem has a form that its family's writer does not know."""
    return WRITERS[problem.family](problem, rng)
