"""DeepEP, where it is installed: its kernels take tokens to experts and back over NVLink and RDMA (V3 §3.2.2).

A token crosses to each node once and to each rank there once, as with two hops; the kernels count no bytes. Written for
DeepEP 2's `ElasticBuffer`.
"""

from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.errors import UserError
from rorqual.kernels.block_scaled import decode, quantize
from rorqual.kernels.number_formats import FP8_TRAVEL
from rorqual.parallel.journey import COMBINE, DISPATCH, Journey
from rorqual.parallel.mesh import Mesh
from rorqual.sections import ParallelSection
from rorqual.shapes import Float, Int64


def check_deep_ep(section: ParallelSection, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError where the kernels do not take this device or dtype. A plan's device is "meta"."""
    if not section.by_deep_ep or device.type == "meta":
        return
    dispatch = section.dispatch
    if device.type == "cpu":
        raise UserError(f'parallel.dispatch = "{dispatch}": DeepEP sends between GPUs; choose two-hop on a CPU')
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError(f'parallel.dispatch = "{dispatch}": DeepEP needs Hopper or later; choose two-hop')
    if dtype is not torch.bfloat16:
        raise UserError(f'parallel.dispatch = "{dispatch}": DeepEP sums in BF16; set model.dtype = "bfloat16"')
    if find_spec("deep_ep") is None:
        raise UserError(
            f'parallel.dispatch = "{dispatch}": DeepEP is not installed here; install it from '
            "github.com/deepseek-ai/DeepEP, or choose two-hop"
        )


class DeepEP:
    """The buffers and kernels that all layers of a process share."""

    def __init__(self, mesh: Mesh, experts: int) -> None:
        """experts: routed ones of a layer."""
        self.group, self.experts, self.fp8 = mesh.experts, experts, mesh.section.dispatch == "deepep-fp8"
        self._buffer: Any = None
        self._tokens = 0

    def buffer(self, x: Float[Tensor, "N D"], k: int) -> Any:
        """For as many tokens; every rank has as many, and makes the buffer in the same step."""
        if self._buffer is None or len(x) > self._tokens:
            self.close()
            with self.group.named("DeepEP's buffer", on_gpu=x.is_cuda):
                # DeepEP takes over NCCL's communicator, which exists once it has been used.
                dist.all_reduce(torch.zeros(1, device=x.device), group=self.group.process_group)
                self._tokens = len(x)
                self._buffer = import_module("deep_ep").ElasticBuffer(
                    self.group.process_group, num_max_tokens_per_rank=len(x), hidden=x.shape[1], num_topk=k,
                    use_fp8_dispatch=self.fp8, deterministic=True, explicitly_destroy=True,
                )  # fmt: skip
        return self._buffer

    def close(self) -> None:
        """Free the buffer; all ranks call it together."""
        if self._buffer is not None:
            with self.group.named("DeepEP's buffer, to be freed"):
                self._buffer.destroy()
            self._buffer = None

    def numbers(self, chosen: Int64[Tensor, "N K"]) -> Tensor:
        """Of experts, in the library's dtype."""
        return chosen.to(import_module("deep_ep").topk_idx_t).contiguous()


@dataclass
class DeepEPJourney(Journey):
    """A journey by DeepEP's kernels; gradients go the ways of the tokens."""

    library: DeepEP = field(kw_only=True)
    buffer: Any = None
    handle: Any = None  # of the way there

    def depart(
        self, x: Float[Tensor, "N D"], weights: Float[Tensor, "N K"], chosen: Int64[Tensor, "N K"]
    ) -> list[Tensor]:
        """→ rows at the experts here, and the weights of their experts."""
        library = self.library
        self.buffer = library.buffer(x, chosen.shape[1])
        packed, numbers, sent = self._packed(x), library.numbers(chosen), weights.float().contiguous()
        with library.group.named(DISPATCH, on_gpu=x.is_cuda):
            rows, experts, weights, self.handle, _ = self.buffer.dispatch(
                packed, topk_idx=numbers, topk_weights=sent, num_experts=library.experts
            )
        first = library.group.place * (library.experts // library.group.size)
        experts = experts.to(torch.int64)
        self.chosen = torch.where(experts >= 0, experts + first, -1)
        return [self._unpacked(rows), weights]

    def there(self, x: Float[Tensor, "N D"]) -> list[Tensor]:
        packed = self._packed(x)
        with self.library.group.named(DISPATCH, on_gpu=x.is_cuda):
            rows = self.buffer.dispatch(packed, handle=self.handle, num_sms=self.handle.num_sms)[0]
        return [self._unpacked(rows)]

    def back(self, y: Float[Tensor, "M D"], *weights: Float[Tensor, "M K"]) -> list[Tensor]:
        sent = weights[0].float().contiguous() if weights else None
        y = y.to(torch.bfloat16).contiguous()
        with self.library.group.named(COMBINE, on_gpu=y.is_cuda):
            out, sums, _ = self.buffer.combine(y, handle=self.handle, topk_weights=sent)
        return [out.to(self.dtype), *([] if sums is None else [sums])]

    def _packed(self, x: Float[Tensor, "N D"]) -> Any:
        if not self.fp8:
            return x.to(torch.bfloat16).contiguous()
        codes, scales = quantize(x.contiguous(), FP8_TRAVEL).kept
        return codes.view(torch.float8_e4m3fn), scales

    def _unpacked(self, rows: Any) -> Float[Tensor, "M D"]:
        if not self.fp8:
            return rows.to(self.dtype)
        codes, scales = rows[0].view(torch.uint8), rows[1]
        return decode(codes, scales, FP8_TRAVEL, codes.shape[1]).to(self.dtype)
