"""Walk: levels moved one at a time along the teacher's grid, each set judged by a rollout with rows fitted to it.

    at_k -> at_k +- stride,     kept if that is better

The rows that are best for a set of levels come with it (rows.py), so a step may be long, past other levels even: the
walk leaves the valleys in which Gauss-Newton, which moves levels and rows a little at a time, comes to rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Nodes = tuple[int, ...]
"""Levels as increasing indices into the teacher's grid, the end left out."""


def walk(start: Nodes, last: int, gap: int, strides: Sequence[int], better: Callable[[Nodes], bool]) -> Nodes:
    """Nodes that no single move by the last stride improves.

    Args:
        start: where to begin; its first node stays.
        last: the largest index allowed.
        gap: least distance of two neighbours.
        strides: how far to move, in turn: each until a whole round of moves brings nothing.
        better: whether some nodes are better than the best so far; asked once for each, never for `start`.
    """
    best, seen = start, {start}
    for stride in strides:
        moved = True
        while moved:
            moved = False
            for k in range(1, len(start)):
                for step in (stride, -stride):
                    nodes = tuple(sorted((*best[:k], best[k] + step, *best[k + 1 :])))
                    if nodes in seen or not _allowed(nodes, start[0], last, gap):
                        continue
                    seen.add(nodes)
                    if better(nodes):
                        best, moved = nodes, True
                        break
    return best


def _allowed(nodes: Nodes, first: int, last: int, gap: int) -> bool:
    """Whether the nodes keep the first, end by the last, and keep their distance."""
    apart = all(b - a >= gap for a, b in itertools.pairwise(nodes))
    return apart and nodes[0] == first and nodes[-1] <= last
