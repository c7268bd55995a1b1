"""Write the pages that `make test-browser` looks at: the three reports, of small measurements, into a folder.

python tests/browser_pages.py FOLDER
"""

import sys
from functools import partial
from pathlib import Path

import torch

import logsnr as ls
from logsnr.demo import run as demo
from logsnr.evaluation.compare import measure, ours, peers, plans, write
from logsnr.evaluation.features import train_classifier
from logsnr.evaluation.passport import examine
from logsnr.evaluation.passport.page import write_passport
from logsnr.training.config import DataConfig
from logsnr.training.data import load_data

TINY = {"steps": 40, "network.channels": [8], "network.mid_attention": False, "network.norm_groups": 4}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    denoiser = ls.load("zoo:digits")
    cond = {"class_labels": torch.arange(10)}
    entries = [*ours(denoiser, [5, 8], solvers=["ge", "unipc"]), *peers(denoiser, [5, 8], solvers=["DDIM", "DPM++"])]
    entries += plans(denoiser, {"mine": denoiser.plans[5]})
    write(measure(denoiser, entries, n=10, cond=cond, teacher_steps=40), folder)

    demo.SAMPLES, demo.TEACHER_STEPS = 100, 40
    demo.train_classifier = partial(train_classifier, epochs=2)
    demo.bits_per_dim = partial(ls.bits_per_dim, evaluations_per_image=8)
    demo.run_demo(folder / "demo", quiet=True, overrides=TINY)

    data = load_data(DataConfig(source="digits"))
    x, labels = denoiser.encode(data.test_images[:64]), data.test_labels[:64]
    write_passport(examine(denoiser, x, cond={"class_labels": labels}, trajectories=4), folder / "passport.html")
