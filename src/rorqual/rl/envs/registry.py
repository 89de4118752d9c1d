"""`open_environment(section)`: the environment that a recipe section describes."""

from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.environment import Environment, Problem, ProblemStream, split_of
from rorqual.rl.envs.instructions import Instructions
from rorqual.rl.envs.jsonl import JsonlEnvironment
from rorqual.rl.envs.programs import Programs
from rorqual.rl.envs.reasoning_gym import ReasoningGymEnvironment

__all__ = [
    "Environment",
    "JsonlEnvironment",
    "Problem",
    "ProblemStream",
    "ReasoningGymEnvironment",
    "open_environment",
    "split_of",
]


OWN = {"programs": Programs, "instructions": Instructions}  # made here, by name


def open_environment(section: EnvironmentSection) -> Environment:
    """JsonlEnvironment where the section has a `path`, else one of OWN or the reasoning-gym dataset `name`.

    Raises UserError for an unknown dataset, a config it refuses, an unknown prompt field or a broken file.
    """
    if section.path is not None:
        return JsonlEnvironment(section)
    return OWN.get(section.name, ReasoningGymEnvironment)(section)
