"""llama.cpp through its low-level API; the high-level loop of its Python package slows it by a third.

Imported in a process of its own only (workers.py): it may be missing, or built for another processor and die.
"""

import ctypes
import math
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ll: Any = import_module("llama_cpp")  # whose pointers may be None to the checker
QUIET = ll.llama_log_callback(lambda level, text, data: None)
ll.llama_log_set(QUIET, ctypes.c_void_p(0))
TYPES = {"Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0}


def requantise(source: Path, dest: Path, kind: str) -> None:
    """The same weights in another of its formats, head included."""
    params = ll.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.pure = TYPES[kind], True, True
    params.nthread = os.cpu_count() or 1
    if ll.llama_model_quantize(str(source).encode(), str(dest).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not write {dest}")


class Llama:
    """A model and a context for so many sequences of so many tokens."""

    def __init__(self, path: Path, threads: int, context: int = 1024, sequences: int = 1) -> None:
        self._model = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context * sequences, 512, 512, sequences
        params.n_threads = params.n_threads_batch = threads
        self._context = ll.llama_init_from_model(self._model, params)
        self.words = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        self._batch = ll.llama_batch_init(512, 0, 1)

    def close(self) -> None:
        ll.llama_batch_free(self._batch)
        ll.llama_free(self._context)
        ll.llama_model_free(self._model)

    def clear(self) -> None:
        ll.llama_memory_clear(ll.llama_get_memory(self._context), True)

    def feed(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Tokens as (id, place, sequence, whether logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, place, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, wanted
            batch.seq_id[i][0] = sequence
        if ll.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def logits(self, i: int) -> np.ndarray:
        """After the i-th token of the last batch."""
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(self._context, i), (self.words,))

    def prefill(self, prompt: list[int]) -> float:
        """Seconds to the first token."""
        self.clear()
        start = time.perf_counter()
        piece: list[int] = []
        for first in range(0, len(prompt), 512):
            piece = prompt[first : first + 512]
            last = first + len(piece) == len(prompt)
            self.feed([(t, first + i, 0, last and i == len(piece) - 1) for i, t in enumerate(piece)])
        self.logits(len(piece) - 1).argmax()
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], count: int) -> float:
        """Greedy tokens a second, `count` for each of the prompts at once, after the first."""
        self.clear()
        newest = []
        for s, prompt in enumerate(prompts):
            self.feed([(t, i, s, i == len(prompt) - 1) for i, t in enumerate(prompt)])
            newest.append(int(self.logits(len(prompt) - 1).argmax()))
        start = time.perf_counter()
        for k in range(count - 1):
            self.feed([(t, len(prompts[s]) + k, s, True) for s, t in enumerate(newest)])
            newest = [int(self.logits(s).argmax()) for s in range(len(prompts))]
        return len(prompts) * (count - 1) / (time.perf_counter() - start)

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Of every token given those before it, in windows that the caller has cut: [n - 1]."""
        self.clear()
        found = []
        for first in range(0, len(tokens) - 1, 512):
            piece = tokens[first : min(first + 512, len(tokens) - 1)]
            self.feed([(t, first + i, 0, True) for i, t in enumerate(piece)])
            for i in range(len(piece)):
                x = self.logits(i).astype(np.float64)
                top = x.max()
                found.append(x[tokens[first + i + 1]] - top - np.log(np.exp(x - top).sum()))
        return np.array(found)


class Writer:
    """Writes the formats that it is asked for."""

    def write(self, source: Path, dest: Path, kind: str) -> bool:
        requantise(source, dest, kind)
        return True


class Side:
    """With a context for one long sequence and one for many short ones, which is its fastest for each."""

    def __init__(self, path: Path, threads: int) -> None:
        self.one, self.many = Llama(path, threads), Llama(path, threads, context=256, sequences=32)

    def prefill(self, prompt: list[int]) -> float:
        return self.one.prefill(prompt)

    def decode(self, prompts: list[list[int]], count: int) -> float:
        return (self.one if len(prompts) == 1 else self.many).decode(prompts, count)

    def quality(self, windows: list[list[int]]) -> list[float]:
        """Perplexity."""
        found = [float(x) for window in windows for x in self.one.log_probabilities(window)]
        return [math.exp(-sum(found) / len(found))]
