"""The arguments from which a backend computes the weights of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Weighting(NamedTuple):
    """The weights of a window, softmax(temperature · ‖t‖), and the norm, ‖t‖ = (mean_c |t_c|^p)^(1/p).

    norm_type: p. normalize_norm: True takes the mean over channels, False the sum. norm_channels: the number of
    channels that the norm runs over, from 1 to C; they are the first ones.
    """

    temperature: float
    norm_type: float
    normalize_norm: bool
    norm_channels: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any], channels: int) -> Weighting:
        """Return the weighting of a call with these arguments on tokens of `channels` channels.

        The temperature of token_norm, which has none, is 1.
        """
        return cls(
            arguments.get("temperature", 1.0),
            arguments["norm_type"],
            arguments["normalize_norm"],
            arguments["norm_channels"] or channels,
        )
