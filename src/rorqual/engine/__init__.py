"""Inference engine: paged KV cache, continuous batching, sampling and speculative decoding."""

from rorqual.engine.engine import Engine
from rorqual.engine.grammar import Grammar
from rorqual.engine.outputs import Completion
from rorqual.engine.sampling_params import SamplingParams

__all__ = ["Completion", "Engine", "Grammar", "SamplingParams"]
