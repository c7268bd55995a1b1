"""Training over two processes: the steps of one, whole or sharded; exact resume; what the end of one is to others."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import weakref
from typing import Literal

import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

from logsnr.cli import main
from logsnr.errors import LogsnrError
from logsnr.files import read_pair
from logsnr.models.base import Network, NetworkConfig
from logsnr.models.networks import NETWORKS, NetworkEntry
from logsnr.training import lifeline, load_recipe, recipe_from, train
from logsnr.training.run import Run

TINY = ["network.channels=[8]", "network.layers_per_block=1", "network.mid_attention=false", "network.norm_groups=4"]
TINY += ["max_seconds=null", "optimizer.decay=constant", "samples.every=0", "batch=8", "log_every=1", "device=cpu"]


def ranked(environment, work, arguments):
    """What one process of a launcher is told, and its work."""
    os.environ.update(environment)
    work(*arguments)


def launch(work, *arguments, ends=(0, 0)):
    """Do the work in two fresh processes of one group, as `torchrun --nproc_per_node 2` would; they end with `ends`.

    They are forks of a server that has imported what they need and done nothing else.
    """
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["torch.distributed", "diffusers.models.unets.unet_2d", "accelerate"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    group |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [fresh.Process(target=ranked, args=(rank, work, arguments)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)  # one that waits for another that failed would never end
        process.kill()
    assert tuple(process.exitcode for process in processes) == ends


def train_and_copy(recipe, whole, copy):
    """Train, copy the run at its second step, and leave no process group.

    A process group that outlived the training would run its threads on when the interpreter ends, and now and then
    abort a process that has done its work.
    """
    import torch.distributed as dist

    groups = set()

    def callback(info):
        groups.add(weakref.ref(dist.group.WORLD))
        if info.step == 2 and dist.get_rank() == 0:
            shutil.copytree(whole, copy)

    train(load_recipe("digits", recipe), whole, progress=False, callback=callback)
    assert [group() for group in groups] == [None], groups
    assert not dist.is_initialized()


def command(*arguments):
    sys.argv = ["logsnr", *arguments]
    main()


def result(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = json.loads((folder / "card.json").read_text())["weights"]["sha256"]
    return weights, [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.heavy
def test_two_processes_resume_exactly_and_no_group_outlives_the_training(tmp_path):
    """A run copied at its second step and resumed by new processes ends as the uninterrupted one, bit for bit."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    recipe = [*TINY, "checkpoint_every=2", "steps=4"]
    launch(train_and_copy, recipe, whole, copy)
    assert [step for step, _, _ in result(copy)[1]] == [1, 2]
    settings = [piece for text in recipe for piece in ("--set", text)]
    launch(command, "train", "digits", "--out", str(copy), *settings, "--resume")
    assert result(whole) == result(copy)
    assert [step for step, _, _ in result(whole)[1]] == [1, 2, 3, 4]


# Two processes are one, whole or sharded


class TinyConfig(NetworkConfig):
    kind: Literal["tiny"] = "tiny"


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix, self.label = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, width)

    def forward(self, h, label):
        return h + self.mix(torch.tanh(h + self.label(label)[:, :, None, None]))


class Tiny(Network):
    """A network that costs next to nothing; none of its widths is a multiple of two processes."""

    def __init__(self, config, shape, width=5):
        super().__init__(config, shape)
        self.label, self.named = nn.Linear(1, width), nn.Embedding(config.classes + 1, width)
        self.first, self.last = nn.Conv2d(shape[0], width, 1), nn.Conv2d(width, shape[0], 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x, label, class_labels):
        label = torch.tanh(self.label(label[:, None] / 1000) + self.named(class_labels))
        h = self.first(x)
        for block in self.blocks:
            h = block(h, label)
        return self.last(torch.tanh(h))


TINY_NETWORK = {"tiny": NetworkEntry(config=TinyConfig, build=Tiny, takes=("channels", "height", "width"))}
LINES = 4


def tiny(**changes):
    """Both of an adaptive density's exchanges; averages of two half-lives."""
    adaptive = {"importance": "gradient", "true_every": 25, "true_samples": 3}
    base = {
        "network": {"kind": "tiny"},
        "objective": {"preset": "vdm++/sigmoid", "logsnr": [-10, 10], "adaptive": adaptive},
        "optimizer": {"warmup": 4, "lr": 3e-3},
        "ema": {"others": {"short": 500}},
        "samples": {"every": 0},
        "conditional": True,
        "batch": 8,
        "checkpoint_every": LINES,
        "log_every": LINES,
        "device": "cpu",
    }
    return recipe_from({**base, **changes})


def all_of(runs, dtype):
    """Train or resume run after run, in one group where there are processes; densities and sharding are looked at."""
    NETWORKS.update(TINY_NETWORK)
    torch.set_default_dtype(dtype)
    grouped = "RANK" in os.environ
    if grouped:
        torch.distributed.init_process_group("gloo")
    seen = []
    begin = Run.__init__
    Run.__init__ = lambda self, *arguments: (begin(self, *arguments), seen.append(self))[0]
    for folder, changes in runs:
        options = tiny(**changes)
        train(options, folder, progress=False, resume=(folder / "state" / "state.json").exists())
        run = seen.pop()
        sharded = [type(p).__name__ for p in (*run.parameters, *run.average.parameters()) if hasattr(p, "full_tensor")]
        every = 2 * len(run.parameters) if grouped and options.parallel == "fsdp" else 0
        assert sharded == ["DTensor"] * (every // 2) + ["DTensor"] * (every // 2), sharded
        if grouped:
            density = run.objective.schedule.probabilities()
            other = density.clone()
            torch.distributed.broadcast(other, src=0)
            assert torch.equal(density, other)
    Run.__init__ = begin
    if grouped:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def lines_of(folder):
    kept = ("loss", "grad_norm", "variance_between", "variance_within", "gradient_excess")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line[key] for key in kept] for line in lines], dtype=torch.float64)


