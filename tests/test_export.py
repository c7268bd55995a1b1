"""Export: plain diffusers samples from the folder what we sample from the run, or the export says why not."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import logsnr as ls
from logsnr.adapters.diffusers.export import export_diffusers
from logsnr.adapters.diffusers.pipelines import denoiser_from
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.models import UNetConfig, build_network
from logsnr.noise import sigma_from_flow_time
from logsnr.pixels import Pixels
from logsnr.predictions import EDM, X0, Eps, Flow, Prediction, Score, V, label_edm
from logsnr.timesteps import TimestepTable

diffusers = pytest.importorskip("diffusers")

SHAPE = (3, 8, 8)
ZERO_SNR = TimestepTable([0.999, 0.9, 0.6, 0.3, 0.05, 0.0], name="mine")


def denoiser(prediction: Prediction, trained_range=(5e-4, math.inf), **config) -> NetworkDenoiser:
    options = {"channels": (8, 16), "layers_per_block": 1, "norm_groups": 4, "head_dim": 8, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(UNetConfig(**options), SHAPE)
        torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
        torch.nn.init.normal_(network.unet.conv_out.bias, std=0.1)
    out = NetworkDenoiser(network, prediction, shape=SHAPE, pixels=Pixels(256), trained_range=trained_range)
    return out.eval().requires_grad_(False)


def run_pipeline(folder, n: int, scheduler=None, classes=None, **changes):
    """(images, the pipeline) of stock diffusers, as anyone would call it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    edm = "sigma_data" in pipe.scheduler.config
    assert type(pipe) is (diffusers.ConsistencyModelPipeline if edm else diffusers.DDPMPipeline)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None or changes:
        pipe.scheduler = (scheduler or type(pipe.scheduler)).from_config(pipe.scheduler.config, **changes)
    call = {} if classes is None else {"class_labels": classes}
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, generator=generator, num_inference_steps=n, output_type="np", **call).images
    return torch.from_numpy(images).permute(0, 3, 1, 2), pipe


def images_of(model, plan: ls.Plan, **cond) -> torch.Tensor:
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return (ls.sample(model, plan, noise=noise, cond=cond) / 2 + 0.5).clamp(0, 1)


def levels(pipe, prediction: Prediction) -> list[float]:
    """Noise levels at the timesteps that the pipeline has visited: what the model's own label calls them."""
    table = {
        "ddpm": TimestepTable.ddpm(),
        "stable-diffusion": TimestepTable.stable_diffusion(),
        "cosine": TimestepTable.cosine(),
    }.get(prediction.label, prediction.label)
    steps = pipe.scheduler.timesteps.tolist()
    if isinstance(prediction, EDM) and prediction.label in ("edm", label_edm):
        return [*(math.exp(4 * t) for t in steps), 0.0]
    if isinstance(table, TimestepTable):
        return [*(table.sigma(float(t)) for t in steps), 0.0]
    return [*(sigma_from_flow_time(t / 1000) for t in steps), 0.0]


def assert_close(a, b, tolerance=2e-5):
    assert float(b.std()) > 0.01
    assert 0 < float(((b > 0) & (b < 1)).float().mean())
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
    assert error <= tolerance, f"{error:.2e}"


