"""Training over two processes: one model, exact resume, and noise levels stratified over the global batch."""

import json
import os
import subprocess
import sys

TINY = ["network.channels=[8]", "network.layers_per_block=1", "network.mid_attention=false", "network.norm_groups=4"]
TINY += ["max_seconds=null", "optimizer.decay=constant", "samples.every=0", "batch=8", "log_every=1", "device=cpu"]


def launch(*program):
    """Run a Python program in two processes of one group, and what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]  # the launcher's own words come last: show the worker's too
    return done.stdout


def result(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = json.loads((folder / "card.json").read_text())["weights"]["sha256"]
    return weights, [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_two_processes_resume_exactly_and_no_group_outlives_the_training(tmp_path):
    """A run copied at its second step and resumed by new processes ends as the uninterrupted one, bit for bit.

    A process group that outlived the training would run its threads on when the interpreter ends, and now and then
    abort a process that has done its work.
    """
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    recipe = [*TINY, "checkpoint_every=2", "steps=4"]
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import shutil, weakref
import torch.distributed as dist
from logsnr.training import load_recipe, train

groups = set()
def callback(info):
    groups.add(weakref.ref(dist.group.WORLD))
    if info.step == 2 and dist.get_rank() == 0:
        shutil.copytree({str(whole)!r}, {str(copy)!r})
train(load_recipe("digits", {recipe!r}), {str(whole)!r}, progress=False, callback=callback)
assert [group() for group in groups] == [None] and not dist.is_initialized(), groups
"""
    )
    launch(str(script))
    assert [step for step, _, _ in result(copy)[1]] == [1, 2]
    arguments = [piece for text in recipe for piece in ("--set", text)]
    launch("-m", "logsnr.cli", "train", "digits", "--out", str(copy), *arguments, "--resume")
    assert result(whole) == result(copy)
    assert [step for step, _, _ in result(whole)[1]] == [1, 2, 3, 4]
