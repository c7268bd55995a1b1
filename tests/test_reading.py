"""Files from elsewhere: bounded, never quoted, and every fault of theirs one line that names the file and the fix."""

import json
import random
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from faults.damage import of_bytes, of_json, of_yaml
from safetensors import SafetensorError

import logsnr as ls
from logsnr.adapters import GradientEstimationScheduler
from logsnr.calibration.ledger import Ledger
from logsnr.errors import LogsnrError
from logsnr.models import UNetConfig, build_network, load_denoiser, save_denoiser
from logsnr.reading import ALIASES, DEEPEST, check_format, parse_json, parse_yaml, read_arrays, read_text, reading
from logsnr.sampling.counted import Counted
from logsnr.training import load_recipe

PLAN = ls.solvers.unipc(ls.grids.karras(3, 20.0, 0.02))
STOCK = {"_class_name": "GradientEstimationScheduler", "prediction_type": "epsilon", "beta_schedule": "linear"}


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), TypeError("x"), AttributeError("x"), IndexError("x"), OverflowError("x"), ZeroDivisionError("x"),
     RecursionError("x"), MemoryError(), SafetensorError("x"), RuntimeError("x\ny"), ValueError("x"), LogsnrError("x"),
     OSError(5, "Input/output error"), FileNotFoundError(2, "No"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")],
)  # fmt: skip
def test_whatever_a_decoder_raises_names_the_file_and_the_fix(error):
    with pytest.raises(LogsnrError, match=r"^a\.json.*") as caught, reading("a.json", "copy it again", "a plan"):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    assert "copy it again" in str(caught.value) or isinstance(error, LogsnrError)


def test_an_error_that_names_the_file_is_left_alone():
    said = LogsnrError("a.json is bad")
    with pytest.raises(LogsnrError) as caught, reading("a.json", "fix"):
        raise said
    assert caught.value is said


def test_json_has_a_depth():
    deep = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    assert parse_json(deep) == json.loads(deep)
    for depth in (DEEPEST + 1, 500):
        with pytest.raises(LogsnrError, match=f"nested more than {DEEPEST} levels"):
            parse_json("[" * depth + "]" * depth)


def test_whole_numbers_end_where_machines_do():
    assert parse_json(f"[{2**63}, 1e300]") == parse_yaml(f"[{2**63}, 1.0e+300]") == [2**63, 1e300]
    for parse in (parse_json, parse_yaml):
        with pytest.raises(LogsnrError, match=r"beyond 2\^63"):
            parse(f'{{"a": [{2**63 + 1}]}}')


def test_yaml_has_few_aliases_and_they_count_written_out(monkeypatch):
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}
    nine = {b: ", ".join([f"*{a}"] * 9) for a, b in pairwise("abcdefghi")}
    laughs = "a: &a [1, 1]\n" + "".join(f"{name}: &{name} [{of}]\n" for name, of in nine.items())
    with pytest.raises(LogsnrError, match=f"more than {ALIASES} aliases"):
        parse_yaml(laughs)
    with pytest.raises(LogsnrError, match="nested more than"):
        parse_yaml("&a [*a]")
    text = "a: &a [1, 2, 3]\nb: &b [*a, *a]\nc: [*b, *b]"  # 3 + 7 + 10 + 12 values, level by level
    monkeypatch.setattr("logsnr.reading.MOST", 32)
    assert parse_yaml(text)["c"] == [[[1, 2, 3]] * 2] * 2
    monkeypatch.setattr("logsnr.reading.MOST", 31)
    with pytest.raises(LogsnrError, match="more than 31 values"):
        parse_yaml(text)


@pytest.mark.parametrize(
    "text", ["[1, ", "a: b: hunter2", "!hunter2 x", "*hunter2", "%hunter2", "a: !!int ''", "a: 2001-13-45", "'hunter2"]
)
def test_yaml_that_is_none_is_not_quoted(text):
    with pytest.raises(LogsnrError, match="not valid YAML") as caught:
        parse_yaml(text)
    assert "hunter2" not in str(caught.value)


def test_text_ends(tmp_path):
    with pytest.raises(LogsnrError, match="more than 100 bytes"):
        read_text("/dev/zero", largest=100)
    (tmp_path / "x").write_text("é" * 50, encoding="utf-8")
    assert read_text(tmp_path / "x", largest=100) == "é" * 50


