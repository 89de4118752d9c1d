"""Generation: a cache of the past, slots that sequences enter and leave, and a sampler."""

from rorqual.engine.engine import Completion, Engine
from rorqual.engine.grammar import Grammar
from rorqual.engine.sampling_params import SamplingParams

__all__ = ["Completion", "Engine", "Grammar", "SamplingParams"]
