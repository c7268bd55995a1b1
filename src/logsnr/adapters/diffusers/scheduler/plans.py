"""Plans in a scheduler's config: given in any form, kept as JSON values, found by their number of evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logsnr.sampling import Plan


def load_plans(source: Any) -> dict[int, Plan]:
    """Plans by their number of evaluations.

    Args:
        source: None; a `Plan`; its JSON text, values or path; a list of these, or a mapping from evaluations to them.

    Raises:
        ValueError: if it is none of these, a key is not its plan's number of evaluations, or two plans have the same.
    """
    if source is None:
        return {}
    if isinstance(source, str | os.PathLike) and str(source).lstrip().startswith(("{", "[")):
        try:
            source = json.loads(str(source))
        except json.JSONDecodeError as error:
            raise ValueError(f"plan is not JSON ({error}): give Plan.to_dict() as JSON, or a path") from error
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"plan {str(source)!r} is no file: give the path of a saved plan, or its JSON text")
        return load_plans(path.read_text(encoding="utf-8"))
    if isinstance(source, Plan):
        return {source.nfe: source}
    if isinstance(source, Mapping):
        if "sigmas" in source or "rows" in source:
            plan = Plan.from_dict(source)
            return {plan.nfe: plan}
        out: dict[int, Plan] = {}
        for key, value in source.items():
            for nfe, plan in load_plans(value).items():
                if str(nfe) != str(key):
                    raise ValueError(f"plan {key!r} has {nfe} evaluations: key each plan by its number of evaluations")
                out[nfe] = plan
        return out
    if isinstance(source, Sequence):
        merged: dict[int, Plan] = {}
        for value in source:
            for nfe, plan in load_plans(value).items():
                if nfe in merged:
                    raise ValueError(f"two plans have {nfe} evaluations: keep one of them")
                merged[nfe] = plan
        return merged
    raise ValueError(f"plan is a {type(source).__name__}: give a Plan, its JSON, a path, or several of them")


def plans_to_config(source: Any) -> dict[str, Any] | None:
    """Plans as JSON values for a config: one plan as itself, several keyed by evaluations."""
    plans = load_plans(source)
    if not plans:
        return None
    if len(plans) == 1:
        return next(iter(plans.values())).to_dict()
    return {str(nfe): plans[nfe].to_dict() for nfe in sorted(plans)}


def stored(plans: Mapping[int, Plan], n: int | None) -> Plan:
    """The plan of n evaluations; the only one if n is None.

    Raises:
        ValueError: if there is none; the message names those there are.
    """
    if n is None and len(plans) == 1:
        return next(iter(plans.values()))
    if n is None or n not in plans:
        have = ", ".join(map(str, sorted(plans)))
        one = f"this scheduler's plan has {have} evaluations: call with num_inference_steps={have}"
        several = f"this scheduler's plans have {have} evaluations: call with one of these numbers"
        raise ValueError(
            f"num_inference_steps = {n}, but {one if len(plans) == 1 else several}, "
            "or build the scheduler with plan=None and a solver"
        )
    return plans[n]
