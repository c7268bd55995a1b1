"""Trajectories: everything that one `set_timesteps` call made, the runs along it, and which of them a step belongs to.

A trajectory is a plan, its timesteps on a device, and for every start k the arithmetic of `plan.tail(k)`.

A run is one loop over the timesteps: the index it expects next, and its estimates.  Which run a call belongs to is
told by the state it brings: the very tensor that the run's last step returned.  A pipeline that has replaced the state
(a mask, a cast, guidance) continues the only run that waits at that index; if several do, that is an error.  A plan
whose rows are all [1] has no memory, and takes its steps in any order.

Which trajectory is told by the timestep.  An element of `scheduler.timesteps` is a view: its base is the key of a weak
table, its offset the index, and no value is read back from a device.  A trajectory thus lives as long as somebody holds
one of its timesteps.  A copy, or a number, is looked up by value.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from logsnr.adapters.diffusers.config import Noising
from logsnr.adapters.diffusers.scheduler.arithmetic import Arithmetic, arithmetic_of, combined, stored
from logsnr.adapters.diffusers.scheduler.plan_for import with_eta
from logsnr.noise import alpha_s
from logsnr.sampling.plan import Plan

Draw = Callable[[Tensor], Tensor]
"""Noise like a state, from the pipeline's generator."""

RUNS = 64
"""Runs that a trajectory keeps."""
TRAJECTORIES = 32
"""Trajectories that a scheduler keeps for lookups by value."""


