"""Parts of torch with the types that its own stubs lack."""

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import function
from torch.autograd.function import FunctionCtx

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])


class Context(FunctionCtx):
    """What forward and backward get; a subclass declares the attributes that forward sets."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Forward(Protocol[P, R]):
    @staticmethod
    def forward(ctx: Any, *args: P.args, **kwargs: P.kwargs) -> R: ...


class Function(torch.autograd.Function):
    """A differentiable function; `apply` has the arguments and the result of the subclass's `forward`."""

    if TYPE_CHECKING:
        backward: Callable[..., Any]

        @classmethod
        def apply(cls: type[_Forward[P, R]], *args: P.args, **kwargs: P.kwargs) -> R: ...


def once_differentiable(backward: F) -> F:
    """torch's, without losing the names of the arguments."""
    return cast(F, function.once_differentiable(backward))


def not_compiled(f: F) -> F:
    """torch.compiler.disable: torch.compile calls the function as it is.

    Until something is compiled it stays as it is: to disable it imports torch._dynamo, which takes seconds.
    """
    disabled: F | None = None

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return f(*args, **kwargs)
        if disabled is None:
            disabled = cast(F, torch.compiler.disable(f))  # pyright: ignore[reportUnknownMemberType] -- untyped
        return disabled(*args, **kwargs)

    return cast(F, call)
