"""The front door to problems: `open_environment(section)`."""

from rorqual.reason.gym import ReasoningGymEnvironment
from rorqual.reason.jsonl import JsonlEnvironment
from rorqual.reason.problems import Environment, Problem, ProblemStream, split_of
from rorqual.recipe import EnvironmentSection

__all__ = [
    "Environment",
    "JsonlEnvironment",
    "Problem",
    "ProblemStream",
    "ReasoningGymEnvironment",
    "open_environment",
    "split_of",
]


def open_environment(section: EnvironmentSection) -> Environment:
    """A file of questions and answers where the section has a `path`, else the reasoning-gym dataset called `name`.

    Raises UserError for an unknown dataset, a config it refuses, an unknown prompt field or a broken file.
    """
    return JsonlEnvironment(section) if section.path is not None else ReasoningGymEnvironment(section)