def test_a_header_cannot_ask_for_more_than_its_file(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.zeros((4, 8, 8), np.uint8))
    data = file.read_bytes()
    assert read_arrays(file, "fix")["images"].shape == (4, 8, 8)
    for shape in ("(9999999999999, 8, 8)", "(-4, 8, 8)", "(5, 8, 8)"):
        file.write_bytes(data.replace(b"(4, 8, 8), }" + b" " * (len(shape) - 9), f"{shape}, }}".encode()))
        with pytest.raises(LogsnrError, match=r"x\.npy.* more than the file holds"):
            read_arrays(file, "fix")


def test_an_archive_cannot_grow_without_bound(tmp_path, monkeypatch):
    file = tmp_path / "x.npz"
    monkeypatch.setattr("logsnr.reading.SMALL", 2**17)
    np.savez_compressed(file, images=np.zeros((2**12, 8, 8), np.uint8))  # 256 KiB of nothing in 400 bytes
    with pytest.raises(LogsnrError, match=r"x\.npz.*images\.npy would grow \d+ times.*numpy\.savez"):
        read_arrays(file, "fix")
    monkeypatch.setattr("logsnr.reading.memory", lambda: 1000)
    np.savez(file, images=np.zeros((16, 8, 8), np.uint8))
    with pytest.raises(LogsnrError, match=r"of arrays, this machine 1e-06 GB"):
        read_arrays(file, "fix")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "no array")
    assert read_arrays(file, "fix") == {}


def test_a_newer_file_says_so():
    check_format(1, 1, "x", "fix")
    with pytest.raises(
        LogsnrError, match=r"x has format 2, of a newer logsnr \(this one reads 1\): pip install --upgrade"
    ):
        check_format(2, 1, "x", "fix")
    for older in (0, None, "1", True, 0.5):
        with pytest.raises(LogsnrError, match="this version reads format 1: fix"):
            check_format(older, 1, "x", "fix")


