"""`GridPool`, the op as an `nn.Module`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .ops import check_arguments, grid_pool
from .plan import pair

_PARAMETERS = {
    name: parameter
    for name, parameter in inspect.signature(grid_pool).parameters.items()
    if name not in ("x", "frame_counts", "out", "backend")
}
_ALWAYS_SHOWN = ("frame_strides", "grid_shape", "kernel_size", "temperature")


class GridPool(nn.Module):
    """`grid_pool` with its arguments fixed: (T, H, W, C) → (T, OH, OW, C). No parameters, no state.

    Takes the arguments of `grid_pool` except `frame_counts`, which goes to the call since it changes with the videos,
    `out` and `backend`. What does not depend on the input is checked at once: errors as in `grid_pool`, TypeError for
    an unknown argument. `arguments` holds them all, sequences as tuples.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        bound = inspect.Signature(list(_PARAMETERS.values())).bind(**arguments)
        bound.apply_defaults()
        check_arguments(bound.arguments)
        self.arguments: dict[str, Any] = {name: _as_tuple(name, value) for name, value in bound.arguments.items()}

    def forward(self, x: Tensor, frame_counts: Sequence[int] | None = None) -> Tensor:
        return grid_pool(x, frame_counts=frame_counts, **self.arguments)

    def extra_repr(self) -> str:
        shown = set(_ALWAYS_SHOWN)
        if self.arguments["output_size"] is not None:
            shown.remove("kernel_size")
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self.arguments.items()
            if name in shown or value != _PARAMETERS[name].default
        )


def _as_tuple(name: str, value: Any) -> Any:
    if name in ("frame_strides", "grid_shape"):
        return tuple(value)
    if name in ("kernel_size", "stride", "padding", "output_size") and value is not None:
        return pair(value)
    return value


GridPool.__signature__ = inspect.Signature(list(_PARAMETERS.values()))  # type: ignore[attr-defined]
