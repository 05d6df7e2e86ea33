"""Changing every model and processor that transformers loads, from `change_loaded` until `stop_changing`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

LOADERS = ("from_pretrained", "_from_config")
"""Names of the class methods by which transformers makes models and processors; a processor has only the first."""

SIGNATURES = {
    "transformers:PreTrainedModel.from_pretrained": "pretrained_model_name_or_path, ...",
    "transformers:PreTrainedModel._from_config": "config, ...",
    "transformers:ProcessorMixin.from_pretrained": "pretrained_model_name_or_path, ...",
}
"""The functions of the library that this file relies on, and their parameters, for `require`."""

_CHANGED: dict[type, Callable[..., None]] = {}
"""The classes whose loaders are wrapped, and the function that is called with what they load."""


def change_loaded(classes: Sequence[Any], change: Callable[[Any], None]) -> None:
    """Make the loaders of these classes, and of classes derived from them, call change(loaded) before they return.

    Raises RuntimeError if `change_loaded` is in force for one of the classes; ValueError if other code has replaced a
    loader. Nothing is changed then.
    """
    if any(cls in _CHANGED for cls in classes):
        raise RuntimeError("registered already: unregister first")
    for cls in classes:
        for loader in LOADERS:
            if loader in vars(cls):
                raise ValueError(f"{cls.__name__}.{loader} must not be replaced by others")
    for cls in classes:
        _CHANGED[cls] = change
        for loader in LOADERS:
            if hasattr(cls, loader):
                setattr(cls, loader, _changing(cls, loader, change))


def stop_changing(classes: Sequence[Any]) -> None:
    """Give these classes their own loaders again. Raises RuntimeError if `change_loaded` is not in force for them."""
    if not all(cls in _CHANGED for cls in classes):
        raise RuntimeError("not registered")
    for cls in classes:
        del _CHANGED[cls]
        for loader in LOADERS:
            if hasattr(vars(cls).get(loader), "stgp_change"):
                delattr(cls, loader)


def _changing(cls: Any, loader: str, change: Callable[[Any], None]) -> Any:
    """Return a loader for a class that calls the one of its bases and then change(loaded)."""

    @functools.wraps(getattr(cls, loader).__func__)
    def load(loaded_class: Any, *arguments: Any, **keywords: Any) -> Any:
        loaded = getattr(super(cls, loaded_class), loader)(*arguments, **keywords)
        if _CHANGED.get(cls) is change:  # other code may still hold this wrapper after stop_changing
            change(loaded[0] if isinstance(loaded, tuple) else loaded)  # with output_loading_info it is a pair
        return loaded

    method = classmethod(load)
    method.stgp_change = change  # type: ignore[attr-defined]
    return method