def test_newer_plans_recipes_and_ledgers_say_so(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN.to_dict(), "version": 2}))
    (tmp_path / "recipe.yaml").write_text("format: 2\nsteps: 1\n")
    ledger(tmp_path / "ledger.json").write()
    (tmp_path / "ledger.json").write_text((tmp_path / "ledger.json").read_text().replace('"format": 5', '"format": 6'))
    for read, name in ((ls.Plan.load, "plan.json"), (load_recipe, "recipe.yaml"), (ledger, "ledger.json")):
        with pytest.raises(LogsnrError, match=rf"{name}.* of a newer logsnr"):
            read(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text("format: 1\nsteps: 1\n")
    assert load_recipe(tmp_path / "recipe.yaml").steps == 1


def test_a_config_s_text_is_never_a_path(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    path = str(tmp_path / "plan.json")
    assert GradientEstimationScheduler.from_config(STOCK, plan=path).config["plan"] == PLAN.to_dict()
    assert GradientEstimationScheduler.from_config({**STOCK, "plan": json.dumps(PLAN.to_dict())}).config["plan"]
    for plan in (path, [path], {"3": path}, json.dumps([path]), json.dumps({"3": path})):
        with pytest.raises(LogsnrError, match="a text where its numbers should be"):
            GradientEstimationScheduler.from_config({**STOCK, "plan": plan})
        (tmp_path / "scheduler_config.json").write_text(json.dumps({**STOCK, "plan": plan}))
        with pytest.raises(LogsnrError, match="a text where its numbers should be"):
            GradientEstimationScheduler.from_pretrained(tmp_path)


def test_a_file_of_plans_names_no_other(tmp_path):
    file = tmp_path / "plans.json"
    PLAN.save(tmp_path / "plan.json")
    for text in (json.dumps(str(tmp_path / "plan.json")), json.dumps([str(file)]), json.dumps({"3": str(file)})):
        file.write_text(text)
        with pytest.raises(LogsnrError, match=r"plans\.json: the plan holds a text"):
            ls.load_plans(file)
    file.write_text("a secret")
    with pytest.raises(LogsnrError, match=r"plans\.json cannot be read as a plan") as caught:
        ls.load_plans(file)
    assert "secret" not in str(caught.value)


def test_a_network_that_no_memory_holds_is_not_built():
    with pytest.raises(LogsnrError, match=r"at least .* weights: at most 4e"):
        build_network(UNetConfig(channels=(4096,) * 3, layers_per_block=64), (3, 64, 64))
    with pytest.raises(ValueError, match="channels"):
        UNetConfig(channels=(8192,))
    small = {"norm_groups": 4, "mid_attention": False}
    for config in (UNetConfig(channels=(16,), **small), UNetConfig(channels=(8, 16), patch=2, fourier=(1, 2), **small)):
        network = build_network(config, (3, 16, 16))
        most = sum(p.numel() for p in network.parameters())
        assert 0.1 * most < config.least_weights((3, 16, 16)) < most


def test_weights_and_levels_that_no_state_holds_are_refused():
    gauss, generator = ls.exact.Gaussian(torch.zeros(2), torch.eye(2)), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"step 1 .* weighs an estimate by more than 1e\+36"):
        ls.sample(gauss, ls.Plan(sigmas=(9.0, 1.0, 0.0), rows=((1.0,), (1e300, 1.0))), n=1, generator=generator)
    for sigmas in ((1e300, 1.0), (1.0, 1e-300)):
        with pytest.raises(ValueError, match="finite ones in 1e-150"):
            ls.Plan(sigmas=sigmas, rows=((1.0,),))


def ledger(path, seed=0):
    gauss = ls.exact.Gaussian(torch.zeros(2), torch.eye(2))
    return Ledger(Counted(gauss), {"n": 8, "seed": seed}, path, budget=100)


def test_a_ledger_has_a_checksum(tmp_path):
    file = tmp_path / "ledger.json"
    first = ledger(file)
    assert first.recall("error", 0, lambda: [0.125, 2.0]) == [0.125, 2.0]
    assert ledger(file).known == first.known
    text = file.read_text()
    file.write_text(text.replace("0.125", "0.126"))
    with pytest.raises(LogsnrError, match=r"ledger\.json was altered"):
        ledger(file)
    data = json.loads(text)
    del data["sha256"]
    file.write_text(json.dumps({**data, "format": 4}))  # what was written before has none
    assert ledger(file).known == first.known


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each kind, and what reads it."""
    folder = tmp_path_factory.mktemp("files")
    config = UNetConfig(channels=(8,), layers_per_block=1, mid_attention=False, norm_groups=4)
    network = build_network(config, (1, 4, 4))
    save_denoiser(ls.NetworkDenoiser(network, ls.predictions.V(), shape=(1, 4, 4)), folder, training={"batch": 3})
    PLAN.save(folder / "plan.json")
    (folder / "plans.json").write_text(json.dumps({"3": PLAN.to_dict()}))
    (folder / "recipe.yaml").write_text(
        "steps: 2\nnetwork: {channels: [8], norm_groups: 4, head_dim: 8}\nobjective: {preset: edm}\n"
    )
    kept = ledger(folder / "ledger.json")
    kept.recall("error", 0, lambda: {"rows": [[0.125, 2.0]], "name": "GE"})
    ls.GaussianStart.fit(torch.randn(16, 1, 4, 4)).save(folder / "start.safetensors")
    return folder


READERS = {
    "plan.json": (of_json, ls.Plan.load),
    "plans.json": (of_json, ls.load_plans),
    "recipe.yaml": (of_yaml, load_recipe),
    "card.json": (of_json, lambda file: load_denoiser(file.parent)),
    "ledger.json": (of_json, ledger),
    "start.safetensors": (of_bytes, ls.GaussianStart.load),
}


def refusal(read, file):
    """What the reader says of a file that it does not take; None of one that it does."""
    try:
        read(file)
    except LogsnrError as error:
        return str(error)


@pytest.mark.parametrize("name", READERS)
def test_damage_at_random_is_a_clear_error_or_none(files, name):
    """A few of the mutations of `make faults`: whatever Python reads is whole, or refused by name."""
    mutate, read = READERS[name]
    file, chance = files / name, random.Random(name)
    whole = file.read_bytes()
    try:
        for _ in range(20):
            file.write_bytes(mutate(whole, chance))
            said = refusal(read, file)
            assert said is None or name in said or ".safetensors" in said, said
            assert said is None or (said.isprintable() and len(said) < 3000)
    finally:
        file.write_bytes(whole)
    read(file)


@pytest.mark.parametrize("key", ["samples.steps", "samples.count", "objective.adaptive.bins", "batch", "network.patch"])
def test_numbers_of_a_recipe_are_bounded(key):
    for number in (10**12, 10**400):
        with pytest.raises(LogsnrError, match=rf"{key} = 1000.*less than or equal to"):
            load_recipe("digits", {key: number})
