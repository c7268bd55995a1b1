"""Disks that refuse, and folders that two want."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import Fault
from faults.kills import training, weights
from faults.processes import Forked, command
from faults.stops import COMMANDS

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def refusing(folder: Path) -> Iterator[Fault]:
    """The n-th flush of a file fails; then there is space again."""
    options = {"steps": 3, "checkpoint_every": 1, "log_every": 1}
    assert command(training(folder / "model", **options)).wait() == 0
    whole = weights(folder / "model")
    commands = {name: make for name, make in COMMANDS.items() if name != "train"}
    commands["train"] = lambda folder, out, again: training(out / "run", *(["--resume"] if again else []), **options)
    commands["sample"] = lambda folder, out, again: [
        *("sample", str(folder / "model"), "-n", "4", "--nfe", "4", "--out", str(out / "x.png"))
    ]
    commands["generate"] = lambda folder, out, again: [
        *("generate", str(folder / "model"), "-n", "6", "--nfe", "2", "--chunk", "2", "--shard", "2"),
        *("--out", str(out / "shards")),
    ]
    assert command(commands["generate"](folder, folder / "undisturbed", False)).wait() == 0
    images = _files(folder / "undisturbed")
    for name, make in commands.items():
        for n in range(12 if name == "train" else 4):
            out, log = folder / f"{name}-{n}", folder / f"{name}-{n}.log"
            out.mkdir()
            number = REFUSALS[n % len(REFUSALS)]
            code = _full(make(folder, out, False), n, number, log).wait()
            said = log.read_text()
            if code == 0 and "no picture" not in said:
                break  # it writes fewer files
            what = f"{name}, {errno.errorcode[number]} at file {n}"
            named = str(out) in said and any(text in said.lower() for text in (os.strerror(number).lower(), "no space"))
            if "Traceback" in said or code not in (0, 2) or not (named or "no picture" in said):
                yield what, f"ended with {code}: {said[-300:]}"
                continue
            if list(out.rglob("*.tmp")):
                yield what, "a temporary file was left"
                continue
            again = name == "train" and (out / "run" / "state" / "state.json").exists()
            log.unlink()
            code = command(make(folder, out, again), log).wait()
            trouble = "" if code == 0 else f"with space again it ended with {code}: {log.read_text()[-300:]}"
            if name == "train" and not trouble and weights(out / "run") != whole:
                trouble = "other weights than the undisturbed run's"
            if name == "generate" and not trouble and _files(out) != images:
                trouble = "other files than the undisturbed set's"
            yield what, trouble


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _full(arguments: list[str], n: int, number: int, log: Path) -> Forked:
    from logsnr.cli import main

    def work() -> None:
        import sys

        left, flush = [n], os.fsync

        def fsync(handle: int) -> None:
            if os.path.isfile(f"/proc/self/fd/{handle}"):
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(number, os.strerror(number))
            flush(handle)

        os.fsync = fsync
        sys.argv = ["logsnr", *arguments]
        main()

    return Forked(work, log)


def together(folder: Path) -> Iterator[Fault]:
    """Two of a kind at once, and a training over a model that is not its own."""
    options: dict[str, Any] = {"steps": 20, "checkpoint_every": 5}
    assert command(training(folder / "whole", **options)).wait() == 0
    expected = weights(folder / "whole")
    for k in range(10):
        out, logs = folder / f"run-{k}", [folder / f"{k}-{i}.log" for i in range(2)]
        both = [command(training(out, **options), log) for log in logs]
        codes = [process.wait() for process in both]
        said = [log.read_text() for log in logs]
        fine = sorted(map(str, codes)) == ["0", "2"]
        trouble = "" if fine else f"ended with {codes}: {said[0][-200:]} {said[1][-200:]}"
        refused = next((text for code, text in zip(codes, said, strict=True) if code == 2), "")
        first = next((p.pid for code, p in zip(codes, both, strict=True) if code == 0), 0)
        if not trouble and f"process {first}" not in refused and "already holds a run" not in refused:
            trouble = f"said: {refused[-300:]}"
        if not trouble and weights(out) != expected:
            trouble = "other weights than one run alone"
        yield f"two trainings, {k}", trouble
    for k in range(6):
        out, logs = folder / f"search-{k}", [folder / f"search-{k}-{i}.log" for i in range(2)]
        out.mkdir()
        ledger = out / "ledger.json"
        searches = [
            [*COMMANDS["calibrate"](folder, out, False)[:-1], str(out / f"{i}.json"), "--resume", str(ledger)]
            for i in range(2)
        ]
        searches = [[a.replace(str(folder / "model"), str(folder / "whole")) for a in search] for search in searches]
        both = [command(search, log) for search, log in zip(searches, logs, strict=True)]
        codes = [process.wait() for process in both]
        said = [log.read_text() for log in logs]
        fine = sorted(map(str, codes)) in (["0", "2"], ["0", "0"])  # one may be done before the other begins
        yield f"two searches, {k}", "" if fine else f"ended with {codes}: {said[0][-200:]} {said[1][-200:]}"
    for k in range(6):
        out, log = folder / f"model-{k}", folder / f"model-{k}.log"
        shutil.copytree(folder / "whole", out)
        shutil.rmtree(out / "state")
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        what = ["demo", "--out", str(out)] if k % 2 else training(out, **options)
        code = command(what, log).wait()
        same = before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        yield f"{what[0]} over a model, {k}", "" if code == 2 and same else f"ended with {code}, files kept: {same}"
