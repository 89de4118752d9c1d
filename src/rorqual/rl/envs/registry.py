"""`open_environment(section)`: the environment that a recipe section describes."""

from importlib.metadata import entry_points

from rorqual.errors import UserError
from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.environment import Environment, Problem, ProblemStream, split_of
from rorqual.rl.envs.instructions import Instructions
from rorqual.rl.envs.jsonl import JsonlEnvironment
from rorqual.rl.envs.programs import Programs
from rorqual.rl.envs.python_environment import PythonEnvironment
from rorqual.rl.envs.reasoning_gym import ReasoningGymEnvironment

__all__ = [
    "Environment",
    "JsonlEnvironment",
    "Problem",
    "ProblemStream",
    "PythonEnvironment",
    "ReasoningGymEnvironment",
    "open_environment",
    "split_of",
]
GROUP = "rorqual.environments"
VERIFIERS = "rorqual.rl.envs.verifiers_adapter:Verifiers"


OWN = {"programs": Programs, "instructions": Instructions}  # made here, by name


def open_environment(section: EnvironmentSection) -> Environment:
    """PythonEnvironment where the section has `python` or an installed package offers `name` (entry points of the group
    `rorqual.environments`), JsonlEnvironment where it has a `path`, else one of OWN or reasoning-gym's dataset `name`.

    Raises UserError for an unknown dataset, a config it refuses, an unknown prompt field, a broken file, or Python that
    cannot be loaded.
    """
    if section.path is None and section.python is None:
        offered = [point.value for point in entry_points(group=GROUP, name=section.name)]
        section = section.model_copy(update={"python": offered[0]}) if offered else section
    if section.python is not None:
        adapter, _, identity = section.python.partition(":")
        if adapter == "verifiers":
            config = {"env": identity} | section.config
            section = section.model_copy(update={"python": VERIFIERS, "config": config})
        return PythonEnvironment(section)
    if section.turns or section.turn_tokens:
        raise UserError(f"environment {section.name}: turns and turn_tokens are for Python; leave them out")
    if section.path is not None:
        return JsonlEnvironment(section)
    return OWN.get(section.name, ReasoningGymEnvironment)(section)
