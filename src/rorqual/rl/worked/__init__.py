"""Worked solutions: a chain of thought in words, with checks and corrections, for problems of a few families.

They are the cold start of R1 (R1 §2.3.1): a few thousand long solutions in a form that people like to read, on which a
model is fine-tuned before reinforcement learning. A fifth of them hold a slip that a later check finds. Everything
else that they say is true, which the tests check line by line.
"""

from rorqual.rl.worked.writers import WRITERS, Worked, write

__all__ = ["WRITERS", "Worked", "write"]
