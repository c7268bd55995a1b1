"""The command line: what it prints, what it writes, and one clear line with exit code 2 for bad input."""

import errno
import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import logsnr as ls
from logsnr import likelihood
from logsnr.cli import main
from logsnr.errors import LogsnrError

TINY = ["steps=3", "max_seconds=null", "optimizer.decay=constant", "samples.every=0", "batch=8", "device=cpu"]
TINY += ["network.channels=[8]", "network.layers_per_block=1", "network.mid_attention=false", "network.norm_groups=4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run trained for three steps by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = [piece for text in TINY for piece in ("--set", text)]
    before, sys.argv = sys.argv, ["logsnr", "train", "digits", "--out", str(folder), "--json", *arguments]
    with pytest.raises(SystemExit) as stop:
        main()
    sys.argv = before
    assert stop.value.code == 0
    return folder


@pytest.fixture(scope="module")
def bad(tiny, tmp_path_factory):
    """A folder of things that went wrong."""
    folder = tmp_path_factory.mktemp("bad")
    plan = ls.solvers.ddim(ls.grids.from_sigmas([4.0, 2.0, 1.0])).to_dict()
    (folder / "unsorted.json").write_text(json.dumps({**plan, "sigmas": [4.0, 1.0, 2.0]}))
    np.save(folder / "nan.npy", np.full((4, 8, 8), np.nan, dtype=np.float32))
    np.save(folder / "float.npy", np.zeros((4, 8, 8), dtype=np.float32))
    np.save(folder / "flat.npy", np.zeros((4, 64), dtype=np.uint8))
    np.savez(folder / "whole.npz", images=np.zeros((50, 8, 8), dtype=np.uint8))
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:1000])
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_bytes(b"not a picture")
    for name in ("flipped", "another"):
        shutil.copytree(tiny, folder / name)
    weights = next((folder / "flipped").glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    card = json.loads((folder / "another" / "card.json").read_text())
    card["network"]["channels"] = [16]
    (folder / "another" / "card.json").write_text(json.dumps(card))
    return folder


def test_train_leaves_a_run_that_loads_and_resumes(run, tiny):
    denoiser = ls.load(tiny)
    assert denoiser.card["step"] == 3
    arguments = [piece for text in TINY for piece in ("--set", text)]
    code, out, _ = run("train", "digits", "--out", tiny, "--json", "--resume", *arguments, "--set", "steps=4")
    assert code == 0
    assert json.loads(out)["steps"] == 4
    read = "digits: 1,797 images (297 held out), 8 x 8 in grey, 17 grey levels; 10 classes: 0 178, 1 182, "
    assert json.loads(out)["data"].startswith(read)
    code, out, err = run("train", "digits", "--out", tiny, "--resume", *arguments, "--set", "steps=4")
    assert code == 0
    assert err.startswith(read)
    code, out, err = run("train", "digits", "--out", tiny, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert "already holds a run" in err


@pytest.mark.parametrize("solver", ["ge", "ddim", "ddpm", "adams-bashforth", "ipndm", "deis", "dpmpp", "unipc"])
def test_sample_counts_and_repeats(run, tiny, tmp_path, solver):
    arrays = []
    for name in ("a.npy", "b.npy"):
        code, out, _ = run(
            "sample", tiny, "--solver", solver, "--nfe", 4, "-n", 6, "--seed", 3, "--out", tmp_path / name, "--json"
        )
        assert code == 0
        facts = json.loads(out)
        assert (facts["nfe"], facts["images"], facts["seed"]) == (4, 6, 3)
        arrays.append(np.load(tmp_path / name))
    assert np.array_equal(*arrays)
    assert arrays[0].dtype == np.uint8
    assert arrays[0].max() <= 16


def test_sample_is_the_python_api(run, tiny, tmp_path):
    code, _, _ = run(
        "sample", tiny, "--nfe", 5, "-n", 4, "--seed", 1, "--class", 7, "--chunk", 3, "--out", tmp_path / "x.npy"
    )
    assert code == 0
    denoiser = ls.load(tiny)
    noise = torch.randn(4, *denoiser.shape, generator=torch.Generator().manual_seed(1))
    x = ls.sample(denoiser, 5, noise=noise, cond={"class_labels": torch.full((4,), 7)})
    assert np.abs(np.load(tmp_path / "x.npy").astype(int) - denoiser.decode(x).numpy().astype(int)).max() <= 1


def test_sample_runs_a_plan_file_and_draws_a_picture(run, tiny, tmp_path):
    ls.solvers.ddim(ls.grids.karras(3, 20.0, 0.02)).save(tmp_path / "plan.json")
    code, out, _ = run("sample", tiny, "--plan", tmp_path / "plan.json", "-n", 9, "--out", tmp_path / "new" / "x.png")
    assert code == 0
    assert "9 images, 3 evaluations each" in out
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.size == (3 * 64 + 2 * 2, 3 * 64 + 2 * 2)


def test_sample_takes_the_models_own_plan_unless_another_sampler_is_asked_for(run, tiny, tmp_path):
    model = tmp_path / "run"
    shutil.copytree(tiny, model)
    own = ls.solvers.deis(ls.grids.karras(3, 20.0, 0.02))
    (model / "plans.json").write_text(json.dumps({"3": own.to_dict()}))
    assert ls.load_plans(model) == {3: own}

    def facts(*options):
        code, out, _ = run("sample", model, *options, "-n", 2, "--out", tmp_path / "x.npy", "--json")
        assert code == 0
        return json.loads(out)

    def meta(*options):
        return facts(*options)["plan"]

    assert meta("--nfe", 3) == own.meta
    assert meta("--nfe", 3, "--guidance", 2, "--class", 1) == own.meta
    assert meta("--nfe", 4)["solver"] == "universal"  # there is no own plan of four
    assert meta("--nfe", 13)["solver"] == "default"
    assert meta("--nfe", 3, "--solver", "ge")["solver"] == "ge"
    ends = facts("--nfe", 3, "--sigma-max", 19, "--sigma-min", 0.1)
    assert (ends["sigmas"][0], ends["plan"]["solver"]) == (19, "default")
    denoiser = ls.load(model)
    plan = ls.universal_plan(5, denoiser.sampling_range[0], 9.0, sigma_data=denoiser.sigma_data)
    told = facts("--nfe", 5, "--solver", "universal", "--sigma-max", 9)
    assert (told["sigmas"], told["plan"]) == ([plan.sigmas[0], plan.sigmas[-2]], plan.meta)
    with pytest.raises(LogsnrError, match=r"has no plans \(.*plans.json is missing\): make one with logsnr calibrate"):
        ls.load_plans(tiny)


@pytest.mark.parametrize(
    "line",
    [
        "sample {} --nfe 2 -n 4 --out a.png",
        "evaluate {} --evaluations 8 --limit 8",
        "information {} --evaluations 8 --limit 8",
        "compare {} --nfe 1 -n 3 --solvers ge --no-peers --features pixels --teacher-steps 16",
        pytest.param("calibrate {} --nfe 1 -n 4 --rollouts 40", marks=pytest.mark.heavy),
        pytest.param("passport {} --images 32 --trajectories 2 --out p.html", marks=pytest.mark.heavy),
    ],
)
@pytest.mark.usefixtures("short_passports")
def test_every_command_takes_a_device_and_a_precision(tiny, run, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    command = [word.format(tiny) for word in line.split()]
    code, out, err = run(*command, "--device", "cpu", "--dtype", "bf16", "--json")
    assert code == 0, err
    assert json.loads(out)
    for option, value, words in (
        ("--device", "cuda:99", "this machine has"),
        ("--dtype", "int8", "is not one of fp32"),
    ):
        code, _, err = run(*command, option, value)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err


def test_bits_in_parts_by_two_processes(tiny, run, tmp_path, monkeypatch):
    """The processes of torchrun, one after the other; then the same line has the whole, without an evaluation."""
    monkeypatch.chdir(tmp_path)
    whole = likelihood.bits_per_dim_in_parts
    monkeypatch.setattr(likelihood, "bits_per_dim_in_parts", partial(whole, part=100))
    line = ("evaluate", tiny, "--evaluations", 8, "--parts", "bits")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, out, err = run(*line)
        assert code == 0, err
        assert ("1 parts are there" in out) == (rank == "1")
    assert "name a folder for them with --parts" in run(*line[:-2])[2]
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    code, again, _ = run(*line)
    assert again.splitlines()[-1] == out.splitlines()[-1]
    assert len(list((tmp_path / "bits").iterdir())) == 3
    code, _, err = run(*line, "--seed", 1)
    assert (code, err.count("\n")) == (2, 1)


def test_bits_to_a_tolerance(tiny, run):
    code, out, err = run("evaluate", tiny, "--evaluations", 8, "--limit", 32, "--tolerance", 0.2, "--json")
    assert code == 0, err
    assert json.loads(out)["stderr"] <= 0.2


def test_a_network_is_compiled_in_place():
    denoiser = ls.load("zoo:digits", compile=True)
    assert denoiser.network._compiled_call_impl is not None
    assert set(denoiser.state_dict()) == set(ls.load("zoo:digits").state_dict())


def test_a_plan_that_no_disk_takes_is_on_stdout(run, tiny, tmp_path, monkeypatch):
    """The search is over, the disk is full: the plan is not lost with the file."""
    found = []

    def full(plan, path):
        found.append(plan)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(ls.Plan, "save", full)
    out_file = tmp_path / "plan.json"
    code, out, err = run("calibrate", tiny, "--nfe", 2, "-n", 8, "--rollouts", 40, "--out", out_file)
    assert (code, ls.Plan.from_dict(json.loads(out))) == (2, found[0])
    assert f"no space left on the device for {out_file}" in err
    assert not out_file.exists()


def test_calibrate_writes_a_plan_that_sample_runs(run, tiny, tmp_path):
    arguments = ("calibrate", tiny, "--nfe", 2, "-n", 8, "--rollouts", 40, "--out", tmp_path / "plan.json")
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    facts = json.loads(out)
    plan = ls.Plan.load(tmp_path / "plan.json")
    assert (plan.nfe, plan.hash) == (2, facts["hash"])
    assert facts["report"]["rmse"] <= 1.5 * min(facts["report"]["alternatives"].values())
    code, out, _ = run("sample", tiny, "--plan", tmp_path / "plan.json", "-n", 2, "--out", tmp_path / "x.npy", "--json")
    assert code == 0
    assert json.loads(out)["nfe"] == 2


def test_evaluate_is_the_python_api(run, tiny):
    arguments = ("evaluate", tiny, "--evaluations", 8, "--limit", 20, "--seed", 5)
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["images"] == 20
    assert facts["grey_levels"] == 17
    assert facts["evaluations"] == 160
    assert facts["pilot_evaluations"] == 192  # the smallest pilot
    assert facts["bits_per_dim"] == pytest.approx(facts["diffusion"] + facts["reconstruction"] + facts["prior"])
    assert facts["logsnr_range"] == pytest.approx(ls.likelihood.default_logsnr_range(17))
    code, out, _ = run(*arguments)
    assert code == 0
    assert f"{facts['bits_per_dim']:.4f} +- {facts['stderr']:.4f} bits/dim" in out


@pytest.mark.parametrize("command", ["demo", "train", "sample", "evaluate", "objective", "export", "calibrate"])
def test_help_shows_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: logsnr {command}" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sample", "nowhere"], ["nowhere", "card.json"]),
        (["sample", "{run}", "--solver", "magic"], ["'magic'", "ddim, ge, unified, ddpm, adams-bashforth"]),
        (["sample", "{run}", "--out", "x.gif"], ["x.gif", ".png"]),
        (["sample", "{run}", "--class", "12"], ["12", "0 ... 9"]),
        (["sample", "{run}", "--sigma-max", "0.001"], ["0.001"]),
        (["sample", "{run}", "--gamma", "nan"], ["nan"]),
        (["sample", "{run}", "--grid", "cubic"], ["'cubic'", "log-linear, karras"]),
        (["sample", "{run}", "--order", "2"], ["order = 2", "ge has no order"]),
        (["sample", "{run}", "--solver", "unipc", "--order", "9"], ["order", "9"]),
        (["sample", "{run}", "--plan", "{bad}/unsorted.json"], ["sigmas[2] = 2.0", "strictly decrease"]),
        (["sample", "{run}", "--plan", "p.json", "--nfe", "5"], ["--nfe 5 with --plan p.json", "leave one"]),
        (["sample", "{run}", "--plan", "p.json", "--solver", "ddim"], ["--solver ddim with --plan", "leave one"]),
        (["sample", "{run}", "--plan", "p.json", "--gamma", "1.5"], ["--gamma 1.5 with --plan", "leave one"]),
        (["sample", "{run}", "--plan", "p.json", "--sigma-max", "9"], ["--sigma-max 9.0 with --plan", "leave one"]),
        (["compare", "{run}", "--features", "none", "--data", "digits"], ["--data digits", "--features none"]),
        (["sample", "{bad}/flipped"], ["model-", "altered"]),
        (["evaluate", "{bad}/another"], ["another network"]),
        (["train", "digits", "--set", "data.source={bad}/nan.npy"], ["nan.npy", "NaN"]),
        (["train", "digits", "--set", "data.source={bad}/float.npy"], ["float.npy", "uint8"]),
        (["train", "digits", "--set", "data.source={bad}/flat.npy"], ["flat.npy", "shape"]),
        (["train", "digits", "--set", "data.source={bad}/cut.npz"], ["cut.npz"]),
        (["train", "digits", "--set", "data.source={bad}/empty"], ["empty"]),
        (["train", "digits", "--set", "data.source={bad}/broken"], ["a.png"]),
        (["evaluate", "{run}", "--evaluations", "5"], ["5", "multiple of 8"]),
        (["evaluate", "{run}", "--data", "missing.npz"], ["missing.npz", "does not exist"]),
        (["evaluate", "{run}", "--logsnr-min", "9", "--logsnr-max", "2"], ["(9.0, 2.0)", "lo < hi"]),
        (["train", "missing.yaml"], ["missing.yaml"]),
        (
            ["train", "digits", "--set", "optimizer.warm_up=1"],
            ["optimizer: key 'warm_up'", "did you mean 'warmup'?"],
        ),
        (["train", "digits", "--set", "batch"], ["'batch'", "="]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tiny, bad, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*[a.format(run=tiny, bad=bad) for a in args])
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("logsnr: error: ")
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_also_exit_with_2(run):
    code, _, err = run("sample", "somewhere", "--nfe", "0")
    assert code == 2
    assert "nfe" in err


def test_unconditional_models_have_no_class(run, tmp_path):
    arguments = [piece for text in [*TINY, "conditional=false", "steps=1"] for piece in ("--set", text)]
    assert run("train", "digits", "--out", tmp_path / "plain", *arguments)[0] == 0
    code, _, err = run("sample", tmp_path / "plain", "--class", 3)
    assert code == 2
    assert "unconditional" in err
    code, _, _ = run("sample", tmp_path / "plain", "--nfe", 1, "-n", 2, "--out", tmp_path / "x.npy")
    assert code == 0
    assert run("evaluate", tmp_path / "plain", "--evaluations", 8, "--limit", 2)[0] == 0