@pytest.mark.parametrize(
    "prediction",
    [
        V(label="ddpm"),
        Eps(label="stable-diffusion"),
        V(label=TimestepTable.stable_diffusion()),
        X0(label="flow"),
        EDM(sigma_data=1.0, label="ddpm"),
        EDM(sigma_data=0.7, label="edm"),
        *(
            pytest.param(prediction, marks=pytest.mark.heavy)
            for prediction in (
                X0(label="cosine"),
                V(label="flow"),
                EDM(sigma_data=1.0, label="flow"),
                EDM(sigma_data=2.5, label=label_edm),
            )
        ),
    ],
    ids=lambda p: f"{p.name}-{p.label if isinstance(p.label, str) else 'table'}",
)
def test_stock_sampling_is_ours(prediction, tmp_path):
    """DPM-Solver, as exported and cut down to first order (DDIM), on the levels that its labels name."""
    model = denoiser(prediction, trained_range=(5e-4, 200.0))
    assert export_diffusers(model, tmp_path / "out") == tmp_path / "out"
    theirs, pipe = run_pipeline(tmp_path / "out", 12)
    grid = levels(pipe, prediction)
    assert_close(theirs, images_of(model, ls.solvers.dpmpp(grid, 2, form="published", final="ramp")))
    theirs, pipe = run_pipeline(tmp_path / "out", 12, solver_order=1)
    assert_close(theirs, images_of(model, ls.solvers.ddim(grid)))
    # and it comes back as a denoiser, with the same estimates
    again = denoiser_from(pipe)
    z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for sigma in grid[1:-1]:
            assert_close(again(z, sigma).x0, model(z, sigma).x0)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_flow_is_sampled_by_flow_match_euler(reverse, tmp_path):
    prediction = Flow(reverse=reverse)
    model = denoiser(prediction)
    export_diffusers(model, tmp_path / "out")
    theirs, pipe = run_pipeline(tmp_path / "out", 10)
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert_close(theirs, images_of(model, ls.solvers.ddim(levels(pipe, prediction))))


def test_a_table_that_ends_at_inf_is_sampled_by_ddim(tmp_path):
    prediction = V(label=ZERO_SNR)
    model = denoiser(prediction)
    export_diffusers(model, tmp_path / "out")
    theirs, pipe = run_pipeline(tmp_path / "out", 6)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert_close(theirs, images_of(model, ls.solvers.ddim(levels(pipe, prediction))))


@pytest.mark.parametrize(
    "prediction", [V(label="ddpm"), V(label="flow"), Flow(), EDM(sigma_data=0.7)], ids=lambda p: f"{p.name}-{p.label}"
)
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_our_scheduler_takes_it_from_there(prediction, gamma, tmp_path):
    from logsnr.adapters import GradientEstimationScheduler

    model = denoiser(prediction, trained_range=(5e-4, 200.0))
    export_diffusers(model, tmp_path / "out")
    theirs, pipe = run_pipeline(tmp_path / "out", 8, GradientEstimationScheduler, gamma=gamma)
    assert_close(theirs, images_of(model, pipe.scheduler.plan))


@pytest.mark.parametrize("label", ["ddpm", "flow"])
def test_levels_beyond_the_trained_range_are_left_off(label, tmp_path):
    """sigma 55 is what the digits recipe trains to: the pipeline starts there, at that label."""
    model = denoiser(V(label=label), trained_range=(0.02, 55.0))
    export_diffusers(model, tmp_path / "out")
    _, pipe = run_pipeline(tmp_path / "out", 5)
    first = levels(pipe, model.prediction)[0]
    assert 54 <= first <= 1.01 * 55
    assert denoiser_from(pipe).trained_range[1] == pytest.approx(first, rel=1e-3)
    assert "trained_betas" in pipe.scheduler.config
    export_diffusers(denoiser(V(label="ddpm"), trained_range=(0.02, 157.0)), tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "scheduler" / "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "linear"
    assert config["trained_betas"] is None


def test_a_class_goes_into_a_bias(tmp_path):
    """Stock pixel pipelines know no classes: one folder for each, or for the null condition."""
    prediction = V(label="ddpm")
    model = denoiser(prediction, classes=3)
    for name, chosen in (("two", 2), ("null", None)):
        export_diffusers(model, tmp_path / name, class_label=chosen)
        theirs, pipe = run_pipeline(tmp_path / name, 5, solver_order=1)
        assert pipe.unet.class_embedding is None
        labels = torch.full((2,), 3 if chosen is None else chosen)
        ours = images_of(model, ls.solvers.ddim(levels(pipe, prediction)), class_labels=labels)
        assert_close(theirs, ours)
    other = images_of(model, ls.solvers.ddim(levels(pipe, prediction)), class_labels=torch.full((2,), 0))
    with pytest.raises(AssertionError, match="e-0"):
        assert_close(theirs, other)


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "our scheduler"])
def test_edm_pipelines_keep_their_classes(ours, tmp_path):
    """ConsistencyModelPipeline takes classes; stock second order there is the published DPM-Solver++."""
    from logsnr.adapters import GradientEstimationScheduler

    prediction = EDM(sigma_data=0.7)
    model = denoiser(prediction, trained_range=(0.02, 55.0), classes=3)
    export_diffusers(model, tmp_path / "out", keep_classes=True)
    scheduler = GradientEstimationScheduler if ours else None
    theirs, pipe = run_pipeline(tmp_path / "out", 6, scheduler, classes=[1, 3], **({"gamma": 2.0} if ours else {}))
    grid = levels(pipe, prediction)
    assert grid[0] == pytest.approx(55.0, rel=1e-5)
    assert grid[-2] == pytest.approx(0.02, rel=1e-5)
    plan = pipe.scheduler.plan if ours else ls.solvers.dpmpp(grid, 2, form="published", final="ramp")
    assert_close(theirs, images_of(model, plan, class_labels=torch.tensor([1, 3])))
    # bound to one class, it is the same images without being told
    export_diffusers(model, tmp_path / "one", class_label=1)
    bound, pipe = run_pipeline(tmp_path / "one", 6)
    assert pipe.unet.config.num_class_embeds is None
    assert_close(
        bound,
        images_of(model, ls.solvers.dpmpp(grid, 2, form="published", final="ramp"), class_labels=torch.tensor([1, 1])),
    )


