"""The options of the scheduler, and the model that they describe: everything of it that is saved.

    config  --noising-->  model          at construction, and again whenever an option changes

Options set later (`register_to_config`, `scheduler.config.name = value`, as some pipelines do) are followed, or refused
as they would be at construction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from logsnr.adapters.diffusers.config import Noising, noising
from logsnr.adapters.diffusers.scheduler.options import DEFAULTS, Options, announce, as_values, entailed, wishes
from logsnr.adapters.diffusers.scheduler.plan_for import check_config, plans_to_config
from logsnr.adapters.diffusers.scheduler.trajectory import Trajectories
from logsnr.adapters.diffusers.stock import class_of, converted, is_own

_OWN_DEFAULTS = ("clip_sample", "timestep_spacing", "set_alpha_to_one")
"""Defaults that differ among stock schedulers: converted back, these get ours."""


class Configured(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A scheduler's options and model.  Options of its own:

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

        clip_noise: whether an x0 that is clipped or thresholded changes the estimate of the noise too, so that the
            state stays: as all stock schedulers have it but DDIM.
        skip_last: whether linspace and leading spacings are n + 1 timesteps without the last, as in DPM-Solver's kin.

    All other arguments are those of stock schedulers and mean the same.  With `set_alpha_to_one=False`, or
    `final_sigmas_type="sigma_min"`, runs end at the model's smallest level; `final_sigmas_type="zero"` overrides.

    Raises:
        ValueError: if the config describes no model this scheduler knows, or options contradict each other.
    """

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
        skip_last: bool = False,
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        final_sigmas_type: str | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        lambda_min_clipped: float = -math.inf,
        interpolation_type: str = "linear",
        stochastic_sampling: bool = False,
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
        clip_noise: bool = False,
    ) -> None:
        if DEFAULTS in self.config:
            kept = [key for key in self.config[DEFAULTS] if key not in _OWN_DEFAULTS]
            self.register_to_config(**{DEFAULTS: kept})
        self._trajectories = Trajectories()
        self._follow()

    def register_to_config(self, **kwargs: Any) -> None:
        """Set options, at construction or later: what follows is of the model and the sampler that they describe.

        Raises:
            ValueError: if they describe none; they are then as before, as they are if a warning is made an error.
        """
        kwargs = as_values(kwargs)
        before: Options | None = self.__dict__.get("_internal_dict")
        super().register_to_config(**(kwargs if before is None else entailed(kwargs, before)))
        self._internal_dict: Options = Options(self.config)
        if before is not None and "_trajectories" in self.__dict__ and any(key[0] != "_" for key in kwargs):
            try:
                self._follow()
            except BaseException:
                self._internal_dict = before
                raise

    @property
    def model(self) -> Noising:
        """The model that the config describes."""
        config, changes, model = self._described
        if config is not self._internal_dict or changes != getattr(config, "changes", 0):
            return self._follow()
        return model

    def _follow(self) -> Noising:
        """Read the config."""
        config = self._internal_dict
        model = noising(config)
        check_config(config, model)
        if model.table is not None:
            self.alphas_cumprod = model.table.alphas_cumprod.float()
            previous = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
            self.alphas = self.alphas_cumprod / previous
            self.betas = 1 - self.alphas
        self._described = config, getattr(config, "changes", 0), model
        return model

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler for the model that another scheduler's config describes.

        Values that the other scheduler had by default are kept: they describe the model and its pipeline; a stock
        scheduler made from ours gets its own defaults for them again.  Where neither asks for a sampler or for levels,
        gamma is "auto".  A scheduler that draws noise is answered with a warning that this one does not.

        Raises:
            ValueError: if that scheduler is for another kind of model.
        """
        if not isinstance(config, Mapping):
            return super().from_config(config, return_unused_kwargs, **kwargs)
        given = {**config, **{key: kwargs[key] for key in kwargs.keys() & {"prediction_type"}}}
        values, chosen, stock = converted(given, cls.__name__, cls.__init__)
        announce(class_of(config), stock, config, kwargs)
        kwargs = wishes(config, values, is_own(config, cls.__name__), kwargs)
        out = super().from_config(values, return_unused_kwargs, **kwargs)
        made = out[0] if return_unused_kwargs else out
        others = {key for key, value in made.config.items() if value is not None and key[0] != "_"}
        if others := others - chosen - kwargs.keys():
            made.register_to_config(**{DEFAULTS: sorted(others)})
        return out

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """The arguments that a config holds; its plan is read as numbers, never as the path of a file.

        A config comes with a pipeline, from anyone; the path of a file is for the caller to give, as `plan=`.
        """
        if config_dict.get("plan") is not None:
            config_dict = {**config_dict, "plan": plans_to_config(config_dict["plan"], paths=False)}
        return super().extract_init_dict(config_dict, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, without options that are None: stock schedulers may read it, and have none there."""
        values, own = json.loads(super().to_json_string()), self._get_init_keys(type(self))
        given = {key: value for key, value in values.items() if value is not None or key not in own}
        return json.dumps(given, indent=2, sort_keys=True) + "\n"
