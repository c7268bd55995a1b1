"""Every block of the docs runs as printed, page by page, in a folder that holds what the page takes for granted."""

import io
import json
import re
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import ROOT, blocks, python
from PIL import Image
from printed import NOT_RUN, SMALLER, TINY, appears, command, run

import logsnr as ls
from logsnr.adapters import export_diffusers
from logsnr.sampling.plan import save_plans

OUTPUT = "output"
"""Title of a block that says what the block before it prints."""
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if blocks(page))


# What pages take for granted, by the words of a block that ask for it: each is a function of nothing, in the page's
# folder, before the page's first block.


def a_run():
    command(" ".join(["logsnr --quiet train", str(ROOT / "recipes/digits.yaml"), "--out runs/digits", *TINY]))
    Path("runs/cifar10").symlink_to("digits")


def pipelines():
    import tiny

    for name in ("owner/name", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        tiny.stable_diffusion().save_pretrained(name)


def prompts():
    Path("prompts.txt").write_text("a red fox\na blue bird\n", encoding="utf-8")


def a_plan():
    ls.load("zoo:digits").plans[5].save("plan.json")


def several_plans():
    levels = {n: ls.grids.log_linear(n, 14.0, 0.03) for n in (5, 8)}
    save_plans({n: ls.solvers.ge(grid) for n, grid in levels.items()}, "plans.json")


def drawings(*folders, each=20):
    for number, folder in enumerate(folders):
        Path(folder).mkdir(parents=True)
        for i in range(each):
            drawn = np.random.default_rng((number, i)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(drawn).save(f"{folder}/{i}.png")


def fashion():
    images, labels = np.random.default_rng(0).integers(0, 256, (64, 28, 28), dtype=np.uint8), np.arange(64) % 10
    np.savez("fashion_mnist.npz", x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])


def cifar10():
    rows = bytes(2 * 3073)
    with tarfile.open("cifar-10-binary.tar.gz", "w:gz") as tar:
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(rows)
            tar.addfile(entry, io.BytesIO(rows))


def statistics():
    command("logsnr --quiet stats digits --features pixels --out digits.npz")


def options_of_edm():
    text = json.dumps({"loss_kwargs": {"class_name": "training.loss.EDMLoss"}, "network_kwargs": {}})
    Path("training_options.json").write_text(text, encoding="utf-8")


def exported():
    export_diffusers(ls.load("zoo:digits"), Path("pipelines/digits"), keep_classes=True)


def a_vae():
    import tiny

    tiny.vae().save_pretrained("sd-vae")


ASKED_FOR = {
    "sd-vae": a_vae,
    "runs/": a_run,
    "owner/name": pipelines,
    "stable-diffusion-v1-5/": pipelines,
    "prompts.txt": prompts,
    "plan.json": a_plan,
    "plans.json": several_plans,
    "pictures": partial(drawings, "pictures/red", "pictures/blue", each=170),
    "folder/of/images": partial(drawings, "folder/of/images", each=40),
    "fashion_mnist.npz": fashion,
    "cifar-10-binary": cifar10,
    "digits.npz": statistics,
    "pipelines/digits": exported,
    "training_options.json": options_of_edm,
}


def names_of_diffusers():
    """A pipeline in hand, and plans for it."""
    import tiny

    plans = {f"plan_{n}": ls.solvers.ge(ls.grids.log_linear(n, 14.0, 0.03)) for n in (6, 10)}
    plans["plan_6"].save("plan.json")
    latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pipe": tiny.stable_diffusion(), "latents": latents, **plans}


NAMES = {"diffusers": names_of_diffusers}
"""Names that the first block of a page takes for granted."""


@pytest.fixture
def prepared(tmp_path, monkeypatch, short_passports):
    """Of a page's text: a folder with what it asks for and does not make; minutes of calibration as moments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("LOGSNR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ls, "calibrate", partial(ls.calibrate, n=6, rollouts=40, teacher=16))
    for name in ("recipes", "examples"):
        Path(name).symlink_to(ROOT / name)

    def prepare(page, text):
        words = [
            word
            for word in ASKED_FOR
            if word in text and not re.search(rf"(--out|-o) {re.escape(word)}(?![\w.])", text)
        ]
        for make in dict.fromkeys(ASKED_FOR[word] for word in words):
            make()
        return dict(NAMES.get(page.stem, dict)())

    return prepare


def in_order(page, kinds, prepare, capsys, smaller=SMALLER):
    chosen = [block for block in blocks(page) if block.kind in kinds]
    names = prepare(page, "".join(block.text for block in chosen))
    told = ""
    for block in chosen:
        if block.title == OUTPUT:
            appears(block.text, told)
        else:
            capsys.readouterr()
            run(page, block, names, smaller)
            told = "".join(capsys.readouterr())


def of(pages, heavy):
    return [pytest.param(page, id=page.stem, marks=[pytest.mark.heavy] * (page.stem in heavy)) for page in pages]


SLOW_PYTHON = {
    "calibration",
    "likelihood",
    "objectives",
    "five-steps",
    "first-hour",
    "index",
    "compare",
    "passport",
    "pipelines",
    "start",
}
"""Pages whose Python is left to `make docs`."""
SHELLS = [
    page
    for page in PAGES
    if page.stem != "first-hour" and any(block.kind in ("sh", "yaml", "json") for block in blocks(page))
]
QUICK = {"adaptive"}
"""Pages whose commands are quick."""


@pytest.mark.parametrize("page", of([page for page in PAGES if python(page)], SLOW_PYTHON))
def test_python_of_a_page_runs_in_order(page, prepared, capsys):
    in_order(page, {"python"}, prepared, capsys)


@pytest.mark.filterwarnings("default")  # a command tells them, and goes on
@pytest.mark.parametrize("page", of(SHELLS, {page.stem for page in SHELLS} - QUICK))
def test_all_blocks_of_a_page_run_in_order(page, prepared, capsys):
    in_order(page, {block.kind for block in blocks(page)}, prepared, capsys)


@pytest.mark.heavy
@pytest.mark.filterwarnings("default")
def test_the_first_hour_is_literally_true(tmp_path, monkeypatch, capsys):
    """Nothing is made ready, nothing is made smaller, and what is printed appears."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "first-hour.md"
    in_order(page, {"sh", "python", "text"}, lambda page, text: {}, capsys, smaller={})


def test_blocks_that_do_not_run_say_why():
    every = [(page.name, block) for page in [ROOT / "README.md", *PAGES] for block in blocks(page) if block.title]
    left = [(page, block.title.removeprefix(NOT_RUN)) for page, block in every if block.title.startswith(NOT_RUN)]
    assert left == [
        ("devices.md", "needs a second GPU"),
        ("metrics.md", "needs EDM's files"),
        ("recipes.md", "make test-recipes runs every recipe"),
        ("recipes.md", "it is of the folder examples"),
    ]
    assert [block.title for _, block in every if block.kind == "yaml"] == ["pictures.yaml"]


def unfenced(text):
    """Lines that begin code by four spaces, outside of fences and lists."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    paragraphs = re.split(r"\n\s*\n", text)
    found, listed = [], False
    for paragraph in paragraphs:
        first = paragraph.splitlines()[0] if paragraph.strip() else ""
        if not first.startswith(" "):
            listed = re.match(r"([-*:]|\d+\.) ", first) is not None or "\n:   " in paragraph
        elif not listed and first.startswith("    "):
            found.append(first)
    return found


def test_code_is_fenced_so_that_it_runs():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/reference").glob("*.md"))]
    assert {page.name: lines for page in pages if (lines := unfenced(page.read_text(encoding="utf-8")))} == {}
    assert unfenced("Words:\n\n    logsnr zoo\n\n- a list\n\n    goes on\n") == ["    logsnr zoo"]


# A result table: a table of Markdown with three or more cells, beside its first column, that begin with a decimal.
MEASURED = re.compile(r"[*+~-]*\d*\.\d")
# A command: a line of code, indented, fenced or between backticks, that runs something of this repository.
COMMAND = re.compile(
    r"(?:^|`)[ \t]*(?:\w+=\S+ )*(?:torchrun |make [a-z]|logsnr [a-z]|python (?:benchmarks|tools|tests)/)", re.M
)


def sections(page):
    """A page by its `##`; of docs/results all of it, which is what one command wrote."""
    text = page.read_text(encoding="utf-8")
    return [text] if page.parent.name == "results" else re.split(r"^(?=## )", text, flags=re.M)


def is_result(table):
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return sum(bool(MEASURED.match(cell)) for row in rows for cell in row[1:]) >= 3


def unexplained(section):
    """Result tables of a section without a command, by their first lines."""
    tables = re.findall(r"(?:^[ ]*\|.*\|[ ]*$\n?)+", section, flags=re.M)
    return [] if COMMAND.search(section) else [table.splitlines()[0] for table in tables if is_result(table)]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_every_table_of_results_has_its_command(page):
    assert [table for section in sections(page) for table in unexplained(section)] == []


def test_a_table_of_results_without_a_command_is_found():
    table = "| model | 5 | 8 |\n| --- | --- | --- |\n| a | **.123** | .045 +- .001 |\n| b | 1.20 | - |\n"
    words = "| option | meaning |\n| --- | --- |\n| `a` | 0.5 by default |\n"
    assert unexplained(f"Measured by hand:\n\n{table}") == ["| model | 5 | 8 |"]
    assert unexplained(words) == []
    for told in (
        "`python benchmarks/few_step.py --data x`",
        "    logsnr compare zoo:digits --nfe 5",
        "`OMP_NUM_THREADS=1 make bench`",
    ):
        assert unexplained(f"{told}\n\n{table}") == []
    assert unexplained(f"see benchmarks/few_step.py\n\n{table}") == ["| model | 5 | 8 |"]
