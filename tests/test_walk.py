"""The walk over levels: a local optimum of an enumerable problem, its rules, and what long strides are for."""

import math
from collections.abc import Callable
from itertools import combinations, pairwise

import pytest

from logsnr.calibration.walk import Nodes, walk

LAST, GAP = 12, 2
EVERY = [at for at in combinations(range(LAST + 1), 3) if all(b - a >= GAP for a, b in pairwise(at))]


def rugged(at: Nodes) -> float:
    """A bowl about (2, 8, 12) with ripples that trap steps of one."""
    return sum((a - b) ** 2 + 3 * (a % 2) for a, b in zip(at, (2, 8, 12), strict=True)) + 0.1 * at[0] * at[1]


def downhill(start: Nodes, asked: list[Nodes]) -> Callable[[Nodes], bool]:
    """Whether nodes are below all that were asked before."""

    def better(at: Nodes) -> bool:
        lower = rugged(at) < min(rugged(other) for other in (start, *asked))
        asked.append(at)
        return lower

    return better


@pytest.mark.parametrize("strides", [(1,), (2, 1), (4, 2, 1)])
def test_no_single_move_improves_where_a_walk_ends(strides: tuple[int, ...]) -> None:
    """From everywhere: within the rules, none asked twice, and least among the last stride's neighbours."""
    for start in EVERY:
        asked: list[Nodes] = []
        best = walk(start, LAST, GAP, strides, downhill(start, asked))
        assert start not in asked
        assert len(set(asked)) == len(asked)
        assert set(asked) <= {at for at in EVERY if at[0] == start[0]}
        assert rugged(best) == min(map(rugged, (start, *asked)))
        moved = [(best[0], *sorted(m)) for s in (strides[-1], -strides[-1]) for m in near(best[1:], s)]
        assert all(rugged(at) >= rugged(best) for at in moved if at in EVERY)


def near(rest: Nodes, step: int) -> list[Nodes]:
    return [(*rest[:k], rest[k] + step, *rest[k + 1 :]) for k in range(len(rest))]


def test_long_strides_cross_the_ripples() -> None:
    """More walks that begin with strides of 2 end in the deepest place there is than walks with strides of 1 only."""
    deepest = {first: min(rugged(at) for at in EVERY if at[0] == first) for first in {at[0] for at in EVERY}}
    ends = [[walk(s, LAST, GAP, strides, downhill(s, [])) for s in EVERY] for strides in ((1,), (2, 1))]
    arrived = [sum(rugged(at) == deepest[at[0]] for at in found) for found in ends]
    assert arrived[1] > 2 * arrived[0] > 0


def test_a_level_may_pass_its_neighbours() -> None:
    """Two levels on one side and a gap on the other: a long stride takes the nearer one across."""
    wanted = (0, 6, 10)
    assert walk((0, 2, 6), LAST, GAP, (8,), lambda at: at == wanted) == wanted
    assert walk((0, 2, 6), LAST, GAP, (1, 2, 3), lambda at: at == wanted) == (0, 2, 6)
    assert math.isclose(rugged(wanted), 4 + 4 + 4)
