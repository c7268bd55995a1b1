"""Gradient estimation, and every other plan, as a diffusers scheduler.

    pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, gamma=2.0)

    config -> Noising (what the model is)  --set_timesteps-->  Plan -> Trajectory  --step, step, ...-->  sample

The scheduler holds a config and its trajectories, and no position: `step` finds the trajectory and the index from the
timestep it is given (an element of `scheduler.timesteps`), and the run from the state.  One
scheduler may therefore serve many threads and many loops.  `timesteps` and the other attributes that pipelines read
answer for the last `set_timesteps` of the calling thread or task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from torch import Tensor

from logsnr.adapters.diffusers.config import limit
from logsnr.adapters.diffusers.scheduler.arguments import PRIVATE, check_next, draws, per_token, refuse
from logsnr.adapters.diffusers.scheduler.configured import Configured
from logsnr.adapters.diffusers.scheduler.grid_for import shift_of
from logsnr.adapters.diffusers.scheduler.plan_for import make_plan, request
from logsnr.adapters.diffusers.scheduler.trajectory import Trajectories, Trajectory, some
from logsnr.noise import alpha_s, flow_time
from logsnr.sampling import Plan


@dataclass
class GradientEstimationSchedulerOutput(SchedulerOutput):  # type: ignore[misc]
    """The next state, `prev_sample`; and the network's estimate of the image, formed if asked for."""

    prev_sample: Tensor

    @property
    def pred_original_sample(self) -> Tensor:
        """The estimate of x at this step, clipped as the config says."""
        estimate: Tensor = self._denoised()
        return estimate


class Pair(tuple[Any, ...]):
    """The next state and the estimate of the image, which is formed if asked for."""

    denoised: Callable[[], Tensor]

    def __new__(cls, moved: Tensor, denoised: Callable[[], Tensor]) -> Pair:
        self = super().__new__(cls, (moved, None))
        self.denoised = denoised
        return self

    def __getitem__(self, which: Any) -> Any:
        return super().__getitem__(0) if which in (0, -2) else tuple(self)[which]

    def __iter__(self) -> Iterator[Tensor]:
        yield super().__getitem__(0)
        yield self.denoised()


