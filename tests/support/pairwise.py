"""Covering arrays: few combinations in which any two values of different factors meet."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations, product
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def pairwise(*factors: Sequence[T]) -> list[tuple[T, ...]]:
    """Rows of one value of each factor, in which any two values of two factors meet in at least one row.

    Greedy: every row is the one of the full product that has most pairs which have not met, the first of them in the
    order of the product. The factors are small, so that the product can be looked at.
    """

    def pairs(row: tuple[T, ...]) -> set[tuple[int, T, int, T]]:
        return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}

    rows = list(product(*factors))
    missing = set().union(*map(pairs, rows))
    found = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        found.append(best)
    return found
