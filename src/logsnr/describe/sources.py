"""Sources: an objective by name, from a recipe, from other people's flags or from their configuration files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from logsnr.describe.configs import from_config
from logsnr.describe.scripts import from_flags
from logsnr.describe.training import Trained, trained_by
from logsnr.errors import LogsnrError, unknown
from logsnr.objectives import WeightedELBO, objectives
from logsnr.reading import read_json, reading
from logsnr.training.config import load_recipe
from logsnr.training.objectives import build_objective
from logsnr.weightings import WEIGHTINGS, Weighting

_SIGMOID = (
    "Several public loops use sigmoid(bias - lambda) on eps-MSE and omit 1/p: they train p sigmoid; others put "
    "sigmoid(lambda - bias) on any target, which is right for x alone."
)
_UNCERTAIN = "uncertainty: true divides by a learned e^u: w is its start; at the end levels count by p/E[error]."
_SHIFTED = "2303.00848 does not define its '-shifted' weightings: shift(s) is w(lambda - s), s = 2 ln(64/resolution)."

NOTES = {
    "v-cosine": "On a shifted cosine schedule plain v-MSE is not e^(-lambda/2), whatever the paper's table 3 says.",
    "v": "On a shifted cosine schedule plain v-MSE is not e^(-lambda/2), whatever the paper's table 3 says.",
    "flow": "The same weighting as v-MSE on the cosine schedule: they differ in how levels are drawn alone.",
    "vdm++/sigmoid": _SIGMOID,
    "sigmoid": _SIGMOID,
    "edm-monotonic": "A public fork clamps w by the order of the batch in place of the noise level: not this.",
    "vdm++/edm-monotonic": "A public fork clamps w by the order of the batch in place of the noise level: not this.",
    "edm2": "EDM2 divides by a learned exp(u) on top of this, which makes it p/E[error] (uncertainty: true).",
    "edm": "2303.00848's table prints the quantiles of this schedule with the wrong sign: log-SNR has mean +2.4.",
    "v-shifted-cosine": "Not e^(-lambda/2), whatever the paper's table 3 says: its ends differ by (resolution/64)^2.",
    "debiased": "kohya's v branch puts 1/(SNR + 1) there, which is e^-lambda on eps errors: another objective.",
    "soft-min-snr": "k-diffusion multiplies this by its own density p; here p is the cosine schedule's.",
    "sd3": "SD3 shifts its noise levels at higher resolution, which shifts this weighting with them.",
}


def resolve(words: Sequence[str]) -> Trained:
    """The objective that a command line names.

    Args:
        words: a preset or weighting, a recipe (.yaml, or the name of a bundled one), a configuration (.json), or flags.

    Raises:
        LogsnrError: if it is none of these.
    """
    if not words:
        raise LogsnrError(f"which objective? give a name ({', '.join(objectives)}), a recipe, or a script's flags")
    first, rest = words[0], words[1:]
    if first.startswith("--"):
        return from_flags(words)
    if rest:
        raise LogsnrError(f"{' '.join(rest)!r} after {first!r}: give one objective, or flags alone")
    if first in objectives:
        return _own(objectives[first], first)
    if first in WEIGHTINGS:
        return _weighting(first, WEIGHTINGS[first])
    if first.endswith(".json"):
        return _configuration(Path(first))
    if first.endswith((".yaml", ".yml")) or Path(first).exists():
        return _recipe(first)
    try:
        return _recipe(first)
    except LogsnrError as error:
        known = [*objectives, *WEIGHTINGS]
        more = "; or a .yaml recipe, a .json configuration, or a script's flags"
        raise unknown("objective, weighting or recipe", first, known, more) from error


def _own(objective: WeightedELBO, name: str, sigma_data: float = 0.5, note: str = "") -> Trained:
    known = (note, NOTES.get(name, ""), _SHIFTED if name.startswith("vdm++") else "")
    found = trained_by(objective)
    notes = (*(text for text in known if text), *found.notes)
    return replace(found, name=name, sigma_data=sigma_data, notes=notes)


def _weighting(name: str, kind: Callable[..., Weighting]) -> Trained:
    note = (NOTES[name],) if name in NOTES else ()
    return Trained(
        name=name,
        weighting=kind(),
        log_density=None,
        drawn="not said: a weighting alone, whatever the schedule",
        range=(-math.inf, math.inf),
        notes=note,
    )


def _recipe(name: str) -> Trained:
    recipe = load_recipe(name)
    sd, note = recipe.sigma_data, ""
    if sd is None:
        sd, note = 0.5, "The recipe measures sigma_data on its images: shown for 0.5, give --sigma-data for another."
    objective = build_objective(recipe.objective, dim=1, sigma_data=sd)
    out = _own(objective, recipe.objective.preset or recipe.objective.describe(), sd, note)
    notes = (*out.notes, _UNCERTAIN) if recipe.objective.uncertainty else out.notes
    return replace(out, name=f"{name}: {recipe.objective.describe()}", notes=notes)


def _configuration(path: Path) -> Trained:
    fix = "give EDM's training_options.json, or k-diffusion's configuration"
    with reading(path, fix, "a configuration"):
        return from_config(read_json(path, fix, "a configuration"), path.name)
