"""Interruptions: Ctrl-C and SIGTERM at random moments of the commands that take long."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import Fault
from faults.kills import contents, digest, training, weights
from faults.processes import command

EACH = 12
"""Interruptions of each command."""
Commands = dict[str, Callable[[Path, Path, bool], list[str]]]
"""Command lines by name: of the folder of a model, the folder to write to, and whether it goes on."""


def interruptions(folder: Path, commands: Commands | None = None) -> Iterator[Fault]:
    """Interrupt every long command, look at what it said and kept, and let it go on where it can."""
    commands = commands or COMMANDS
    assert command(training(folder / "model", steps=1)).wait() == 0
    chance = random.Random(3)
    for name in commands:
        whole = folder / f"{name}-whole"
        whole.mkdir()
        began = time.perf_counter()
        assert command(commands[name](folder, whole, False)).wait() == 0
        seconds = time.perf_counter() - began
        for k in range(EACH):
            out, log = folder / f"{name}-{k}", folder / f"{name}-{k}.log"
            out.mkdir()
            sig = chance.choice((signal.SIGINT, signal.SIGTERM))
            moment = chance.uniform(0.1, 0.8) * seconds
            process = command(commands[name](folder, out, False), log)
            if process.wait(moment) is not None:
                continue  # it was faster this time
            process.kill(sig)
            code = process.wait()
            yield f"{name}, {sig.name} after {moment:.2f} s", _wrong(name, folder, out, whole, code, sig, log)


def _wrong(name: str, folder: Path, out: Path, whole: Path, code: int | None, sig: signal.Signals, log: Path) -> str:
    said = log.read_text()
    if code == 0:  # all was done when the signal came
        return ""
    if code != 128 + sig:
        return f"ended with {code}: {said[-200:]}"
    last = said.strip().splitlines()[-1]
    if "Traceback" in said or not last.startswith("logsnr: interrupted"):
        return f"said: {said[-300:]}"
    kept = [path for path in out.iterdir() if path.suffix == ".json"]
    for path in kept:
        json.loads(path.read_text())
    if name == "generate":
        again = command(_generate(folder, out, True), log).wait()
        return "" if again == 0 and contents(out) == contents(whole) else f"going on ended with {again}, or otherwise"
    if name not in ("train", "calibrate"):
        return ""
    begun = (out / "run" / "state" / "state.json").exists() if name == "train" else bool(kept)
    if (name == "train" or kept) and begun and "--resume" not in last:
        return f"does not say how to go on: {last}"
    again = command(COMMANDS[name](folder, out, begun), log).wait()
    if again != 0:
        return f"going on ended with {again}: {log.read_text()[-300:]}"
    if name == "train":
        return "" if weights(out / "run") == weights(whole / "run") else "other weights than the uninterrupted run's"
    same = digest(out / "plan.json") == digest(whole / "plan.json")
    return "" if same else "another plan than the uninterrupted search's"


def _train(folder: Path, out: Path, again: bool) -> list[str]:
    return training(out / "run", *(["--resume"] if again else []), steps=40, log_every=5)


def _calibrate(folder: Path, out: Path, again: bool) -> list[str]:
    more = ["--resume", str(out / "plan.measured.json")] if (out / "plan.measured.json").exists() else []
    options = ["--nfe", "3", "-n", "8", "--rollouts", "60", "--out", str(out / "plan.json")]
    return ["calibrate", str(folder / "model"), *options, *more]


def _compare(folder: Path, out: Path, again: bool) -> list[str]:
    few = ["--solvers", "ge,unipc", "--grids", "karras", "--features", "none", "--no-peers"]
    options = ["--nfe", "4,5", "-n", "64", *few, "--out", str(out)]
    return ["compare", str(folder / "model"), *options]


def _passport(folder: Path, out: Path, again: bool) -> list[str]:
    return ["passport", str(folder / "model"), "--images", "32", "--trajectories", "4", "--out", str(out / "p.html")]


def _generate(folder: Path, out: Path, again: bool) -> list[str]:
    few = ["-n", "500", "--chunk", "10", "--shard", "20"]
    return ["generate", str(folder / "model"), *few, "--out", str(out)]


COMMANDS: Commands = {"train": _train, "calibrate": _calibrate, "compare": _compare, "passport": _passport}


def generations(folder: Path) -> Iterator[Fault]:
    """Interrupt `generate`, and let it go on."""
    yield from interruptions(folder, {"generate": _generate})
