"""Training memory of one process that has the whole model."""

from rorqual.kernels.dtype_names import COMPUTE
from rorqual.model import ModelConfig
from rorqual.plan.activations import Kept, layer_bytes, mtp_bytes
from rorqual.plan.cost import Memory, loss_bytes, mtp_parameters, parameters
from rorqual.plan.optimizer_state import predict_state
from rorqual.recipe import OptimizerSection


def memory(
    config: ModelConfig,
    tokens: int,
    *,
    dtype: str = "float32",
    optimizer: OptimizerSection | None = None,
    ema: bool = False,
    fp8: bool = False,
    recompute: str = "none",
) -> Memory:
    """Memory of training with `tokens` per forward pass, with activations kept for the backward pass.

    optimizer: None: AdamW with FP32 moments; fp8: linears keep their inputs in 8 bits; recompute: as in a recipe.
    """
    state = predict_state(config, dtype, optimizer or OptimizerSection())
    count = parameters(config)[0] + mtp_parameters(config)
    size = COMPUTE[dtype].itemsize
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    how = Kept(size, fp8, recompute)
    kept = sum(layer_bytes(config, config.is_moe_layer(layer), how) for layer in range(depth))
    kept += config.num_nextn_predict_layers * mtp_bytes(config, how)
    return Memory(
        weights=4 * count - (4 - size) * state.masters // 4,  # those without a master of their own are FP32
        masters=state.masters,
        gradients=state.gradients,
        moments=state.moments,
        ema=4 * count if ema else 0,
        activations=round(tokens * kept),
        loss=loss_bytes(config, tokens, size),
    )
