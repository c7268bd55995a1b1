"""Walk: levels moved one at a time along the teacher's grid, each set judged by a rollout with rows fitted to it.

    at_k -> at_k +- stride,     kept if that is better

The rows that are best for a set of levels come with it (rows.py), so a step may be long, past other levels even: the
walk leaves the valleys in which Gauss-Newton, which moves levels and rows a little at a time, comes to rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from logsnr.calibration.levels import MIN_STEP
from logsnr.calibration.rows import fitted, prior_rows
from logsnr.calibration.teacher import Cache
from logsnr.calibration.trial import Trial
from logsnr.sampling.plan import Plan

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


def walked(trial: Trial, first: Plan, cache: Cache) -> Plan:
    """From a plan's levels to the best that single moves reach.

    A move must be better on the fitting noise, and then on that and the selection noise together: a few samples that
    end in another mode than the teacher's decide too much on either alone.
    """
    history, known = max(map(len, first.rows)) - 1, cache.sigmas
    start = tuple(min(range(len(known)), key=lambda i: abs(known[i] - s)) for s in first.sigmas[:-1])
    on_fit, on_both, best, left = math.inf, math.inf, first, trial.settings.tries.walk

    def better(nodes: Nodes) -> bool:
        nonlocal on_fit, on_both, best, left
        if not left:
            return False
        left -= 1
        trial.tell("walk")
        plan, fit = fitted(trial, prior_rows((*(known[i] for i in nodes), 0.0), history, first.basis), cache)
        if fit >= on_fit:
            return False
        both = trial.both(plan, fit, {"from": "walk"})
        if both >= on_both:
            return False
        on_fit, on_both, best = fit, both, plan
        return True

    width = math.log(known[0] / known[1])
    strides = [max(round(step / width), 1) for step in trial.settings.tries.strides]
    better(start)
    walk(start, len(known) - 2, math.ceil(MIN_STEP / width - 1e-9), strides, better)
    return best