def test_the_zoos_digits(run, tmp_path):
    """The trained model by the command line: stock diffusers draws our digits, and our scheduler runs its plans."""
    from logsnr.adapters import GradientEstimationScheduler

    code, _, err = run("export", "zoo:digits", "--to", "diffusers", "-o", tmp_path / "pipe", "--keep-classes")
    assert code == 0, err
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "pipe"))
    pipe.set_progress_bar_config(disable=True)
    model, plans = ls.load("zoo:digits"), ls.load_plans("zoo:digits")
    labels, noise = [0, 1, 7], torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(n):
        call = {"batch_size": 3, "class_labels": labels, "num_inference_steps": n, "output_type": "np"}
        images = pipe(generator=torch.Generator().manual_seed(0), **call).images
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def wanted(plan):
        return (ls.sample(model, plan, noise=noise, cond={"class_labels": torch.tensor(labels)}) / 2 + 0.5).clamp(0, 1)

    theirs = draw(12)
    grid = levels(pipe, model.prediction)
    assert_close(theirs, wanted(ls.solvers.dpmpp(grid, 2, form="published", final="ramp")))
    pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, plan=plans)
    for n in plans:
        assert_close(draw(n), wanted(plans[n]))


def test_the_folder_needs_nothing_of_ours(tmp_path, monkeypatch):
    """diffusers loads and runs it where no module of logsnr can be imported."""
    export_diffusers(denoiser(V(label="flow")), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model_index.json", "scheduler", "unet"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "logsnr"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        importlib.import_module("logsnr.loading")
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: denoiser(EDM(sigma_data=0.5, label="flow")), ["'edm'", "sigma_data 0.5", "{name: edm, label: edm}"]),
        (lambda: denoiser(V(label="logsnr")), ["'v' (label 'logsnr')", "{name: v, label: ddpm}"]),
        (lambda: denoiser(Score(label="ddpm")), ["'score'"]),
        (lambda: denoiser(Eps(label="ddpm", path="ve")), ["'eps'", "VP path"]),
        (lambda: denoiser(Flow(label="logsnr")), ["'logsnr'", "{name: flow, label: flow}"]),
        (lambda: denoiser(Flow(), trained_range=(0.01, 55.0)), ["from pure noise", "sigma 55", "objective.logsnr"]),
        (lambda: denoiser(V(label="ddpm"), fourier=(2, 3)), ["Fourier features", "network.fourier: []"]),
        (
            lambda: denoiser(EDM(label="flow"), fourier=(2,)),
            ["Fourier", "'edm'", "network.fourier: [], prediction: {name: edm, label: edm}"],
        ),
        (lambda: denoiser(V(label="ddpm"), trained_range=(1e-4, 1e-3)), ["sigma 0.001", "second level"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_recipe_that_would(model, words, tmp_path):
    with pytest.raises(LogsnrError) as error:
        export_diffusers(model(), tmp_path / "out")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_classes_that_do_not_fit(tmp_path):
    with pytest.raises(LogsnrError, match="class 1: this model is unconditional; leave the class out"):
        export_diffusers(denoiser(V(label="ddpm")), tmp_path / "out", class_label=1)
    model = denoiser(V(label="ddpm"), classes=3)
    with pytest.raises(LogsnrError, match=r"class 4: give 0 \.\.\. 2, or leave it out"):
        export_diffusers(model, tmp_path / "out", class_label=4)
    model.card = {"training": {"label_dropout": 0.0}}
    with pytest.raises(LogsnrError, match=r"without the null condition .*or name a class \(--class 0\)"):
        export_diffusers(model, tmp_path / "out")
    export_diffusers(model, tmp_path / "out", class_label=1)


def test_all_of_it_or_nothing(tmp_path, monkeypatch):
    model = denoiser(V(label="ddpm"))
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fails(self, *args, **kwargs):
        Path(args[0], "half").write_text("written")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.DDPMPipeline, "save_pretrained", fails)
        with pytest.raises(LogsnrError, match="out: No space left on device; nothing was left there"):
            export_diffusers(model, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(LogsnrError, match="full already exists: give a new folder"):
        export_diffusers(model, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    export_diffusers(model, tmp_path / "empty")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_command(run, tmp_path):
    tiny = ["steps=2", "max_seconds=null", "optimizer.decay=constant", "samples.every=0", "batch=8", "device=cpu"]
    tiny += ["network.channels=[8]", "network.layers_per_block=1", "network.mid_attention=false"]
    tiny += ["network.norm_groups=4"]

    def trained(name, *changes):
        pieces = [piece for text in (*tiny, *changes) for piece in ("--set", text)]
        assert run("train", "digits", "--out", tmp_path / name, *pieces)[0] == 0
        return tmp_path / name

    fits = trained("digits")  # the recipe as it is, on a tiny network
    code, out, _ = run("export", fits, "--to", "diffusers", "-o", tmp_path / "pipe", "--class", 3)
    assert code == 0
    assert "ConsistencyModelPipeline with EDMDPMSolverMultistepScheduler" in out
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "pipe"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=3).images[0].size == (8, 8)
    code, out, _ = run("export", fits, "-o", tmp_path / "again", "--json")
    assert code == 0
    assert json.loads(out)["scheduler"] == "EDMDPMSolverMultistepScheduler"
    code, out, _ = run("export", fits, "-o", tmp_path / "kept", "--keep-classes")
    assert code == 0
    assert "pipe(class_labels=[3], num_inference_steps=20).images[0]" in out
    # the folder's weights, not a random network of the same shape
    again = denoiser_from(diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "again")))
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(again(z, 1.0).x0, ls.load(fits)(z, 1.0).x0)
    # the command line samples pipelines as well, and refuses what only runs have
    code, out, _ = run("sample", tmp_path / "pipe", "--nfe", 2, "-n", 4, "--out", tmp_path / "x.png")
    assert code == 0
    assert (tmp_path / "x.png").exists()
    bad = [
        (["export", trained("fourier", "network.fourier=[2]"), "-o", tmp_path / "y"], ["network.fourier: []"]),
        (["export", fits, "-o", tmp_path / "y", "--class", 3, "--keep-classes"], ["class 3 with keep_classes"]),
        (["export", fits, "-o", tmp_path / "pipe"], ["already exists"]),
        (["export", fits, "-o", tmp_path / "y", "--to", "onnx"], ["'onnx'", "diffusers"]),
        (["export", fits, "-o", tmp_path / "y", "--class", 12], ["class 12", "0 ... 9"]),
        (["export", tmp_path / "pipe", "-o", tmp_path / "y"], ["is a diffusers pipeline", "folder of a run"]),
        (["evaluate", tmp_path / "pipe"], ["is a diffusers pipeline"]),
    ]
    for arguments, words in bad:
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        for word in words:
            assert word in err
    assert not (tmp_path / "y").exists()
    code, out, _ = run("export", "--help")
    assert "Example: logsnr export runs/digits --to diffusers" in out
