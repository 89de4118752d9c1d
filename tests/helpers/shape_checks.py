"""Checks tensors against the shapes and dtypes in annotations (rorqual.shapes), at every call in every test.

A module's functions are wrapped as it is imported, so `install` comes before the first import. jaxtyping's own import
hook wraps every function, also those without tensors, and torch.compile cannot trace its wrapper.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

CHECKED = (  # packages, or modules
    "rorqual.model",
    "rorqual.kernels",
    "rorqual.rl.grpo",
    "rorqual.rl.rollout_packing",
    "rorqual.parallel.balance",
)
_enabled = True


@contextmanager
def off() -> Iterator[None]:
    """Without checks: for tests of what a function itself says about a wrong shape."""
    global _enabled
    _enabled = False
    try:
        yield
    finally:
        _enabled = True


def install() -> None:
    sys.meta_path.insert(0, _Finder())


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with checks of the annotations that have shapes; itself if there are none.

    Whether they hold depends on shapes and dtypes only, so each combination is checked once: jaxtyping takes some
    0.1 ms, several times as long as most functions of a small model.
    """
    if not any(_has_shape(kind) for kind in function.__annotations__.values()):
        return function
    signature = _only_shapes(inspect.signature(function))
    check_arguments = _check(function, signature.replace(return_annotation=signature.empty))
    check_all = _check(function, signature)
    passed: dict[Hashable, set[Hashable]] = {}  # by arguments: the results

    @functools.wraps(function)
    def call(*args, **kwargs):
        if is_compiling() or not _enabled:
            return function(*args, **kwargs)
        given = (_kinds(args), _kinds(kwargs.values()), *kwargs) if kwargs else _kinds(args)
        if (results := passed.get(given)) is None:
            check_arguments(None, args, kwargs)
            results = passed[given] = set()
        result = function(*args, **kwargs)
        if (found := _kinds((result,))) not in results:
            check_all(result, args, kwargs)
            results.add(found)
        return result

    return call


def _check(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., None]:
    """A check of arguments and result without a call of the function."""
    held = threading.local()

    @functools.wraps(function)
    def stand_in(*args, **kwargs):
        return held.result

    stand_in.__signature__ = signature
    checks = jaxtyped(stand_in, typechecker=beartype)

    def check(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held.result = result
        try:
            checks(*args, **kwargs)
        finally:
            held.result = None  # lets go of its memory

    return check


def _kinds(values: Iterable[Any]) -> Hashable:
    """Shapes and dtypes of tensors, also in tuples and lists; strings; types of others.

    Made for speed: it runs twice at every call.
    """
    kinds: list[Hashable] = []
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            kinds += (value.shape, value.dtype)
        elif kind is tuple or kind is list:
            kinds.append(_kinds(value))
        else:
            kinds.append(value if kind is str else kind)
    return tuple(kinds)


def _only_shapes(signature: inspect.Signature) -> inspect.Signature:
    """Without other annotations, which are the type checker's part."""
    kept = [p if _has_shape(p.annotation) else p.replace(annotation=p.empty) for p in signature.parameters.values()]
    result = signature.return_annotation
    return signature.replace(parameters=kept, return_annotation=result if _has_shape(result) else signature.empty)


def _has_shape(kind: Any) -> bool:
    return (inspect.isclass(kind) and issubclass(kind, AbstractArray)) or any(map(_has_shape, get_args(kind)))


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(name == package or name.startswith(f"{package}.") for package in CHECKED):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        owners = [module, *(kind for kind in vars(module).values() if inspect.isclass(kind))]
        for owner in owners:
            if owner is module or owner.__module__ == module.__name__:
                for name, value in list(vars(owner).items()):
                    if inspect.isfunction(value) and value.__module__ == module.__name__:
                        setattr(owner, name, checked(value))
