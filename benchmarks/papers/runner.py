"""The runner of the papers' experiments: samplers on a model at several seeds, cell by cell, and claims about them.

An experiment is a list of entries (evaluation/compare), a list of claims, and a page.  Cells that were measured are
kept in --work and not run again, whatever ended the command; `--smoke` runs the same code on a handful of samples.  A
claim says that one entry is below another in FD or RMSE at equal evaluations.  It is

    confirmed     the 95 % interval (Student's t) of the paired difference over seeds lies below 0
    refuted       it lies above 0
    undecided     it holds 0, or there are fewer than two seeds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.compare import Comparison, Entry, measure
from logsnr.evaluation.compare.result import Cell, Row
from logsnr.evaluation.features import feature_space
from logsnr.evaluation.metrics import summarise
from logsnr.files import replace_file
from logsnr.loading import load
from logsnr.pixels import Pixels
from logsnr.training import load_data
from logsnr.training.config import DataConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from foreign import MODELS, foreign

SMOKE = {"n": 8, "seeds": [0, 1], "nfe": [5], "teacher": 16}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That `less` is below `more` at one number of evaluations, in `by`: rmse or frechet."""

    says: str
    less: str
    more: str
    by: str
    nfe: int


def parser(doc: str | None, nfe: Sequence[int], n: int, seeds: int, model: str = "ddpm-eps") -> argparse.ArgumentParser:
    """What all experiments can be told."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default=model, help=f"one of {', '.join(MODELS)}, or what `logsnr load` takes")
    found.add_argument("--data", help="training images (.npz or folder), for FD; without them there is RMSE alone")
    found.add_argument("--features", default="classifier", help="feature space of FD")
    found.add_argument("--nfe", type=numbers, default=list(nfe))
    found.add_argument("-n", "--number", dest="n", type=int, default=n, help="samples of each sampler and seed")
    found.add_argument("--seeds", type=numbers, default=list(range(seeds)))
    found.add_argument("--teacher", type=int, default=100, help="evaluations of the teacher")
    found.add_argument("--chunk", type=int, default=128)
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--work", type=Path, default=Path("runs/papers"))
    found.add_argument("--out", type=Path, default=Path("docs/results"))
    found.add_argument("--smoke", action="store_true", help="the same code on a handful of samples, written to --work")
    return found


def numbers(text: str) -> list[int]:
    """ "5,10" as a list."""
    return [int(part) for part in text.split(",")]


def parsed(found: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, shrunk for --smoke."""
    options = found.parse_args(arguments)
    if options.smoke:
        vars(options).update(SMOKE, out=options.work)
    torch.set_num_threads(options.threads)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    return options


def model_of(options: argparse.Namespace) -> NetworkDenoiser:
    """The model by name or path; those of tests/models/foreign answer in the range of their data."""
    if options.model not in MODELS:
        loaded = load(options.model)
        assert isinstance(loaded, NetworkDenoiser)
        return loaded.eval().requires_grad_(False).to(options.device)
    return foreign(options.model).to(options.device)


def compared(name: str, options: argparse.Namespace, model: NetworkDenoiser, entries: Sequence[Entry]) -> Comparison:
    """All entries at all seeds; what lies in --work is not measured again."""
    file = options.work / f"{name}{'-smoke' if options.smoke else ''}.json"
    before = Comparison.from_dict(json.loads(file.read_text())) if file.exists() else None

    def keep(found: Comparison) -> None:
        replace_file(file, (json.dumps(found.to_dict(), indent=1) + "\n").encode())

    space, about = None, {"model": options.model}
    if options.data is not None:
        source = str(options.data)
        data = load_data(DataConfig(source=source))
        decode = (model.pixels or Shifted(options.model, data.grey_levels)).decode
        space = feature_space(options.features, decode, data, source=Path(source).stem, seed=0)
        about["data"] = Path(source).stem
    found = measure(
        model, entries, n=options.n, seed=options.seeds, teacher_steps=options.teacher, chunk=options.chunk,
        cond={"class_labels": torch.arange(model.classes)} if model.classes else None,
        features=space, about=about, before=before, so_far=keep,
        progress=lambda done, total, what: print(f"{name}: {done} of {total}: {what}", flush=True),
    )  # fmt: skip
    keep(found)
    if "interrupted" in found.about:
        raise SystemExit(f"{name}: interrupted; the same command goes on")
    return found


