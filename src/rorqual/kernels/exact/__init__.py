"""Functions whose bits depend on a row's own numbers alone: not on the other rows, on packing, on where keys are
stored, on threads, or on the class of processor. FP32 on a CPU. Rollouts and training on them agree bit for bit
(docs/rl.md).

Each has a plain reference in PyTorch that gives the same bits, slowly; gradients are those of the ordinary functions.
"""