class GradientEstimationScheduler(Configured):
    """A scheduler for every pipeline with an epsilon, v, sample, flow or EDM model: gradient estimation, or any plan.

    Build it with `from_config` of the scheduler it replaces.  Its options are those of `Configured`.
    """

    __module__ = "logsnr.adapters.scheduler"  # pipelines write it into their folders: it must not move
    _compatibles = [*(e.name for e in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    # What pipelines call

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        """Begin a trajectory: from now on `timesteps` of this thread or task are its own.

        Args:
            num_inference_steps: number of evaluations; the plan's or the grid's.
            device: where `timesteps` will live.
            timesteps: explicit labels, used unchanged.  A flow may have both: then these are what its network is told
                at `sigmas`, which are shifted once (CogView4).
            sigmas: explicit levels.  Of a table's model: noise-to-signal ratios, the last one being where the run ends.
                Of a flow: times in (0, 1], 0 is appended; shifted by `mu`, once, where shifting is dynamic.  A
                pipeline's default, 1, 1 - 1/n, ..., 1/n, means the scheduler's own grid.
            mu: resolution-dependent shift of flows with `use_dynamic_shifting`; ignored without.
            others: arguments of other schedulers, which are refused.

        Raises:
            ValueError: if the call contradicts itself, the config's plan or the model; the message names the fix.
        """
        if others.get("num_train_timesteps") == self.config.num_train_timesteps:
            del others["num_train_timesteps"]
        refuse("set_timesteps", others)
        asked = request(num_inference_steps, timesteps, sigmas, mu, flow=self.model.flow)
        plan = make_plan(self.config, self.model, asked)
        self._trajectories.begin(Trajectory(plan, self.model, limit(self.config), asked.labels), device)

    def set_shift(self, shift: float) -> None:
        """The shift of a flow's levels from the next `set_timesteps` on, kept in the config.

        Raises:
            ValueError: if the model is no flow, its pipeline computes the shift, or `shift` is none.
        """
        if not self.model.flow:
            raise ValueError(f"set_shift({shift}): only the levels of flows have a shift")
        if self.config.use_dynamic_shifting:
            raise ValueError(
                f"set_shift({shift}): use_dynamic_shifting is on, and the pipeline computes the shift; build the "
                "scheduler with use_dynamic_shifting=False"
            )
        self.register_to_config(shift=float(shift))

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is fed with: the state, which EDM's networks want over its standard deviation.

        Raises:
            ValueError: if an EDM model's timestep is none of a trajectory's, or the sample is one number: so the latent
                upscaler's pipeline asks for Euler's factor.
        """
        if not torch.as_tensor(sample).ndim:
            raise ValueError(
                "scale_model_input got one number: its pipeline (StableDiffusionLatentUpscalePipeline) keeps Euler's "
                "state x + sigma eps; keep its own scheduler"
            )
        if not self.model.edm:
            return sample
        trajectory, index = self._trajectories.find(timestep)
        return sample * self.model.prediction.c_in(*alpha_s(trajectory.plan.sigmas[index]))

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
        *,
        use_clipped_model_output: bool | None = None,
        variance_noise: Tensor | None = None,
        prev_timestep: Any = None,
        per_token_timesteps: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The state at the next level.

        Args:
            model_output: the network's output, guidance applied.
            timestep: an element of `timesteps`.  A copy on a device, or a number, is looked up by value.
            sample: the state.
            eta: DDIM's noise, as pipelines pass it; 0 for the plan's own.
            generator: source of noise, or a list with one per image.
            return_dict: whether to return an output object instead of a tuple: the state, as FlowMatchEuler's, and of
                models that are no flows the estimate of x too, as DDIM's.
            use_clipped_model_output: whether a clipped x0 changes the estimate of the noise too; None for the config's
                `clip_noise`.
            variance_noise: the noise of the step, in place of the generator's.
            prev_timestep: the next element of `timesteps`, as unCLIP's pipelines say it.
            per_token_timesteps: labels `[B, tokens]` of a flow whose cleaner tokens go to the level below their own
                (LTX with conditions); the output is then x - eps, as FlowMatchEuler has it.
            others: arguments of other schedulers, which are refused.

        Raises:
            ValueError: if there is no trajectory, the timestep is none of its, or the order of steps is broken.
        """
        refuse("step", others)
        trajectory, index = self._trajectories.find(timestep)
        if model_output.shape != sample.shape:
            model_output = self._without_variance(model_output, sample)
        check_next(trajectory.labels, index, prev_timestep)
        if per_token_timesteps is not None:
            if not trajectory.model.flow or trajectory.model.inverted:
                raise ValueError("per_token_timesteps: only flows with labels 1000 t have states of several levels")
            model_output = -model_output
        draw = draws(generator, variance_noise)
        whole = self.config.clip_noise if use_clipped_model_output is None else bool(use_clipped_model_output)
        out = trajectory.advance(index, model_output, sample, draw, eta, whole)
        if per_token_timesteps is not None:
            levels = [flow_time(sigma) for sigma in trajectory.plan.sigmas]
            times = per_token_timesteps / trajectory.model.steps
            out = per_token(times, levels, index, sample, model_output, out)
        denoised = partial(trajectory.denoised, index, model_output, sample)
        if not return_dict:
            return (out,) if trajectory.model.flow else Pair(out, denoised)
        result = GradientEstimationSchedulerOutput(prev_sample=out)
        object.__setattr__(result, "_denoised", denoised)
        return result

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor, **others: Any) -> Tensor:
        """The state of images at the given timesteps: what pipelines hold, in the images' dtype.

        Args:
            original_samples: `[B, ...]`.
            noise: alike.
            timesteps: `[B]`, one of each image; or one of each frame `[B, F]` or token `[B, N]`.
            others: arguments of other schedulers, which are refused.

        Raises:
            ValueError: if the timesteps are of another shape.
        """
        refuse("add_noise", others)
        current = self._current
        told = {} if current is None else current.told
        signal, level = self.model.amplitudes(torch.as_tensor(timesteps), original_samples, told)
        return (signal * original_samples + level * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """`add_noise`, as flow pipelines call it."""
        if noise is None:
            raise ValueError("scale_noise needs noise: pass a tensor like the sample")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity target: alpha eps - s x of v prediction; eps - x of flows."""
        if self.model.flow:
            return sample - noise if self.model.inverted else noise - sample
        signal, level = self.model.amplitudes(torch.as_tensor(timesteps), sample)
        return (signal * noise - level * sample).to(sample.dtype)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the next loop of this thread's trajectory starts; `step` finds its place without it.

        Raises:
            ValueError: if it is no index of the trajectory.
        """
        trajectory = self._current
        if trajectory is not None:
            if not 0 <= begin_index < len(trajectory):
                raise ValueError(f"begin_index = {begin_index}: must be in [0, {len(trajectory) - 1}]")
            trajectory.begin = begin_index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands in this thread's `timesteps`, or in those given.

        Raises:
            ValueError: if it does not.
        """
        labels = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        value = float(timestep)
        if value not in labels:
            raise ValueError(f"timestep {value:g} is not one of {some(labels)}: pass an element of scheduler.timesteps")
        return labels.index(value)

    # What pipelines read

    @property
    def timesteps(self) -> Tensor:
        """The labels of the last `set_timesteps` of this thread or task; before any, those of training."""
        current = self._trajectories.current
        if current is not None:
            return current[1]
        steps = self.model.steps
        if not self.model.flow:
            return torch.arange(steps - 1, -1, -1)
        times = torch.arange(steps, 0, -1, dtype=torch.float32) / steps
        shift = 1.0 if self.config.use_dynamic_shifting else shift_of(self.config, None)
        times = shift * times / (1 + (shift - 1) * times)
        return steps * (1 - times if self.model.inverted else times)

    @property
    def sigmas(self) -> Tensor:
        """The levels of that trajectory, its end included: noise-to-signal ratios, for flows times."""
        trajectory = self._current
        levels = (
            [self.model.sigma(t) for t in self.timesteps.tolist()] if trajectory is None else trajectory.plan.sigmas
        )
        return torch.tensor([flow_time(sigma) if self.model.flow else sigma for sigma in levels], dtype=torch.float32)

    @property
    def plan(self) -> Plan | None:
        """The plan of that trajectory: what runs, as numbers."""
        trajectory = self._current
        return None if trajectory is None else trajectory.plan

    @property
    def num_inference_steps(self) -> int | None:
        """The number of evaluations of that trajectory."""
        trajectory = self._current
        return None if trajectory is None else len(trajectory)

    @property
    def step_index(self) -> int | None:
        """Index of the next step, after the last one taken on that trajectory."""
        trajectory = self._current
        return None if trajectory is None else trajectory.index

    @property
    def begin_index(self) -> int | None:
        """What `set_begin_index` was given."""
        trajectory = self._current
        return None if trajectory is None else trajectory.begin

    def __getattr__(self, name: str) -> Any:
        if name in PRIVATE:
            raise AttributeError(f"{name} is {PRIVATE[name]}: keep the pipeline's own scheduler")
        return super().__getattr__(name)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def __getstate__(self) -> dict[str, Any]:
        current = self._trajectories.current
        device = None if current is None else current[1].device
        return {**self.__dict__, "_trajectories": None, "_kept": (self._current, device)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trajectory, device = state.pop("_kept")
        self.__dict__.update(state, _trajectories=Trajectories())
        if trajectory is not None:
            self._trajectories.begin(trajectory, device)

    @property
    def _current(self) -> Trajectory | None:
        current = self._trajectories.current
        return None if current is None else current[0]

    def _without_variance(self, output: Tensor, sample: Tensor) -> Tensor:
        channels = sample.shape[1]
        if str(self.config.variance_type).startswith("learned") and output.shape[1] == 2 * channels:
            return output[:, :channels]
        raise ValueError(
            f"model_output has shape {tuple(output.shape)}, sample {tuple(sample.shape)}: they must agree; for "
            "a network that also predicts its variance set variance_type='learned_range'"
        )
