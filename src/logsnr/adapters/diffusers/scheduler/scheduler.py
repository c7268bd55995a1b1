"""Gradient estimation, and every other plan, as a diffusers scheduler.

    pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, gamma=2.0)

    config -> Noising (what the model is)  --set_timesteps-->  Plan -> Trajectory  --step, step, ...-->  sample

The scheduler holds a config and its trajectories, and no position: `step` finds the trajectory and the index from the
timestep it is given (an element of `scheduler.timesteps`), and the run from the state.  One
scheduler may therefore serve many threads and many loops.  `timesteps` and the other attributes that pipelines read
answer for the last `set_timesteps` of the calling thread or task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from logsnr.adapters.diffusers.config import is_edm, limit, noising
from logsnr.adapters.diffusers.scheduler.grid_for import shift_of
from logsnr.adapters.diffusers.scheduler.plan_for import (
    SAMPLER,
    check_config,
    gamma_to_config,
    make_plan,
    plans_to_config,
    request,
)
from logsnr.adapters.diffusers.scheduler.trajectory import Draw, Trajectories, Trajectory, some
from logsnr.adapters.diffusers.stock import converted
from logsnr.noise import alpha_s, flow_time
from logsnr.sampling import Plan

_OWN_DEFAULTS = ("clip_sample", "timestep_spacing", "set_alpha_to_one")
"""Defaults that differ among stock schedulers: converted back, these get ours."""
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas", "shift_terminal")
_ASKS = frozenset(
    [*SAMPLER, "plan", "timestep_spacing", "final_sigmas_type", "set_alpha_to_one", "rho", "sigma_schedule", *_SPACINGS]
) - {"start", "end"}
"""Options that ask for a sampler or levels of one's own."""


@dataclass
class GradientEstimationSchedulerOutput(SchedulerOutput):  # type: ignore[misc]
    """The next state, `prev_sample`; and the network's estimate of the image, formed if asked for."""

    prev_sample: Tensor

    @property
    def pred_original_sample(self) -> Tensor:
        """The estimate of x at this step, clipped as the config says."""
        estimate: Tensor = self._denoised()
        return estimate


class GradientEstimationScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A scheduler for every pipeline with an epsilon, v, sample, flow or EDM model: gradient estimation, or any plan.

    Build it with `from_config` of the scheduler it replaces.  Options of its own:

    Args:
        gamma: a number (2 if None; 1 is DDIM, for flows Euler), or one for each step that uses it: steps
            1 ... n - 1, without the last one if that goes to noise level 0.  "auto": the best plan known for a model
            that nobody asked, levels and rows, within the model's range (`logsnr.sampling.default`); 1.7 on timesteps
            or sigmas that a caller gives.
        plan: a `Plan`, its JSON text, values or path, or several of them (a list, or keyed by evaluations).  Kept in
            the config, so it is saved and loaded with the pipeline.
        solver: any of `logsnr.solvers` by name (`sampling.names`), also with its options, as "DPM++(3M)".
        solver_options: its further arguments, e.g. `{"order": 3}`.
        basis: what the solver combines: "eps", "x0" or "velocity"; None is velocity for flows and eps otherwise.
        mu: noise in [0, 1), drawn from the pipeline's generator: 0 deterministic, 1/2 DDPM.
        grid: any of `sampling.names.GRIDS`, for flows those that need a range alone: "flow", "karras", "log-linear",
            "beta".  None: as the config's stock options say.
        start, end: first and last level of a continuous grid, or of "auto": noise-to-signal ratios, for flows times.
        sigma_data: standard deviation of the data, the unit of universal plans; 1 if None.
        edm: whether the network is EDM's, of that sigma_data; None: if there is a sigma_data.  `from_config` of another
            model's config says False.

    All other arguments are those of stock schedulers and mean the same.  With `set_alpha_to_one=False`, or
    `final_sigmas_type="sigma_min"`, runs end at the model's smallest level; `final_sigmas_type="zero"` overrides.

    Raises:
        ValueError: if the config describes no model this scheduler knows, or options contradict each other.
    """

    __module__ = "logsnr.adapters.scheduler"  # pipelines write it into their folders: it must not move
    _compatibles = [*(e.name for e in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        final_sigmas_type: str | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        sigma_schedule: str = "karras",
        rho: float = 7.0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float | None = None,
        shift: float | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
        gamma: float | list[float] | str | None = None,
        plan: Any = None,
        solver: str = "ge",
        solver_options: dict[str, Any] | None = None,
        basis: str | None = None,
        mu: float = 0.0,
        grid: str | None = None,
        start: float | None = None,
        end: float | None = None,
        edm: bool | None = None,
    ) -> None:
        values: dict[str, Any] = {"plan": plans_to_config(plan), "gamma": gamma_to_config(gamma)}
        if trained_betas is not None:
            values["trained_betas"] = torch.as_tensor(trained_betas).tolist()
        known = [key for key in self.config.get("_use_default_values", ()) if key not in _OWN_DEFAULTS]
        self.register_to_config(**values, _use_default_values=known)
        self.model = noising(self.config)
        check_config(self.config, self.model)
        if self.model.table is not None:
            self.alphas_cumprod = self.model.table.alphas_cumprod.float()
            previous = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
            self.alphas = self.alphas_cumprod / previous
            self.betas = 1 - self.alphas
        self._trajectories = Trajectories()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler for the model that another scheduler's config describes.

        Values that the other scheduler had by default are kept: they describe the model and its pipeline.  Where
        neither asks for a sampler or for levels, gamma is "auto".

        Raises:
            ValueError: if that scheduler is for another kind of model.
        """
        if not isinstance(config, Mapping):
            return super().from_config(config, return_unused_kwargs, **kwargs)
        if kwargs.get("sigma_data") is not None and not is_edm(config):
            kwargs.setdefault("edm", False)  # no word about the network
        ours = config.get("_class_name") == cls.__name__ or "gamma" in config  # one that was never saved has no name
        if not ours and not any(config.get(key) for key in _SPACINGS) and not kwargs.keys() & _ASKS:
            kwargs["gamma"] = "auto"
        elif config.get("gamma") == "auto" and kwargs.keys() & _ASKS:
            kwargs.setdefault("gamma", None)  # a wish ends it
        given = {**config, **{key: kwargs[key] for key in kwargs.keys() & {"prediction_type"}}}
        return super().from_config(converted(given, cls.__name__, cls.__init__), return_unused_kwargs, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """The arguments that a config holds; its plan is read as numbers, never as the path of a file.

        A config comes with a pipeline, from anyone; the path of a file is for the caller to give, as `plan=`.
        """
        if config_dict.get("plan") is not None:
            config_dict = {**config_dict, "plan": plans_to_config(config_dict["plan"], paths=False)}
        return super().extract_init_dict(config_dict, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, without options that are None: stock schedulers have no None there."""
        values = json.loads(super().to_json_string())
        return json.dumps({k: v for k, v in values.items() if v is not None}, indent=2, sort_keys=True) + "\n"

    # What pipelines call

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begin a trajectory: from now on `timesteps` of this thread or task are its own.

        Args:
            num_inference_steps: number of evaluations; the plan's or the grid's.
            device: where `timesteps` will live.
            timesteps: explicit labels, used unchanged.
            sigmas: explicit levels.  Of a table's model: noise-to-signal ratios, the last one being where the run ends.
                Of a flow: times in (0, 1], 0 is appended; shifted by `mu`, once, where shifting is dynamic.  A
                pipeline's default, 1, 1 - 1/n, ..., 1/n, means the scheduler's own grid.
            mu: resolution-dependent shift of flows with `use_dynamic_shifting`; ignored without.

        Raises:
            ValueError: if the call contradicts itself, the config's plan or the model; the message names the fix.
        """
        asked = request(num_inference_steps, timesteps, sigmas, mu, flow=self.model.flow)
        plan = make_plan(self.config, self.model, asked)
        self._trajectories.begin(Trajectory(plan, self.model, limit(self.config)), device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is fed with: the state, which EDM's networks want over its standard deviation.

        Raises:
            ValueError: if an EDM model's timestep is none of a trajectory's.
        """
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
    ) -> Any:
        """The state at the next level.

        Args:
            model_output: the network's output, guidance applied.
            timestep: an element of `timesteps`.  A copy on a device, or a number, is looked up by value.
            sample: the state.
            eta: DDIM's noise, as pipelines pass it; 0 for the plan's own.
            generator: source of noise, or a list with one per image.
            return_dict: whether to return an output object instead of a tuple.

        Raises:
            ValueError: if there is no trajectory, the timestep is none of its, or the order of steps is broken.
        """
        trajectory, index = self._trajectories.find(timestep)
        if model_output.shape != sample.shape:
            model_output = self._without_variance(model_output, sample)
        draw: Draw = partial(_draw, generator)
        out = trajectory.advance(index, model_output, sample, draw, eta)
        if not return_dict:
            return (out,)
        result = GradientEstimationSchedulerOutput(prev_sample=out)
        object.__setattr__(result, "_denoised", partial(trajectory.denoised, index, model_output, sample))
        return result

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The state of images at the given timesteps `[B]`: what pipelines hold, in the images' dtype."""
        signal, level = self.model.amplitudes(torch.as_tensor(timesteps), original_samples)
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


def _draw(generator: Any, like: Tensor) -> Tensor:
    noise: Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise
