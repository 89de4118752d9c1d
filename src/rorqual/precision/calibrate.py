"""Runs windows of text through a network block by block, and collects what its linears receive.

n windows of T tokens, D hidden, K inputs of a linear, M rows, E experts.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from rorqual.kernels.linear import linear
from rorqual.model import Transformer
from rorqual.model.layers import Linear
from rorqual.model.moe import MixtureOfExperts, Router
from rorqual.model.rope import rope_frequencies, rope_table
from rorqual.model.transformer import Block, Layer, MultiTokenModule
from rorqual.shapes import Float32, Int

BATCH_TOKENS = 2048  # of a pass


class HiddenStates:
    """The hidden states of some windows between two blocks, in FP32."""

    def __init__(self, model: Transformer, windows: Int[Tensor, "n T"]) -> None:
        self.model = model
        length = windows.shape[1]
        self.tokens = windows.split(max(1, BATCH_TOKENS // length))
        self.table = rope_table(torch.arange(length).unsqueeze(0), *rope_frequencies(model.config), torch.float32)
        self.states = [model.model.embed_tokens(tokens).float() for tokens in self.tokens]
        self.norm = copy.deepcopy(model.model.norm).float()

    def through(self, block: Block, index: int) -> Iterator[Float32[Tensor, "b T D"]]:
        """The outputs of a block in FP32, batch by batch; `index`: its place among the network's blocks."""
        depth = index - self.model.config.num_hidden_layers
        for tokens, x in zip(self.tokens, self.states, strict=True):
            if isinstance(block, Layer):
                yield block(x, self.table, None, None, None)
            elif isinstance(block, MultiTokenModule):  # reads the token that the depth before has predicted
                embedded = self.model.model.embed_tokens(tokens.roll(-1 - depth, dims=1)).float()
                yield block(self.norm(x) if depth == 0 else x, embedded, self.table, None, None, None)

    def advance(self, block: Block, index: int) -> None:
        self.states = list(self.through(block, index))

    def loss(self) -> float:
        """Mean negative log-probability of a window's tokens but the first, in nats, after the last layer."""
        head = self.model.head_weight.float()
        total, count = 0.0, 0
        for tokens, x in zip(self.tokens, self.states, strict=True):
            for row, following in zip(self.norm(x), tokens[:, 1:], strict=True):  # a row's logits in memory at a time
                logprobs = linear(row[:-1], head).log_softmax(-1).gather(-1, following.unsqueeze(-1))
                total, count = total - float(logprobs.double().sum()), count + len(following)
        return total / count


class LinearInputs:
    """What the linears of a block receive, by their names in it: the Gram matrix xᵀx of all rows x [M, K]."""

    def __init__(self) -> None:
        self.grams: dict[str, Float32[Tensor, "K K"]] = {}
        self.rows: dict[str, int] = {}
        self.same_as: dict[str, str] = {}  # linears with the same input share a matrix
        self.routed: dict[str, Float32[Tensor, "M D"]] = {}  # of a mixture of experts
        self.chosen: dict[str, Int[Tensor, "M k"]] = {}  # the experts of each row
        self._newest: tuple[Tensor, str] | None = None

    def gram(self, name: str) -> Float32[Tensor, "K K"]:
        return self.grams[self.same_as[name]]

    def count(self, name: str) -> int:
        """Rows that a linear has received."""
        return self.rows[self.same_as[name]]

    def rows_of(self, name: str, expert: int) -> Float32[Tensor, "m D"]:
        """What an expert of the mixture `name` has received."""
        return self.routed[name][(self.chosen[name] == expert).any(-1)]

    def see(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if self._newest is None or self._newest[0] is not x:
            self._newest = x, name
            rows = x.flatten(0, -2)
            self.rows[name] = self.rows.get(name, 0) + len(rows)
            gram = self.grams.setdefault(name, rows.new_zeros(rows.shape[1], rows.shape[1]))
            gram.addmm_(rows.T, rows)
        self.same_as[name] = self._newest[1]

    def see_routed(self, name: str, _: nn.Module, args: tuple[Tensor], out: tuple[Tensor, Tensor, Tensor]) -> None:
        for kept, new in ((self.routed, args[0]), (self.chosen, out[1])):
            kept[name] = torch.cat([kept[name], new]) if name in kept else new


@contextmanager
def recording(block: Block) -> Iterator[LinearInputs]:
    """Collects what the block's linears receive within the `with`."""
    found = LinearInputs()
    hooks = [
        module.register_forward_pre_hook(partial(found.see, name))
        for name, module in block.named_modules()
        if isinstance(module, Linear)
    ]
    for name, module in block.named_modules():
        if isinstance(module, MixtureOfExperts):
            assert isinstance(module.gate, Router)
            hooks.append(module.gate.register_forward_hook(partial(found.see_routed, name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
