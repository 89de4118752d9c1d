"""Training memory of one process that has the whole model, as the operating system counts it.

Activations go as gradients come, but malloc keeps freed blocks of less than 32 MB (process_tuning.py), and gradients
seldom fill the places of activations: the process has room for both. What Muon's update needs in small blocks it finds
there.
"""

from rorqual.kernels import cpu
from rorqual.kernels.dtype_names import COMPUTE
from rorqual.model import ModelConfig
from rorqual.plan.activations import Kept, backward_bytes, freed_bytes, layer_bytes, mtp_bytes
from rorqual.plan.cost import Memory, logits_bytes, loss_bytes, mtp_parameters, parameters
from rorqual.plan.optimizer_state import predict_state, update_bytes
from rorqual.recipe import LoRASection, OptimizerSection


def memory(
    config: ModelConfig,
    tokens: int,
    *,
    dtype: str = "float32",
    optimizer: OptimizerSection | None = None,
    ema: bool = False,
    fp8: bool = False,
    recompute: str = "none",
    accumulated: bool = False,
    lora: LoRASection | None = None,
) -> Memory:
    """Memory of training with `tokens` per forward pass, with activations kept for the backward pass.

    optimizer: None: AdamW with FP32 moments; fp8: linears keep their inputs in 8 bits; recompute: as in a recipe;
    accumulated: whether a step has several forward passes, whose gradients are added. lora: what is trained; None: all.
    """
    section = optimizer or OptimizerSection()
    state = predict_state(config, dtype, section, lora)
    count = parameters(config)[0] + mtp_parameters(config)
    size = COMPUTE[dtype].itemsize
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    how = Kept(size, fp8, recompute)
    layers = [layer_bytes(config, config.is_moe_layer(layer), how) for layer in range(depth)]
    kept = sum(layers) + config.num_nextn_predict_layers * mtp_bytes(config, how)
    whole = state if lora is None else predict_state(config, dtype, section)
    weights = 4 * count - (4 - size) * whole.masters // 4  # those without a master of their own are FP32
    trained = weights
    if lora is not None:  # in the compute dtype as their base
        count = state.gradients // 4
        trained = size * count
        weights += trained
    kinds = {config.is_moe_layer(layer) for layer in range(depth)}
    kept += max(freed_bytes(config, moe, how) for moe in kinds)
    # Logits are gone before the first layer's backward pass.
    within = tokens * max(backward_bytes(config, moe, how) for moe in kinds)
    compiled = cpu.capability() is not None
    loss, logits = loss_bytes(config, tokens, size, compiled=compiled), logits_bytes(config, tokens, size, compiled)
    activations = round(tokens * kept + max(0.0, within - logits))
    small, large = update_bytes(config, section)
    # A backward pass makes gradients of the weights' dtype, which are then added to those before, or become FP32.
    before, made = (state.gradients, trained) if accumulated else (0, state.gradients)
    return Memory(
        weights=weights,
        masters=state.masters,
        gradients=before + made,
        moments=state.moments,
        ema=4 * count if ema else 0,
        activations=activations,
        loss=loss,
        update=small + large,
        apart=-min(small, activations + loss),
    )