class Run:
    """One loop over a trajectory: its arithmetic, where it is and what it remembers."""

    __slots__ = ("arithmetic", "history", "last_input", "last_output", "next", "shape", "start")

    def __init__(self, start: int, arithmetic: list[Arithmetic], shape: torch.Size) -> None:
        self.start = start
        self.next = start
        self.arithmetic = arithmetic
        self.shape = shape
        self.history: list[Tensor | None] = []
        self.last_input: TensorWeakRef | None = None
        self.last_output: TensorWeakRef | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if not name.startswith("last_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in self.__slots__:
            setattr(self, name, state.get(name))


class Trajectory:
    """A plan laid out for a model: labels, arithmetic, runs.

    Args:
        plan: what to do.
        model: the model it is for.
        limit: maps x0 to what is allowed of it (clipping, thresholding); None for no change.
        told: what the network is told at each step, where that is not the model's label of the level.
    """

    def __init__(
        self,
        plan: Plan,
        model: Noising,
        limit: Callable[[Tensor], Tensor] | None = None,
        told: Sequence[float] | None = None,
    ) -> None:
        self.plan = plan
        self.model = model
        self.limit = limit
        labels = [model.timestep(sigma) for sigma in plan.sigmas[:-1]] if told is None else [*told]
        whole = model.table is not None and all(label == round(label) for label in labels)
        self.dtype = torch.int64 if whole else torch.float32
        self.labels: list[float] = torch.tensor(labels, dtype=torch.float64).to(self.dtype).tolist()
        self.told = {} if told is None else dict(zip(self.labels, plan.sigmas, strict=False))
        self.begin: int | None = None
        self.index: int | None = None
        self._runs: list[Run] = []
        self._programs: dict[tuple[int, float], list[Arithmetic]] = {}
        self._kept = max((position + 1 for step in self.program(0) for position, _ in step.terms), default=0)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {key: value for key, value in self.__dict__.items() if key != "_lock"} | {"_runs": [*self._runs]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self.plan.nfe

    def find(self, value: float) -> list[int]:
        """Where a label stands; or one of a flow that was cut to an integer (SkyReels' diffusion forcing)."""
        exact = [i for i, label in enumerate(self.labels) if label == value]
        return exact or [i for i, label in enumerate(self.labels) if self.model.flow and int(label) == value]

    def waits(self, index: int) -> bool:
        """Whether a run expects that index next."""
        with self._lock:
            return any(run.next == index for run in self._runs)

    def advance(
        self, index: int, output: Tensor, sample: Tensor, draw: Draw, eta: float = 0.0, whole: bool = False
    ) -> Tensor:
        """One step.

        Args:
            index: which.
            output: the network's output F `[B, *shape]`.
            sample: the pipeline's state `[B, *shape]`.
            draw: source of noise, for steps that use it.
            eta: DDIM's noise.
            whole: whether a limited x0 changes eps too.

        Returns:
            The state at the next level, in the dtype of `sample`.

        Raises:
            ValueError: if it cannot be told which run the call belongs to, or it skips or repeats a step.
        """
        run: Run | None = None
        if self._kept:
            with self._lock:
                run = self._run(index, sample)
                if run is None:
                    run = Run(index, self.program(index), sample.shape)
                else:
                    self._runs.remove(run)  # nobody else's while the step is under way
        try:
            moved, estimate = self._moved(run, index, output, sample, draw, eta, whole)
        except BaseException:
            if run is not None and run.next > run.start:
                with self._lock:
                    self._runs.insert(0, run)
            raise
        self.index = index + 1
        if run is not None and index + 1 < len(self.labels):
            run.history.insert(0, estimate)
            del run.history[self._kept :]
            run.next = index + 1
            run.last_input, run.last_output = TensorWeakRef(sample), TensorWeakRef(moved)
            with self._lock:
                self._runs.insert(0, run)
                del self._runs[RUNS:]
        return moved

    def _moved(
        self, run: Run | None, index: int, output: Tensor, sample: Tensor, draw: Draw, eta: float, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The next state, and this step's estimate where a later one reads it."""
        start = 0 if run is None else run.start
        step = (run.arithmetic if run is not None and eta == 0 else self.program(start, eta))[index - start]
        state = sample if sample.dtype in (torch.float32, torch.float64) else sample.to(torch.float32)
        history = [] if run is None else run.history
        estimate = None
        if self.limit is None:
            moved = (state * step.state).add_(output, alpha=step.output)
        else:
            moved, estimate = self._limited(index, step, output, state, whole)
        for position, weight in step.terms:
            past = history[position]
            assert past is not None
            moved.add_(past, alpha=weight)
        if step.noise:
            moved.add_(draw(moved), alpha=step.noise)
        if estimate is None and step.store is not None:
            # Last of all, since it goes where the estimate lay that no later step reads.
            spare = history[-1] if len(history) == self._kept else None
            estimate = stored(step.store, state, output, spare)
        return moved if moved.dtype == sample.dtype else moved.to(sample.dtype), estimate

    def denoised(self, index: int, output: Tensor, sample: Tensor) -> Tensor:
        """The network's estimate of x at a step, limited as the steps are."""
        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x0 = self._estimates(index, output, state)[0]
        return (x0 if self.limit is None else self.limit(x0)).to(sample.dtype)

    def _run(self, index: int, sample: Tensor) -> Run | None:
        """The run that a call belongs to; None for a new one."""
        for run in self._runs:
            if run.last_output is not None and run.last_output() is sample:
                if run.next == index:
                    return run
                raise ValueError(
                    f"{self._name(index)} was given the state that {self._name(run.next)} needs: take the timesteps in "
                    "order; if you have brought that state to another noise level in place, pass a copy"
                )
            if (
                run.next == index + 1
                and run.start < index
                and run.last_input is not None
                and run.last_input() is sample
            ):
                raise ValueError(
                    f"{self._name(index)} was already taken from this state, and its history "
                    "has moved on: call step once per timestep, or set_timesteps again"
                )
        waiting = [run for run in self._runs if run.next == index and run.shape == sample.shape]
        if len(waiting) == 1:
            return waiting[0]
        if waiting:
            raise ValueError(
                f"{len(waiting)} interleaved runs wait for {self._name(index)}, and this state is not one that step "
                "returned: call set_timesteps once for every run and give step the elements of its own "
                "scheduler.timesteps"
            )
        if self._runs and index > 0 and index != self.begin and all(run.next < index for run in self._runs):
            raise ValueError(
                f"{self._name(index)} comes before {self._name(self._runs[0].next)}: take the timesteps in order, or "
                f"call set_begin_index({index}) to start there"
            )
        return None

    def _name(self, index: int) -> str:
        return f"step {index} (timestep {self.labels[index]:g})"

    def program(self, start: int, eta: float = 0.0) -> list[Arithmetic]:
        """The arithmetic of every step of a run that starts at `start`."""
        known = self._programs.get((start, eta))
        if known is None:
            plan = self.plan if eta == 0 else with_eta(self.plan, eta)
            known = arithmetic_of(plan.tail(start), self.model, self.limit is not None)
            if len(self._programs) > RUNS:
                self._programs.clear()
            self._programs[start, eta] = known
        return known

    def _estimates(self, index: int, output: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) of an output."""
        sigma = self.plan.sigmas[index]
        alpha, s = alpha_s(sigma)
        k = self.model.scale(sigma)
        (a_z, a_F), (b_z, b_F) = self.model.prediction.x0_row(alpha, s), self.model.prediction.eps_row(alpha, s)
        return combined((a_z / k, a_F), state, output), combined((b_z / k, b_F), state, output)

    def _limited(
        self, index: int, step: Arithmetic, output: Tensor, state: Tensor, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The step with a limited x0: eps is kept, as DDIM does, and the state becomes alpha x0 + s eps.

        With `whole` the state is kept, and eps = (z - alpha x0)/s.
        """
        assert self.limit is not None
        alpha, s = alpha_s(self.plan.sigmas[index])
        x0, eps = self._estimates(index, output, state)
        x0 = self.limit(x0)
        if whole:
            eps = (state / self.model.scale(self.plan.sigmas[index]) - alpha * x0) / s
        moved = (x0 * (step.keep * alpha)).add_(eps, alpha=step.keep * s)
        value = {"x0": x0, "eps": eps}
        now = value[step.step_basis] if step.step_basis != "velocity" else eps - x0
        moved.add_(now, alpha=step.gain)
        if step.store is None:
            return moved, None
        return moved, value[step.basis] if step.basis != "velocity" else eps - x0


class Trajectories:
    """The trajectories of one scheduler, each with its timesteps on a device: (trajectory, timesteps)."""

    def __init__(self) -> None:
        self._of: Any = WeakTensorKeyDictionary()
        self._recent: deque[tuple[Trajectory, Tensor]] = deque(maxlen=TRAJECTORIES)

    def begin(self, trajectory: Trajectory, device: Any = None) -> None:
        """Lay out its timesteps, and make it the current one of this thread or task."""
        # Not an inference tensor: its views would not know their base.
        with torch.inference_mode(False):
            timesteps = torch.tensor(trajectory.labels, dtype=trajectory.dtype).to(device)
        self._of[timesteps] = trajectory
        self._recent.appendleft((trajectory, timesteps))
        # A new table: that of the context this one was copied from stays as it is.
        current = weakref.WeakKeyDictionary(_CURRENT.get({}))
        current[self] = trajectory, timesteps
        _CURRENT.set(current)

    @property
    def current(self) -> tuple[Trajectory, Tensor] | None:
        """The last one of this thread or task; else the last one of all."""
        mine: tuple[Trajectory, Tensor] | None = _CURRENT.get({}).get(self)
        return mine or (self._recent[0] if self._recent else None)

    def find(self, timestep: Any) -> tuple[Trajectory, int]:
        """The trajectory and index of a timestep.

        Raises:
            ValueError: if there are none, or it cannot be told which.
        """
        if isinstance(timestep, Tensor):
            trajectory: Trajectory | None = self._of.get(timestep if timestep._base is None else timestep._base)
            if timestep.numel() != 1 and (trajectory is None or any(timestep.stride())):
                raise ValueError(
                    f"step got {timestep.numel()} timesteps: give the one that the whole batch is at, an element of "
                    "scheduler.timesteps"
                )
            if trajectory is not None:
                return trajectory, int(timestep.storage_offset())
        if self.current is None:
            raise ValueError("step before set_timesteps: call scheduler.set_timesteps(num_inference_steps) first")
        try:
            value = float(timestep)
        except (TypeError, ValueError):
            raise ValueError(
                f"timestep = {timestep!r}: pass an element of scheduler.timesteps, or the number it holds"
            ) from None
        return self._by_value(value, self.current[0])

    def _by_value(self, value: float, current: Trajectory) -> tuple[Trajectory, int]:
        """The current trajectory if it has the label, else the only recent one that has."""
        recent = [trajectory for trajectory, _ in [*self._recent]]
        having = [current] if current.find(value) else [one for one in recent if one.find(value)]
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


_CURRENT: ContextVar[Any] = ContextVar("logsnr_trajectory")
"""By scheduler (weakly), the last trajectory of this thread or task."""


def some(labels: list[float]) -> str:
    """A list of labels, shortened."""
    if len(labels) <= 6:
        return ", ".join(f"{label:g}" for label in labels)
    return ", ".join(f"{label:g}" for label in labels[:3]) + f" ... {labels[-1]:g}"
