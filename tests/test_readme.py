"""Every block of code in the README runs as it stands, in order, in one folder."""

import re
import shlex
import subprocess
import sys

import pytest
from blocks import ROOT
from printed import SMALLER, TINY, command

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder as the README assumes it: the recipes, and an instant's run where `make demo` leaves one."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command(shlex.join(["logsnr", "train", "recipes/digits.yaml", "--out", "runs/demo", *TINY]))
        yield folder


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shell = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    makes = [line.split()[1] for line in shell if line.startswith("make ")]
    assert makes == ["demo", "test"]
    for target in makes:
        assert re.search(rf"^{target}:", makefile, flags=re.M)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
def test_python_block(block, checkout, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.usefixtures("short_passports")
@pytest.mark.heavy
def test_command_lines(checkout):
    """In this process, where torch and diffusers are loaded; one that needs little in its own, as a shell would."""
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.startswith("logsnr")]
    commands = [
        "sample",
        "sample",
        "generate",
        "train",
        "evaluate",
        "stats",
        "evaluate",
        "passport",
        "compare",
        "calibrate",
        "objective",
        "export",
        "zoo",
    ]
    assert [shlex.split(line, comments=True)[1] for line in lines] == commands
    for line in lines:
        name = line.split()[1]
        if name == "objective":
            program = [sys.executable, "-m", "logsnr.cli", *shlex.split(line, comments=True)[1:]]
            done = subprocess.run(program, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        else:
            command(f"{line.split('#')[0]} {SMALLER.get(name, '')}")
    made = [
        "samples.png",
        "bags.png",
        "shards/generated.json",
        "runs/passport.html",
        "plan.json",
        "pipelines/digits/model_index.json",
    ]
    for file in made:
        assert (checkout / file).exists()


def test_every_block_is_of_a_kind_that_is_tested():
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
