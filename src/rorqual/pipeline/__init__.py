"""`rorqual r1`: the stages of a pipeline, one after the other, from a model to an R1 of one's own (R1, figure 2)."""

from rorqual.pipeline.run import run_pipeline

__all__ = ["run_pipeline"]
