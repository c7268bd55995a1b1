"""docs/compatibility.md from verdicts."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers

from compatibility.judge import EQUAL, PART, Verdict
from compatibility.pipelines import present
from logsnr.adapters import GradientEstimationScheduler
from logsnr.adapters.diffusers.classes import REFUSED, SUPPORTED

COMMAND = "make compatibility"


Kept = dict[str, tuple[dict[str, str], dict[str, Verdict | str]]]
"""By release, the newest first: what else was installed, and the verdicts (`compatibility.results`)."""


def page(kept: Kept) -> str:
    """The whole page: of the newest release's verdicts, with columns of older ones."""
    verdicts = next(iter(kept.values()))[1]
    stopped = {name: one for name, one in verdicts.items() if isinstance(one, str)}
    parts = [
        judged_part(kept),
        "\n## Pipelines that are not judged\n\n",
        *others(verdicts, stopped),
        "\n## Scheduler classes\n\n",
        SCHEDULERS,
        "| class | timesteps of ten steps | noise |\n|---|---|---|\n",
        *(supported(name) for name in SUPPORTED),
        "\nRefused, by name:\n\n| class | because |\n|---|---|\n",
        *(f"| `{name}` | {reason} |\n" for name, reason in sorted(REFUSED.items())),
    ]
    return "".join(parts)


def judged_part(kept: Kept) -> str:
    """What the verdicts alone say: the counts, and the table of pipelines."""
    (version, (_, verdicts)), *rest = kept.items()
    judged = {name: one for name, one in verdicts.items() if isinstance(one, Verdict)}
    run = [one for one in judged.values() if one.runs]
    counts = {"judged": len(judged), "run": len(run), "equal": sum(one.equal for one in run)}
    introduction = INTRODUCTION.format(
        version=version,
        **counts,
        accounted=sum(one.accounted for one in run),
        command=COMMAND,
        most=EQUAL,
        part=PART,
        older="".join(told(release, *found) for release, found in rest),
    )
    parts = [
        introduction,
        "| pipeline | runs | gamma 1 against its own, first order | the difference is |",
        *(f" {release} |" for release, _ in rest),
        "\n|---|---|---|---|" + "---|" * len(rest) + "\n",
        *(row(name, judged[name], [found.get(name) for _, (_, found) in rest]) for name in sorted(judged)),
    ]
    return "".join(parts)


INTRODUCTION = """# Which pipelines and schedulers

Written by `{command}` with diffusers {version}; nothing here is typed by hand.

Every pipeline class that can be built from tiny random components on the spot, run three times for five steps: with a
scheduler of its own kind of first order (DDIM, Euler, FlowMatchEuler, UniPC of order 1), with ours at `gamma=1.0`, and
with ours as `from_config` makes it. Of {judged} classes {run} run with ours; the others are refused in words.
{equal} of them make the same at gamma 1, to {part:.1%} of what `from_config` without options changes and at most
{most:g} of the result's root mean square, and for {accounted} the difference is none or what the table says: made equal
too, they agree. Modular pipelines are not judged.
{older}
- *levels and labels*: FlowMatchEuler shifts its default grid twice and ends at 1/1000, DPM-Solver's kin cuts the labels
  of flows to integers, Z-Image in diffusers 0.37 spends its last evaluation at time 0; ours does none of it
  ([the differences](diffusers.md#what-is-different-from-diffusers-schedulers)).
- *start*: Euler begins at the noise times sigma_max, ours at the noise.
- *noise*: its own scheduler draws noise at every step, ours if you say so (`mu=0.5`). 8e-5 is left then: UnCLIP's last
  step multiplies by beta/(1 - alpha), which single precision makes 1 - 5e-4; with its table in double precision, 1e-7.

## Pipelines

`{command}` says:

"""

SCHEDULERS = """`from_config` takes the config of these. The second column compares the timesteps that both visit in ten
steps; classes that evaluate twice in a step visit each once here.

"""


