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


def train(folder, *extra):
    arguments = [piece for text in TINY for piece in ("--set", text)]
    launch("-m", "logsnr.cli", "train", "digits", "--out", str(folder), *arguments, *extra)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = json.loads((folder / "card.json").read_text())["weights"]["sha256"]
    return weights, [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_two_processes_resume_exactly(tmp_path):
    """Losses and averaged weights of a stopped and resumed run equal those of an uninterrupted one, bit for bit."""
    whole = train(tmp_path / "whole", "--set", "steps=4")
    train(tmp_path / "parts", "--set", "steps=2")
    parts = train(tmp_path / "parts", "--set", "steps=4", "--resume")
    assert whole == parts
    assert [step for step, _, _ in whole[1]] == [1, 2, 3, 4]


def test_no_process_group_outlives_the_training(tmp_path):
    """Its threads would run on when the interpreter ends, and now and then abort a process that has done its work."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys, weakref
import torch.distributed as dist
from logsnr.training import load_recipe, train

groups = []
def callback(info):
    groups.append(weakref.ref(dist.group.WORLD))
train(load_recipe("digits", {[*TINY, "steps=1"]!r}), sys.argv[1], progress=False, callback=callback)
assert len(groups) == 1 and groups[0]() is None and not dist.is_initialized(), groups
"""
    )
    launch(str(script), str(tmp_path / "run"))