class Shifted:
    """Images of a foreign model, whose x has a range of its own."""

    def __init__(self, model: str, grey_levels: int) -> None:
        self.low, self.high = MODELS[model]["range"]
        self.codec = Pixels(grey_levels)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 images of x."""
        return self.codec.decode((x - self.low) * (2 / (self.high - self.low)) - 1)


def in_range(name: str, model: NetworkDenoiser, images: torch.Tensor) -> torch.Tensor:
    """uint8 images as x of a model."""
    if name not in MODELS:
        return model.encode(images)
    low, high = MODELS[name]["range"]
    return low + (high - low) * images.float() / 255


def judged(claim: Claim, found: Comparison) -> dict[str, Any]:
    """A claim with its paired difference over seeds, and the verdict."""
    pair = [row_of(found, name, claim.nfe) for name in (claim.less, claim.more)]
    values = [{cell.seed: value(cell, claim.by) for cell in row.cells} for row in pair]
    return {
        "claim": claim.says, "nfe": claim.nfe, "by": claim.by, "less": pair[0].name, "more": pair[1].name,
        **verdict_of(*values),
    }  # fmt: skip


def verdict_of(less: Mapping[int, float], more: Mapping[int, float]) -> dict[str, Any]:
    """Two numbers by seed, their paired difference with half of its interval, and the verdict on less < more."""
    both = sorted(set(less) & set(more))
    gap = summarise([less[seed] - more[seed] for seed in both])
    verdict = "undecided" if not gap.decided else "confirmed" if gap.mean < 0 else "refuted"
    return {
        "values": [summarise([one[seed] for seed in both]).mean for one in (less, more)],
        "difference": gap.mean, "half": gap.half if gap.n > 1 else None, "seeds": gap.n, "verdict": verdict,
    }  # fmt: skip


def value(cell: Cell, by: str) -> float:
    """A cell's number."""
    found = getattr(cell, by)
    if found is None:
        raise SystemExit(f"seed {cell.seed} has no {by}: FD needs --data")
    return float(found.value)


def row_of(found: Comparison, name: str, nfe: int) -> Row:
    """The row of an entry's name at so many evaluations."""
    for row in found.rows:
        if row.name == name and row.budget == nfe:
            return row
    raise SystemExit(f"{name} at {nfe} is not among the rows")


def number(row: Row, by: str) -> str:
    """A mean over seeds with its standard error, as printed."""
    one = getattr(row, by)
    return "-" if one is None else f"{one.value:.4g} ± {one.stderr:.2g}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *[list(row) for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdicts(claims: Iterable[Mapping[str, Any]]) -> str:
    """Claims as a table."""

    def line(one: Mapping[str, Any]) -> list[str]:
        gap = f"{one['difference']:+.3g}"
        gap += ", one seed" if one["half"] is None else f" ± {one['half']:.2g}"
        what = {"rmse": "RMSE", "frechet": "FD"}[one["by"]]
        pair = f"{one['values'][0]:.4g} against {one['values'][1]:.4g}"
        return [one["claim"], str(one["nfe"]), what, pair, gap, f"**{one['verdict']}**"]

    return table(("claim", "evaluations", "in", "values", "difference (95 %)", "verdict"), map(line, claims))


def told(found: Comparison) -> str:
    """What a result is of, in a sentence."""
    seeds = f"{len(found.seeds)} seeds" if len(found.seeds) > 1 else f"seed {found.seeds[0]}"
    space = f"FD (features: {found.features}, {found.reference} images); " if found.features else ""
    return (
        f"{found.about['model']}, {found.samples} samples at each of {seeds}; {space}RMSE to {found.teacher.name}; "
        f"{found.machine}."
    )


def write(name: str, title: str, body: str, values: Mapping[str, Any], options: argparse.Namespace) -> None:
    """The model's part of the page between its marks (all else stays), and all numbers beside it."""
    file, page = options.out / f"{name}.json", options.out / f"{name}.md"
    every = json.loads(file.read_text()) if file.exists() else {}
    every[options.model] = values
    replace_file(file, (json.dumps(every, indent=1) + "\n").encode())
    first, last = f"<!-- {options.model} -->", f"<!-- /{options.model} -->"
    old = page.read_text() if page.exists() else f"# {title}\n"
    if first not in old:
        old += f"\n## {options.model}\n\n{first}\n{last}\n"
    before, rest = old.split(first)
    replace_file(page, f"{before}{first}\n{body}\n{last}{rest.split(last)[1]}".encode())
