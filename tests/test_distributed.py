"""Training over two processes: one model, exact resume, and noise levels stratified over the global batch."""

import json
import os
import subprocess
import sys

TINY = ["network.channels=[8]", "network.layers_per_block=1", "network.mid_attention=false", "network.norm_groups=4"]
TINY += ["max_seconds=null", "optimizer.decay=constant", "samples.every=0", "batch=8", "log_every=1", "device=cpu"]


def train(folder, *extra):
    arguments = [piece for text in TINY for piece in ("--set", text)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "logsnr.cli", "train", "digits", "--out", str(folder), *arguments, *extra]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]  # the launcher's own words come last: show the worker's too
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
