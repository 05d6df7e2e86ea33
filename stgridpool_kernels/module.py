"""`GridPool`, the op as an `nn.Module`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .ops import check_arguments, grid_pool

_PARAMETERS = {
    name: parameter
    for name, parameter in inspect.signature(grid_pool).parameters.items()
    if name not in ("x", "frame_counts", "out", "backend")
}
_ALWAYS_SHOWN = ("frame_strides", "grid_shape", "kernel_size", "temperature")


class GridPool(nn.Module):
    """`grid_pool` with its arguments fixed: (T, H, W, C) → (T, OH, OW, C). No parameters, no state.

    Takes the arguments of `grid_pool` except `frame_counts`, which goes to the call since it changes with the videos,
    `out` and `backend`. What does not depend on the input is checked at once: ValueError as in `grid_pool`, TypeError
    for an unknown argument. `arguments` holds them all.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        bound = inspect.Signature(list(_PARAMETERS.values())).bind(**arguments)
        bound.apply_defaults()
        self.arguments: dict[str, Any] = check_arguments(bound.arguments)

    def forward(self, x: Tensor, frame_counts: Sequence[int] | None = None) -> Tensor:
        return grid_pool(x, frame_counts=frame_counts, **self.arguments)

    def extra_repr(self) -> str:
        shown = [
            f"{name}={value!r}"
            for name, value in self.arguments.items()
            if value != _PARAMETERS[name].default or (name in _ALWAYS_SHOWN and not self._replaced(name))
        ]
        return ", ".join(shown)

    def _replaced(self, name: str) -> bool:
        return name == "kernel_size" and self.arguments["output_size"] is not None


GridPool.__signature__ = inspect.Signature(list(_PARAMETERS.values()))  # type: ignore[attr-defined]
