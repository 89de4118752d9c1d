"""A device that computes on the CPU but refuses what a GPU refuses, to test what runs on a GPU without one.

Its tensors hold CPU tensors. An operation on tensors of both devices raises RuntimeError, but for copies, indices and
numbers, and so does reading a tensor's memory. What it cannot show are streams, Triton kernels, NCCL and speed.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from rorqual.kernels import devices
from rorqual.parallel import mesh
from rorqual.plan import hardware

NAME = "simulated"
COPIES = {"aten::copy_", "aten::_to_copy"}  # between devices
INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}  # by CPU indices too
LISTS = {"aten::cat", "aten::stack"}  # which take no number of another device either


class SimulatedTensor(Tensor):
    """A tensor of the device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "SimulatedTensor":
        out = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        out.raw = raw
        return out

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.raw!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                memo[id(self)] = self.clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: "SimulatedTensor") -> None:
        Tensor.data.__set__(self, value)
        self.raw = value.raw

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("a tensor of the device has no NumPy array; copy it to the CPU first")
        return self.raw.detach().numpy()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on the CPU tensors inside, and say where its results are."""
        kwargs, name = kwargs or {}, op._schema.name
        if name not in COPIES:
            _check(op, name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        where = kwargs.get("device")
        if where is not None:
            kwargs = kwargs | {"device": torch.device("cpu") if _is_here(where) else where}
        with torch.inference_mode(False), torch.no_grad():  # views of weights would be refused else
            results = op(*tree_map(_inside, args), **{key: tree_map(_inside, value) for key, value in kwargs.items()})
            wrapped = tree_map(_wrapped, results)
        if name == "aten::copy_":
            return args[0]
        if where is not None and not _is_here(where):
            return results
        return wrapped if name in COPIES else return_and_correct_aliasing(op, args, kwargs, wrapped)


def _inside(x: Any) -> Any:
    return x.raw if isinstance(x, SimulatedTensor) else x


def _wrapped(x: Any) -> Any:
    return SimulatedTensor(x) if isinstance(x, Tensor) else x


def _is_here(device: Any) -> bool:
    return torch.device(device).type == NAME


def _check(op: Any, name: str, given: list[Tensor]) -> None:
    """Raises RuntimeError for a tensor of another device."""
    if name in INDEXED:
        return
    strangers = [x for x in given if not isinstance(x, SimulatedTensor) and (x.ndim or name in LISTS)]
    if strangers:
        shapes = [tuple(x.shape) for x in strangers]
        raise RuntimeError(f"{op}: tensors of {shapes} are on the CPU, the others on the device")


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


# What makes a tensor; all others are made by these and filled in place.
MAKERS = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "randperm.generator",
    "randperm", "eye", "linspace",
)  # fmt: skip
library = torch.library.Library("aten", "IMPL")  # kept: what it has registered ends with it


def _maker(name: str) -> Any:
    op = torch.ops.aten
    for part in name.split("."):
        op = getattr(op, part)

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return SimulatedTensor(op(*args, device="cpu", **kwargs))

    return make


def _copy_from(source: Tensor, to: "SimulatedTensor", non_blocking: bool = False) -> Tensor:
    to.raw.copy_(_inside(source))
    return to


def install() -> torch.device:
    """Make the device known, and have the package find it as its GPU. Once a process, which it changes for good."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    for name in MAKERS:
        library.impl(name, _maker(name), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")  # of torch.tensor(..., device=)
    hardware.SIZE[NAME] = 64
    device, find, build = torch.device(NAME, 0), devices.find_device, mesh.build_mesh
    count, take = devices.gpu_count, devices.take_gpu
    here = {
        count: lambda: 2,
        take: lambda index: device,
        find: lambda name="auto": torch.device("cpu") if name == "cpu" else device,
        build: lambda section, device="cpu": build(section),
    }  # fmt: skip -- gloo sends what is inside
    for module in [m for name, m in sys.modules.items() if name.startswith("rorqual")]:
        for name, value in list(vars(module).items()):
            if any(value is replaced for replaced in here):
                setattr(module, name, here[value])
    return device