def apart(one, other, steps=None):
    """The largest difference of two runs: of lines of metrics and, at the end, of weights and both averages."""
    lines = [lines_of(folder)[: steps and steps // LINES] for folder in (one, other)]
    most = float(((lines[0] - lines[1]).abs() / lines[0].abs().clamp(min=1)).max())
    for name in () if steps else ("", "averages/short"):
        a, b = (read_pair(folder / name, "card")[1] for folder in (one, other))
        most = max(most, *(float((a[key] - b[key]).abs().max()) for key in a))
    return most


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(torch, "set_default_dtype", torch.set_default_dtype)
    before = torch.get_default_dtype()
    yield all_of
    torch.set_default_dtype(before)
    NETWORKS.pop("tiny")


LAYOUTS = ("ddp", "fsdp") if hasattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter") else ("ddp",)
"""Versions of PyTorch that cannot write shards without pickles refuse the second."""


@pytest.mark.parametrize("steps", [40, pytest.param(200, marks=pytest.mark.heavy)])
def test_two_processes_are_one_and_go_on_from_any_number(tmp_path, one_process, steps):
    """In float64 to 1e-9 over all steps, whole and sharded; 2 -> 1 -> 2 as well; 2 -> 2 bit for bit."""
    steps = {"steps": steps, "checkpoint_every": 0}
    # Between lines of metrics a checkpoint rounds their sums: the first cut is at a line, the second is not.
    part = [[(tmp_path / f"{name}-on", {"parallel": name, "steps": n}) for name in LAYOUTS] for n in (8, 14, 20)]
    launch(all_of, [(tmp_path / name, {"parallel": name, **steps}) for name in LAYOUTS] + part[0], torch.float64)
    for name in LAYOUTS:
        shutil.copytree(tmp_path / f"{name}-on", tmp_path / f"{name}-exact")
    exact = [(tmp_path / f"{name}-exact", {"parallel": name, "steps": 20}) for name in LAYOUTS]
    parts = {"accumulate": 2, "recompute": True}
    one_process([(tmp_path / "one", steps), *part[1], (tmp_path / "parts", {"steps": 20, **parts})], torch.float64)
    launch(all_of, part[2] + exact, torch.float64)
    assert apart(tmp_path / "one", tmp_path / "parts", 20) < 1e-9
    for name in LAYOUTS:
        assert apart(tmp_path / "one", tmp_path / name) < 1e-9
        assert apart(tmp_path / "one", tmp_path / f"{name}-on", 20) < 1e-9
        assert torch.equal(lines_of(tmp_path / f"{name}-exact"), lines_of(tmp_path / name)[: 20 // LINES])


@pytest.mark.heavy
def test_two_processes_are_one_in_float32(tmp_path, one_process):
    changes = {"steps": 200, "checkpoint_every": 0}
    launch(all_of, [(tmp_path / name, {"parallel": name, **changes}) for name in LAYOUTS], torch.float32)
    one_process([(tmp_path / "one", changes)], torch.float32)
    for name in LAYOUTS:
        assert apart(tmp_path / "one", tmp_path / name) < 1e-3


def with_everything(folders):
    """bf16, in parts, recomputed and compiled, sharded and not; by a compiler that writes no machine code."""
    real = nn.Module.compile
    nn.Module.compile = lambda self: real(self, backend="aot_eager")
    all_of(folders, torch.float32)


@pytest.mark.heavy
def test_sharded_in_bf16_parts_recomputed_and_compiled(tmp_path, one_process):
    everything = {"precision": "bf16", "accumulate": 2, "recompute": True, "compile": True, "steps": 8}
    launch(with_everything, [(tmp_path / name, {"parallel": name, **everything}) for name in LAYOUTS])
    one_process([(tmp_path / "one", {"steps": 8, "precision": "bf16"})], torch.float32)
    for name in LAYOUTS:
        losses = lines_of(tmp_path / name)[:, 0]
        torch.testing.assert_close(losses, lines_of(tmp_path / "one")[:, 0], rtol=2e-2, atol=0)


# An end


def one_dies(out, blocked):
    """Process 1 is killed in step 3; what the other says, and after how long, is written down."""
    lifeline.GRACE = 0.5 if blocked else 60.0
    died = []

    def callback(info):
        if info.step == 3:
            died.append(time.monotonic())
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            elif blocked:  # as in an exchange on a GPU, which nothing ends
                sys.stderr = (out.parent / "said").open("w")
                time.sleep(60)

    try:
        train(
            load_recipe("digits", [*TINY, "steps=1000", "checkpoint_every=2"]), out, progress=False, callback=callback
        )
    except LogsnrError as error:
        (out.parent / "said").write_text(f"{error}")
        assert time.monotonic() - died[0] < 60


@pytest.mark.parametrize("blocked", [False, True])
def test_a_process_that_dies_ends_the_others_with_one_line(tmp_path, blocked):
    launch(one_dies, tmp_path / "run", blocked, ends=(2 if blocked else 0, -signal.SIGKILL))
    said = (tmp_path / "said").read_text()
    assert "process 1 of 2 ended, so process 0 ends too (--resume goes on from the last checkpoint)" in said
    assert said.strip().count("\n") == 0
    assert read_pair(tmp_path / "run", "card")[0]["step"] == 2
