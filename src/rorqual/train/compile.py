"""torch.compile, with a fallback to eager mode."""

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compiled(model: nn.Module, notify: Callable[[str], None]) -> Callable[..., Any]:
    """`model`'s compiled forward; the eager one without a C++ compiler (CPU) or when compilation fails.

    It compiles at the first call and for every new shape. `notify` receives a sentence about a fallback.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        notify("train.compile: no C++ compiler found; running without torch.compile")
        return model
    fast: Callable[..., Any] | None = torch.compile(model, dynamic=False)

    def forward(*args: Any, routing: list | None = None, **kwargs: Any) -> Any:
        nonlocal fast
        if fast is not None:
            gathered: list = []
            try:
                out = fast(*args, routing=gathered, **kwargs)
            except _failures() as e:
                fast = None
                notify(f"train.compile: torch.compile failed ({str(e).splitlines()[0][:200]}); running without it")
            else:
                if routing is not None:
                    routing.extend(gathered)
                return out
        return model(*args, routing=routing, **kwargs)

    return forward


def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError
