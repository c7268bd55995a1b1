"""Training over two processes: one model, exact resume, and noise levels stratified over the global batch."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import weakref

from logsnr.cli import main
from logsnr.training import load_recipe, train

TINY = ["network.channels=[8]", "network.layers_per_block=1", "network.mid_attention=false", "network.norm_groups=4"]
TINY += ["max_seconds=null", "optimizer.decay=constant", "samples.every=0", "batch=8", "log_every=1", "device=cpu"]


def ranked(environment, work, arguments):
    """What one process of a launcher is told, and its work."""
    os.environ.update(environment)
    work(*arguments)


def launch(work, *arguments):
    """Do the work in two fresh processes of one group, as `torchrun --nproc_per_node 2` would.

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
    assert [process.exitcode for process in processes] == [0, 0]


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
