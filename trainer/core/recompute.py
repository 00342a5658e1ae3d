"""Inner steps computed anew in the backward sweep, by binomial checkpointing (Griewank 1992)."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from math import comb
from typing import Any

from alpha_maml.trainer.core.algebra import Params, descended

Visit = Callable[[Params, int, bool], Any]  # (phi_k, k, whether the backward sweep needs it) -> an object with a `direction`


def recomputed(visit: Visit, rates: list[Params], phi: Params, first: int, end: int, slots: int,
               held: dict[int, Params | None]) -> Iterator[Any]:
    """The inner steps from phi = phi_first to before `end`, the last first, computed anew with at most `slots` phi_k beside
    phi. `held`: phi_k that the first way forward left."""

    def later(at: int) -> Params:
        moved = phi
        for k in range(first, at):
            moved = descended(moved, rates[k], visit(moved, k, False).direction)
        return moved

    while end - first > 1:
        at = first + until_held(end - first, slots)
        yield from recomputed(visit, rates, held.pop(at, None) or later(at), at, end, slots - 1, held)
        end = at
    yield visit(phi, first, True)


def until_held(count: int, slots: int) -> int:
    """After how many of `count` steps the first of `slots` phi_k is held, so that as few as possible are computed anew:
    binomial checkpointing (Griewank 1992). Where each is computed anew `repeats` times, (slots + repeats over slots) can be."""
    repeats = next(r for r in range(1, count) if comb(slots + r, slots) >= count)
    return max(1, comb(slots + repeats - 2, slots), count - comb(slots + repeats - 1, slots - 1))


def first_held(end: int, slots: int) -> Iterator[int]:
    """The k of the phi_k that the first way forward to `end` leaves."""
    at = 0
    while end - at > 1:
        at, slots = at + until_held(end - at, slots), slots - 1
        yield at
