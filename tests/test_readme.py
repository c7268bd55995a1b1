"""Every block of code in the README runs as it stands, in order, in one folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
TINY = [
    "--set=steps=2",
    "--set=network.channels=[8]",
    "--set=network.mid_attention=false",
    "--set=network.norm_groups=4",
    "--set=samples.every=0",
]


def command(line, cwd):
    """Run one shell line with this interpreter's logsnr; answers its output."""
    arguments = shlex.split(line, comments=True)
    assert arguments[0] == "logsnr", line
    done = subprocess.run(
        [sys.executable, "-m", "logsnr.cli", *arguments[1:]], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder as the README assumes it: the recipes, and an instant's run where `make demo` leaves one."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    command(shlex.join(["logsnr", "train", "recipes/digits.yaml", "--out", "runs/demo", *TINY]), folder)
    return folder


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shell = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    makes = [line.split()[1] for line in shell if line.startswith("make ")]
    assert makes == ["demo", "test"]
    for target in makes:
        assert re.search(rf"^{target}:", makefile, flags=re.M)


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
def test_python_block(block, checkout):
    done = subprocess.run([sys.executable, "-c", block], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_command_lines(checkout):
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.startswith("logsnr")]
    commands = ["sample", "sample", "train", "evaluate", "passport", "compare", "calibrate", "objective", "export"]
    assert [shlex.split(line, comments=True)[1] for line in lines] == commands
    for line in lines:
        extra = " " + shlex.join(TINY) if " train " in line else ""
        command(line.split("#")[0] + extra, checkout)
    for file in ("samples.png", "boots.png", "runs/passport.html", "plan.json", "pipelines/digits/model_index.json"):
        assert (checkout / file).exists()


def test_every_block_is_of_a_kind_that_is_tested():
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
