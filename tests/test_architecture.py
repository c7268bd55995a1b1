"""The house keeps its floors: a room imports from lower floors (or its own package), and the core stays light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import logsnr

ROOT = Path(logsnr.__file__).parent
FLOORS = [
    [
        "errors",
        "interrupts",
        "paths",
        "noise",
        "pixels",
        "images",
        "terminal",
        "theory",
        "projection",
        "estimate",
        "permission",
    ],
    ["reading", "writing", "devices", "gaussian", "timesteps", "zoo"],
    ["files", "predictions", "schedules"],
    ["weightings", "denoiser", "posterior"],
    ["exact", "guidance", "gradients", "uncertainty", "objectives", "sampling"],
    ["grids", "solvers", "models", "likelihood", "report", "generation"],
    ["calibration", "adapters", "training", "plot"],
    ["loading", "describe", "evaluation"],
    ["demo"],
    ["cli"],
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ("diffusers", "transformers", "accelerate", "sklearn", "gradio", "matplotlib")


def modules():
    return [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]


def room(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """Rooms of logsnr that a module imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] if node.module != "logsnr" else [f"logsnr.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("logsnr."):
                yield name.split(".")[1]


def test_every_room_has_a_floor():
    assert {room(p) for p in modules()} == set(FLOOR)


def test_the_guide_for_contributors_shows_these_floors():
    guide = (ROOT.parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for level, rooms in enumerate(FLOORS):
        assert f"| {level} | {' '.join(f'`{room}`' for room in rooms)} |" in guide


def test_no_upward_imports():
    wrong = [
        f"{path.relative_to(ROOT)} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"
        for path in modules()
        for here in [room(path)]
        for there in imports(path)
        if there != here and FLOOR[there] >= FLOOR[here]
    ]
    assert not wrong, "\n".join(wrong)


def test_import_logsnr_is_light():
    """Heavy libraries come in only with the parts that need them."""
    code = f"import sys, logsnr; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rooms_stay_readable():
    long = {str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text().splitlines())) > 420}
    assert not long


def test_public_names_exist_and_are_documented():
    for name in logsnr.__all__:
        assert getattr(logsnr, name).__doc__, name
    assert (ROOT / "py.typed").exists()


def test_no_name_of_a_package_hides_a_module_of_it():
    """`logsnr.load` is a function, so no module is called so: every module is reached by its own path."""
    hidden = []
    for path in modules():
        name = ".".join(["logsnr", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        package, _, last = name.rpartition(".")
        if getattr(importlib.import_module(package), last) is not module:
            hidden.append(name)
    assert not hidden
