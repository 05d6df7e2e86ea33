"""Replacing the class of a loaded model or processor by a subclass that pools with ST-GridPool, and putting it back.

A subclass per set of options separates models with different options, and leaves parameters and their names unchanged.
Options are a `PoolOptions` or another hashable object, and the attribute `stgp_options` of a patched model. Patched
models can be copied, pickled and saved whole: they are patched again where they are loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

Members = Callable[..., dict[str, Any]]
"""A function members(base, options, *more) that returns what a subclass of `base` replaces, by name. Patched models are
pickled with its name, so it must be found in its module."""

_POOLED: set[type] = set()


def patch_class(model: Any, members: Members, options: Hashable, *more: Hashable) -> None:
    """Replace the class of a model by `pooled_class(its class, members, options, *more)`.

    Raises RuntimeError if the model is patched already.
    """
    if is_pooled(model):
        raise RuntimeError(f"model is patched already, with {model.stgp_options}: unpatch it first")
    base: Any = type(model)
    model.__class__ = pooled_class(base, members, options, *more)


def unpatch_class(model: Any) -> None:
    """Restore the class that a model had before `patch_class`.

    Raises RuntimeError if the model is not patched, or if its class was replaced again since, as `fully_shard` and
    parametrizations do. The model is unchanged then.
    """
    found = type(model)
    if not is_pooled(model):
        raise RuntimeError(f"model is not patched, its class is {found.__name__}")
    if found not in _POOLED:
        raise RuntimeError(
            f"model was wrapped after it was patched, its class is now {found.__name__}: unwrap it first, or unpatch "
            f"a model before it is wrapped"
        )
    model.__class__ = found.__base__


def is_pooled(model: object) -> bool:
    """Return whether a model or class is patched, possibly under a class that it was given later."""
    return hasattr(model, "stgp_options")


@functools.cache
def pooled_class(base: Any, members: Members, options: Hashable, *more: Hashable) -> Any:
    """Return the subclass of `base` that replaces members(base, options, *more). Equal arguments give the same class.

    It has the name of `base`, by which libraries find what belongs to a model, and the attribute `stgp_options`.
    """

    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:
        make, arguments, *state = base.__reduce_ex__(self, max(protocol, 2))
        if type(self) is not pooled:  # it was wrapped, and pickling it is up to its wrapper
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
    pooled: Any = type(base.__name__, (base,), own | members(base, options, *more))
    _POOLED.add(pooled)
    return pooled


def _patched(make: Callable[..., Any], arguments: Sequence[Any], pooled: Sequence[Any]) -> Any:
    """Return make(*arguments), a model without state, with the class `pooled_class(*pooled)`. Pickles call it."""
    model = make(*arguments)
    model.__class__ = pooled_class(*pooled)
    return model
