"""Replacing the class of a loaded model or processor by a subclass that pools with ST-GridPool, and putting it back.

A subclass per set of options separates models with different options, and leaves parameters and their names unchanged.
Options are a `PoolOptions` or another hashable object, and the attribute `stgp_options` of a patched model. Patched
models can be copied, pickled and saved whole: they are patched again where they are loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

Known = TypeVar("Known")

Members = Callable[..., dict[str, Any]]
"""A function members(base, options, *more) that returns what a subclass of `base` overrides, by name. Pickles of
patched models refer to it by its name, so it must be a function of a module."""

_POOLED: set[type] = set()


def find_module(model: nn.Module, known: Mapping[tuple[str, str], Known]) -> tuple[Any, Known]:
    """Return the one module in `model` whose class, or a class that it is derived from, is known, and its value.

    known: values by (module, name) of a class. Raises TypeError if there is no such module, or more than one.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [(module, value) for module in modules if (value := find_class(type(module), known)) is not None]
    if len(found) != 1:
        names = " or ".join(name for _, name in known)
        raise TypeError(f"model must hold one {names} of transformers, got {type(model).__name__} with {len(found)}")
    return found[0]


def find_class(cls: type, known: Mapping[tuple[str, str], Known]) -> Known | None:
    """Return the value of a class, or of the first class that it is derived from, None if none is known."""
    names = [(base.__module__, base.__name__) for base in cls.__mro__]
    return next((known[name] for name in names if name in known), None)


def patch_class(model: Any, members: Members, options: Hashable, *more: Hashable) -> None:
    """Replace the class of a model by `pooled_class(its class, members, options, *more)`.

    Raises RuntimeError if the model is patched already.
    """
    patch_classes([(model, members)], options, *more)


def patch_classes(models: Sequence[tuple[Any, Members]], options: Hashable, *more: Hashable) -> None:
    """Replace the classes of models as `patch_class` does, each by its members. Raises before anything is changed."""
    for model, _ in models:
        if is_pooled(model):
            raise RuntimeError(f"model is patched already, with {model.stgp_options}: unpatch it first")
    for model, members in models:
        base: Any = type(model)
        model.__class__ = pooled_class(base, members, options, *more)


def unpatch_classes(models: Sequence[Any]) -> None:
    """Restore the classes that models had before `patch_class`, of those that are patched.

    Raises RuntimeError if none is patched, or if a class was replaced again since, as `fully_shard` and
    parametrizations do. Nothing is changed then.
    """
    patched = [model for model in models if is_pooled(model)]
    if not patched:
        raise RuntimeError(f"model is not patched, its class is {type(models[0]).__name__}")
    for model in patched:
        if type(model) not in _POOLED:
            raise RuntimeError(
                f"model was wrapped after it was patched, its class is now {type(model).__name__}: unwrap it first, or "
                f"unpatch a model before it is wrapped"
            )
    for model in patched:
        model.__class__ = type(model).__base__


def unpatch_class(model: Any) -> None:
    """Restore the class that a model had before `patch_class`. Raises as `unpatch_classes`."""
    unpatch_classes([model])


def is_pooled(model: object) -> bool:
    """Return whether a model or class is patched, possibly under a class that it was given later."""
    return hasattr(model, "stgp_options")


@functools.cache
def pooled_class(base: Any, members: Members, options: Hashable, *more: Hashable) -> Any:
    """Return the subclass of `base` that overrides members(base, options, *more). Equal arguments give the same class.

    It has the name of `base`, by which libraries find what belongs to a model, and the attribute `stgp_options`, which
    a module shows in its `repr`.
    """

    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:
        make, arguments, *state = base.__reduce_ex__(self, max(protocol, 2))
        if type(self) is not pooled:  # its class was replaced again, by code that pickles it in its own way
            return make, arguments, *state
        stock = tuple(base if argument is pooled else argument for argument in arguments)
        return _patched, (make, stock, (base, members, options, *more)), *state

    own = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "stgp_options": options,
    }
    if issubclass(base, nn.Module):
        own["extra_repr"] = lambda self: f"videos: {options}"
    pooled: Any = type(base.__name__, (base,), own | members(base, options, *more))
    _POOLED.add(pooled)
    return pooled


def _patched(make: Callable[..., Any], arguments: Sequence[Any], pooled: Sequence[Any]) -> Any:
    """Return make(*arguments), a model without state, with the class `pooled_class(*pooled)`. Pickles call it."""
    model = make(*arguments)
    model.__class__ = pooled_class(*pooled)
    return model
