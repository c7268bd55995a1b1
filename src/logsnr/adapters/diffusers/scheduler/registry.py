"""Which trajectory a call of `step` belongs to: the one whose timesteps it names.

An element of `scheduler.timesteps` is a view: its memory tells the trajectory, its offset the index, and no value is
read back from a device.  A copy, or a number, is looked up by value.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

from logsnr.adapters.diffusers.scheduler.trajectory import Trajectory

TRAJECTORIES = 32
"""Trajectories that a scheduler keeps: the loops that may be under way on it at the same time."""


class Registry:
    """The trajectories of one scheduler, found by the memory of their timesteps.

    The latest `TRAJECTORIES` are kept.  One that has run to its end holds no states; one that was given up holds its
    last estimates until it goes.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, Trajectory] = OrderedDict()
        # Of those that went only the timesteps are kept: their memory is not used again, so a late call is recognised.
        self._gone: OrderedDict[int, Tensor] = OrderedDict()
        self._newest: Trajectory | None = None
        self._lock = threading.Lock()

    def add(self, trajectory: Trajectory) -> None:
        """Keep a trajectory."""
        with self._lock:
            self._known[_memory(trajectory.timesteps)] = self._newest = trajectory
            while len(self._known) > TRAJECTORIES:
                key, oldest = self._known.popitem(last=False)
                self._gone[key] = oldest.timesteps
            while len(self._gone) > 32 * TRAJECTORIES:
                self._gone.popitem(last=False)

    def find(self, timestep: Tensor) -> tuple[Trajectory, int] | None:
        """The trajectory and index that a timestep is an element of, by its place in memory; no value is read.

        Raises:
            ValueError: if its trajectory was dropped.
        """
        key = _memory(timestep)
        trajectory = self._known.get(key)
        if trajectory is not None:
            if timestep.ndim and timestep.numel() != 1 and any(timestep.stride()):
                raise ValueError(
                    f"step got {timestep.numel()} timesteps: give the one that the whole batch is at, an element of "
                    "scheduler.timesteps"
                )
            if trajectory is not self._newest:
                with self._lock:
                    if key in self._known:
                        self._known.move_to_end(key)
                        self._newest = trajectory
            return trajectory, int(timestep.storage_offset())
        if key in self._gone:
            raise ValueError(
                f"this timestep's run was dropped: a scheduler keeps the last {TRAJECTORIES} that were used; "
                "call set_timesteps again, or give each worker its own copy.deepcopy(scheduler)"
            )
        return None

    def locate(self, value: float, current: Trajectory) -> tuple[Trajectory, int]:
        """The trajectory and index of a timestep's value: the current one's if it has it, else the only one that has.

        Raises:
            ValueError: if none has it, or it cannot be told which.
        """
        with self._lock:
            others = [trajectory for trajectory in self._known.values() if trajectory is not current]
        having = [current] if current.find(value) else [other for other in others if other.find(value)]
        if not having:
            raise ValueError(
                f"timestep {value:g} is not one of this run's, {some(current.labels)}: pass an element of "
                "scheduler.timesteps, or the number it holds"
            )
        where = having[0].find(value)
        if len(where) > 1:
            where = [index for index in where if having[0].waits(index)] or where
        if len(having) > 1 or len(where) > 1:
            what = f"{len(having)} runs have it" if len(having) > 1 else f"it stands {len(where)} times in this run"
            raise ValueError(
                f"timestep {value:g} is ambiguous: {what}; pass an element of the run's own scheduler.timesteps, not a "
                "copy or a number"
            )
        return having[0], where[0]


def some(labels: list[float]) -> str:
    """A list of labels, shortened."""
    if len(labels) <= 6:
        return ", ".join(f"{label:g}" for label in labels)
    return ", ".join(f"{label:g}" for label in labels[:3]) + f" ... {labels[-1]:g}"


def _memory(timestep: Tensor) -> int:
    """Address of a tensor's storage, which views share."""
    return timestep.untyped_storage().data_ptr()
