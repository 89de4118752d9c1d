"""Log-probabilities of a rollout's tokens under a model, in micro-batches."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from rorqual.adapters.lora import AdapterReference
from rorqual.kernels.allowed_tokens import AllowedTokens
from rorqual.kernels.cross_entropy import token_logprobs
from rorqual.kernels.dense_attention import skips_hidden
from rorqual.model import Transformer
from rorqual.model.moe import Routing
from rorqual.model.router_hooks import Replay, replayed
from rorqual.plan.cost import flops_per_token
from rorqual.precision.exact import ExactTransformer
from rorqual.recipe import GRPOSection
from rorqual.rl.rollout import Rollout
from rorqual.rl.rollout_packing import PackedRollout, pack_rollout, routing_table
from rorqual.shapes import Float

# Attention that computes hidden keys too: the whole block, where the planner counts the causal half, at half the FLOP/s
# of linear layers (SmolLM2 in bfloat16 on a CPU, blocks of 300 tokens: 0.65 of 4.5 seconds).
BLOCK_COST = 4


def pack_members(
    rollout: Rollout,
    members: Sequence[int],
    section: GRPOSection,
    model: Transformer,
    only: Sequence[bool] | None = None,
) -> list[PackedRollout]:
    """Micro-batches of the completions `members`, whose indices are those into `members`. only: which to pack."""
    head, config = model.head_weight, model.config
    skips = head.is_cpu and skips_hidden(head.dtype, *config.attention_widths)
    prompt_of = [i // section.group_size for i in members]
    batches = pack_rollout(
        rollout.prompts,
        [rollout.completions[i] for i in members],
        prompt_of if only is None else [p if own else None for p, own in zip(prompt_of, only, strict=True)],
        section.micro_tokens,
        lambda length: flops_per_token(config, 0 if skips else BLOCK_COST * length),
        [rollout.sampled[i] for i in members],
    )
    if rollout.allowed is not None:
        allowed = AllowedTokens.joined([rollout.allowed[i] for i in members])
        batches = [replace(packed, allowed=allowed) for packed in batches]
    if rollout.routing is None:
        return batches
    table = routing_table(rollout.prompts, [rollout.routing[i] for i in members], prompt_of)
    return [replace(packed, recorded=table[packed.origin]) for packed in batches]


def replaying(model: Transformer, packed: PackedRollout, counts: Replay) -> AbstractContextManager[None]:
    """Context in which the model's routers take the experts that the rollout recorded."""
    return nullcontext() if packed.recorded is None else replayed(model, packed.recorded, counts)


def hidden_states(
    model: Transformer | AdapterReference, packed: PackedRollout, routing: list[Routing] | None = None
) -> Float[Tensor, "1 T D"]:
    return model(packed.tokens, packed.positions, packed.mask, routing=routing)


def target_states(model: Transformer, packed: PackedRollout) -> Float[Tensor, "N D"]:
    """The hidden states that predict the targets."""
    return hidden_states(model, packed)[0].index_select(0, packed.source)


def target_logprobs(
    model: Transformer | AdapterReference,
    states: Float[Tensor, "N D"],
    packed: PackedRollout,
    temperature: float,
    grad: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probabilities and entropies of the targets at the sampling temperature, among the tokens that they were
    sampled from ("Keep Sampling Mask", V3.2 §3.1).

    grad: dL/d log π where it is known before the backward pass.
    """
    allowed = None if packed.allowed is None else packed.allowed_rows
    exact = isinstance(model, ExactTransformer)
    return token_logprobs(states, model.head_weight, packed.targets, temperature, grad, allowed, exact)


@torch.no_grad()
def rollout_logprobs(
    model: Transformer, rollout: Rollout, members: Sequence[int], section: GRPOSection
) -> list[list[float]]:
    """By completion, of `members` under the model, with the experts that the rollout recorded; of others there are
    none.
    """
    sizes = [int(n) for n in rollout.lengths[list(members)]]
    device = model.head_weight.device
    found = torch.empty(sum(sizes), device=device)
    for packed in pack_members(rollout, members, section, model):
        packed = packed.to(device)
        with replaying(model, packed, Replay()):
            states = target_states(model, packed)
            found[packed.offset] = target_logprobs(model, states, packed, section.temperature)[0].float()
    out: list[list[float]] = [[] for _ in rollout.completions]
    for i, part in zip(members, found.cpu().split_with_sizes(sizes), strict=True):
        out[i] = [float(p) for p in part]
    return out