def told(version: str, found: dict[str, str], verdicts: dict[str, Verdict | str]) -> str:
    """A sentence on an older release."""
    judged = [one for one in verdicts.values() if isinstance(one, Verdict)]
    run, accounted = (sum(one.runs for one in judged), sum(one.accounted for one in judged))
    return (
        f"\nThe last column is of diffusers {version} (transformers {found['transformers']}, torch {found['torch']}):\n"
        f"of {len(judged)} classes {run} run, {sum(one.equal for one in judged)} of them equal, {accounted} equal or "
        "different for the\nreason given; -: not there, or not with its own scheduler.\n"
    )


def row(name: str, one: Verdict, older: list[Verdict | str | None]) -> str:
    cells = "".join(f" {cell(verdict)} |" for verdict in older)
    if not one.runs:
        return f"| `{name}` | no | | {said(one)} |{cells}\n"
    return f"| `{name}` | yes | {one.difference:.1e} | {one.reason} |{cells}\n"


def said(one: Verdict) -> str:
    """Why it does not run, without the name of the error."""
    return one.error.partition(": ")[2]


def cell(verdict: Verdict | str | None) -> str:
    """A verdict of an older release, in few words."""
    if not isinstance(verdict, Verdict):
        return "-"
    if not verdict.runs:
        return "no"
    return verdict.reason or f"{verdict.difference:.0e}"


def others(verdicts: dict[str, Verdict | str], stopped: dict[str, str]) -> list[str]:
    """Those that no family builds, in lists by reason."""
    mixin = diffusers.DiffusionPipeline
    names = [name for name in sorted(dir(diffusers)) if name.endswith("Pipeline") and name not in verdicts]
    found: dict[str, list[str]] = {}
    for name in names:
        kind = present(name)
        if kind is None:
            found.setdefault("need a library that is not installed here", []).append(name)
        elif inspect.isclass(kind) and issubclass(kind, mixin) and kind is not mixin:
            found.setdefault(reason_of(kind), []).append(name)
    lines = [
        f"- These {reason}: {', '.join(f'`{name}`' for name in names)}.\n" for reason, names in sorted(found.items())
    ]
    lines += [f"- `{name}` does not run here with its own scheduler: {why}\n" for name, why in sorted(stopped.items())]
    return lines


OWN = {
    "DanceDiffusionPipeline": "IPNDMScheduler",
    "StableAudioPipeline": "CosineDPMSolverMultistepScheduler",
    "SanaSprintPipeline": "SCMScheduler",
    "SanaSprintImg2ImgPipeline": "SCMScheduler",
}
"""The scheduler of the models that a pipeline is for, where its signature does not say."""


def reason_of(kind: Any) -> str:
    """Why a class is not judged."""
    asked = {
        parameter.name: str(parameter.annotation)
        for parameter in inspect.signature(kind.__init__).parameters.values()
        if parameter.name.endswith("scheduler") and "image_noising" not in parameter.name
    }
    needed = [*asked.values(), OWN.get(kind.__name__, "")]
    refused = next((name for name in REFUSED if any(name in one for one in needed)), None)
    if refused:
        return f"are made for {refused}: {REFUSED[refused]}"
    if not asked:
        return "have no scheduler"
    if len(asked) > 1 and "audio_scheduler" not in asked:
        return "are several pipelines in one, each with a scheduler of its own"
    if kind.__name__ == "PNDMPipeline":
        return "make a PNDMScheduler of whatever they are given"
    return "have components that are not built here"


def supported(name: str) -> str:
    """A row of the table of schedulers."""
    kind, noise = getattr(diffusers, name), SUPPORTED[name].noise
    drawn = (
        "" if noise is None else f"{noise.what}{f' where {noise.key} begins so: {noise.start}' if noise.key else ''}"
    )
    try:
        stock = kind()
    except ImportError:
        return f"| `{name}` | needs a library that is not here | {drawn} |\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = GradientEstimationScheduler.from_config(stock.config, gamma=1.0)
    stock.set_timesteps(10)
    ours.set_timesteps(10)
    theirs = list(dict.fromkeys(stock.timesteps.tolist()))
    found = ours.timesteps.tolist()
    if ours.model.flow:
        what = "one grid, shifted once"
    elif len(theirs) == len(found) and all(abs(a - b) <= 1e-3 for a, b in zip(theirs, found, strict=True)):
        what = "the same"
    else:
        what = "others: steps between, which are no levels of ours" if len(theirs) != len(found) else "other"
    return f"| `{name}` | {what} | {drawn} |\n"
