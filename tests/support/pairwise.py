"""Covering arrays: few combinations in which any two values of different factors occur together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations, product
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def pairwise(*factors: Sequence[T]) -> list[tuple[T, ...]]:
    """Return rows of one value per factor, in which any two values of two factors occur together at least once.

    A greedy algorithm: every row is the first one of the full product that has the most missing pairs. The factors are
    small enough to enumerate the product.
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
