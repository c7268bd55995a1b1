"""One registry per kind: a member added in one place is found everywhere that its kind is named."""

import json
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import yaml

import logsnr as ls
from logsnr.errors import LogsnrError
from logsnr.evaluation.compare import ours
from logsnr.evaluation.features import FEATURES, FeatureEntry, Space
from logsnr.models import NETWORKS, Network, NetworkConfig, UNetConfig, save_denoiser
from logsnr.models.networks import NetworkEntry, network_config
from logsnr.objectives import objectives
from logsnr.predictions import PREDICTIONS, V
from logsnr.sampling.names import GRIDS, SOLVERS, GridEntry, SolverEntry, find_grid, find_solver, named_plan, plain
from logsnr.schedules import SCHEDULES, Cosine
from logsnr.training import load_data
from logsnr.training.config import DataConfig, SamplesConfig, recipe_from
from logsnr.training.data import DATASETS, Dataset, Source
from logsnr.training.objectives import build_objective
from logsnr.weightings import WEIGHTINGS, Sigmoid


def toy_solver(grid, twist=1.25):
    """Gradient estimation by another name."""
    return replace(ls.solvers.ge(grid, twist), meta={"solver": "toy", "twist": twist})


def toy_grid(n, sigma_max, sigma_min, last="zero"):
    """Even in the root of sigma."""
    return ls.grids.karras(n, sigma_max, sigma_min, 2.0, last)


class ToyConfig(NetworkConfig):
    kind: Literal["toy"] = "toy"
    width: int = 2


class ToyNetwork(Network):
    """One linear map of the pixels, with a bias per class."""

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.map = torch.nn.Sequential(*[torch.nn.Conv2d(shape[0], shape[0], 1) for _ in range(config.width)])
        self.bias = torch.nn.Parameter(torch.zeros(config.classes + 1))

    def forward(self, x, label, class_labels=None):
        labels = torch.full((len(x),), self.classes, device=x.device) if class_labels is None else class_labels
        return self.map(x) + self.bias[labels][:, None, None, None]


def toy_data(config, tell=None):
    """Eight pictures of two classes: stripes across and along."""
    across = torch.arange(4).remainder(2).mul(3).to(torch.uint8).expand(4, 4)
    images = torch.stack([across, across.T] * 4)[:, None].contiguous()
    labels = torch.tensor([0, 1] * 4)
    return Dataset(
        train_images=images, train_labels=labels, test_images=images[:4], test_labels=labels[:4], grey_levels=4,
        classes=2,
    )  # fmt: skip


@dataclass(frozen=True)
class ToySchedule(Cosine):
    pass


@dataclass(frozen=True)
class ToyWeighting(Sigmoid):
    pass


@dataclass(frozen=True, kw_only=True)
class ToyPrediction(V):
    name = "toy"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """A toy of each kind, each one entry."""
    solver = SolverEntry(family="Toy", make=toy_solver, variants={"TOY(1.5)": {"twist": 1.5}}, aliases=("plaything",))
    monkeypatch.setitem(SOLVERS, "toy", solver)
    monkeypatch.setitem(GRIDS, "root", GridEntry(make=toy_grid, compared=True))
    network = NetworkEntry(config=ToyConfig, build=ToyNetwork, takes=("channels", "height", "width"))
    monkeypatch.setitem(NETWORKS, "toy", network)
    monkeypatch.setitem(DATASETS, "stripes", Source(load=toy_data, told="'stripes'"))
    space = Space(name="toy", sees="all", of=lambda stored: stored.flatten(1).double())
    monkeypatch.setitem(FEATURES, "toy", FeatureEntry(make=lambda argument, material: space))
    monkeypatch.setitem(PREDICTIONS, "toy", ToyPrediction)
    monkeypatch.setitem(SCHEDULES, "toy", ToySchedule)
    monkeypatch.setitem(WEIGHTINGS, "toy", ToyWeighting)
    monkeypatch.setitem(objectives._makers, "toy/preset", lambda: (ToyWeighting(1), ToySchedule().truncate(-9, 9)))


RECIPE = {
    "data": {"source": "stripes"},
    "network": {"kind": "toy", "width": 3},
    "prediction": {"name": "toy"},
    "objective": {"weighting": {"name": "toy", "bias": 1.0}, "schedule": "toy", "logsnr": [-9, 9]},
    "samples": {"solver": "toy", "every": 2, "count": 4, "steps": 3},
    "conditional": True, "batch": 4, "steps": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def trained(run, tmp_path):
    """A run of the toys, by the command line."""
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    code, _, err = run("train", tmp_path / "toy.yaml", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    return tmp_path / "run"


def test_names_have_one_spelling():
    """Letters and digits count, + is p; variants bring their options; every name that was ever valid still is."""
    for name in ("dpmpp", "DPM++", "dpm++", "DPMPP", "dpm-solver++"):
        assert find_solver(name)[0] == "dpmpp"
    assert {find_solver(name)[0] for name in ("adams-bashforth", "adams_bashforth", "Adams Bashforth")} == {
        "adams-bashforth"
    }
    for name in ("DPM++(3M)", "dpm++3m", "dpmpp(3M)"):
        key, make = find_solver(name)
        assert (key, make.keywords) == ("dpmpp", {"order": 3})
    key, make = find_grid("karras, min")
    assert (key, make(4, 10.0, 0.1)) == ("karras", ls.grids.karras(4, 10.0, 0.1, last="min"))
    for name in ls.solvers.__all__:
        assert name == "custom" or find_solver(name)[1].func is getattr(ls.solvers, name)
    for name in ("trailing", "leading", "linspace", "karras", "log-linear", "beta", "ge-paper", "ays-sd15", "ays-svd"):
        find_grid(name)
    every = [plain(n) for key, e in SOLVERS.items() for n in {key, *e.aliases, *(v for v in e.variants)} if n != key]
    assert len(set(every)) == len(every)  # no name stands for two


def test_every_maker_is_called_by_what_it_needs():
    table = ls.TimestepTable.ddpm()
    for name, entry in GRIDS.items():
        grid = entry(5, 14.0, 0.03, table=table, eta=[(0.01, 0.3), (100.0, 0.3)])
        assert len(grid) == 6, name
        if entry.needs in ("table", "eta"):
            with pytest.raises(LogsnrError, match="this grid needs"):
                entry(5, 14.0, 0.03)
    for name, entry in SOLVERS.items():
        if entry.makes != "samples":
            assert named_plan(name, 5, 0.03, 14.0).nfe == 5
    assert named_plan("universal", 5, 0.03, 14.0) == ls.universal_plan(5, 0.03, 14.0)
    with pytest.raises(LogsnrError, match="order = 3: ge has no order; it belongs to adams-bashforth, ipndm, deis"):
        named_plan("ge", 5, 0.03, 14.0, order=3)
    with pytest.raises(LogsnrError, match="solver 'heun' is not one of"):
        named_plan("heun", 5, 0.03, 14.0)


def test_a_solver_and_a_grid_are_found_by_sampling_and_comparing(run, trained):
    denoiser = ls.load(trained)
    low, high = denoiser.sampling_range
    expected = toy_solver(toy_grid(4, high, low))
    assert named_plan("Plaything", 4, low, high, grid="ROOT") == expected
    command = ("sample", trained, "--nfe", 4, "-n", 2, "--out", trained / "x.npy", "--json")
    code, out, _ = run(*command, "--solver", "toy", "--grid", "root")
    assert (code, json.loads(out)["plan"]) == (0, expected.meta)
    code, out, _ = run(*command, "--solver", "TOY(1.5)")
    assert (code, json.loads(out)["plan"]["twist"]) == (0, 1.5)
    for wrong, said in (
        (("--solver", "toyy"), "did you mean 'toy'?"),
        (("--grid", "rout"), "did you mean 'root'?"),
        (("--solver", "toy", "--gamma", "2"), "gamma = 2.0: toy has no gamma; it belongs to ge, unified"),
        (("--grid", "timesteps", "--sigma-max", "9"), "--sigma-max 9 with --grid timesteps, whose levels are fixed"),
    ):
        code, _, err = run(*command, *wrong)
        assert code == 2
        assert said in err
    code, out, _ = run("sample", "--help")
    assert "toy" in out
    assert "root" in out
    entry, to_min = ours(denoiser, [4], solvers=["toy"], grids=["root"])
    assert to_min.plan == toy_solver(toy_grid(4, high, low, "min"), 1.5)
    assert (entry.name, entry.family, entry.plan) == ("TOY(1.5), root", "Toy", toy_solver(toy_grid(4, high, low), 1.5))
    code, out, err = run(
        "compare", trained, "--nfe", 3, "--solvers", "toy", "--grids", "root,kar", "-n", 8, "--teacher-steps", 16,
        "--features", "toy", "--no-peers", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert [row["name"] for row in told["rows"]] == [
        f"TOY(1.5), {grid}{end}" for end in ("", ", min") for grid in ("karras", "root")
    ]
    assert told["features"] == "toy"
    code, out, _ = run("compare", "--help")
    for name in ("TOY(1.5)", "root", "pixels, toy"):
        assert name in " ".join(out.split())


def test_a_solver_and_a_grid_are_found_by_the_scheduler():
    pytest.importorskip("diffusers")
    from logsnr.adapters import GradientEstimationScheduler

    scheduler = GradientEstimationScheduler(solver="toy", solver_options={"twist": 1.75}, grid="root")
    scheduler.set_timesteps(5)
    low, high = scheduler.model.sigma_range
    assert scheduler.plan == toy_solver(toy_grid(5, high, low), 1.75)
    assert GradientEstimationScheduler.from_config(scheduler.config).config.solver == "toy"
    flow = GradientEstimationScheduler(prediction_type="flow_prediction", solver="DPM++(3M)", grid="root")
    flow.set_timesteps(4)
    assert flow.plan.meta["order"] == 3
    assert flow.sigmas[:-1].tolist() == pytest.approx(toy_grid(4, 1.0, 0.25)[:-1], rel=1e-6)
    for gamma, expected in ((None, 1.5), (1.75, 1.75)):
        named = GradientEstimationScheduler(solver="GE(1.5)", gamma=gamma, mu=0.25, grid="root")
        named.set_timesteps(5)
        assert named.plan == ls.solvers.unified(toy_grid(5, high, low), expected, 0.25)
    for options, said in (
        ({"solver": "toyy"}, "did you mean 'toy'?"),
        ({"grid": "rout"}, "did you mean 'root'?"),
        ({"solver_options": {"mu": 0.5}}, "do not fit solver 'ge'"),
        ({"solver": "toy", "gamma": 2.0}, "only 'ge' and 'unified' take them"),
        ({"grid": "karras, min"}, "final_sigmas_type='sigma_min'; give grid='karras'"),
        ({"solver": "heun"}, "solver 'heun' is not one of"),
    ):
        with pytest.raises(ValueError, match=said.replace("?", r"\?")):
            GradientEstimationScheduler(**options)


def test_a_solver_is_found_by_recipes():
    assert SamplesConfig(solver="toy").plan(0.1, 9.0, 1.0) == toy_solver(ls.grids.log_linear(20, 9.0, 0.1))
    grid = ls.grids.log_linear(20, 9.0, 0.1)
    old = {"every": 1000, "count": 64, "steps": 20, "gamma": 1.5}  # of recipes before
    assert SamplesConfig(solver="ge", **old).plan(0.1, 9.0, 1.0) == ls.solvers.ge(grid, 1.5)
    assert SamplesConfig(solver="ddim", **old).plan(0.1, 9.0, 1.0) == ls.solvers.ddim(grid)
    assert SamplesConfig().plan(0.1, 9.0, 1.0) == ls.solvers.ge(grid, 2.0)
    for samples, said in (
        ({"solver": "toyy"}, "samples: solver 'toyy' is not one of .*: did you mean 'toy'"),
        ({"solver": "universal", "steps": 99}, "samples: nfe 99 is not one of"),
    ):
        with pytest.raises(LogsnrError, match=said):
            recipe_from({"steps": 1, "samples": samples})


def test_a_network_and_data_are_found_by_training_and_files(run, trained, tmp_path):
    """Trained from a recipe, drawn from, saved, loaded: nothing but the registry knows the network."""
    denoiser = ls.load(trained)
    assert isinstance(denoiser.network, ToyNetwork)
    assert (denoiser.network.config, denoiser.network.null_class) == (ToyConfig(width=3, classes=2), 2)
    assert denoiser.card["network"] == {"kind": "toy", "classes": 2, "width": 3}
    assert denoiser.prediction == ToyPrediction(label="flow")
    assert (trained / "samples").is_dir()
    save_denoiser(denoiser, tmp_path / "again")
    again = ls.load(tmp_path / "again")
    z, cond = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), {"class_labels": torch.arange(2)}
    assert torch.equal(again(z, 1.0, **cond).x0, denoiser(z, 1.0, **cond).x0)
    code, _, err = run("evaluate", trained, "--evaluations", 8, "--limit", 4, "--json")
    assert code == 0, err
    code, _, err = run("export", trained, "-o", tmp_path / "pipeline")
    assert code == 2
    assert "a network of kind 'toy' is no UNet2DModel" in err


def test_a_card_of_before_names_no_kind():
    assert network_config({"channels": [32]}) == network_config({"kind": "unet", "channels": [32]})
    assert network_config({}) == UNetConfig()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"network": {"kind": "toi"}},
            r"kind 'toi' is not one of unet, dit, uvit, toy; or .module:Class. for your own: did you mean 'toy'\?",
        ),
        ({"network": {"kind": "toy", "widht": 3}}, r"network: key 'widht' is not one of .*: did you mean 'width'\?"),
        ({"network": {"kind": "toy", "width": "x"}}, "network.width = 'x'"),
        ({"network": "toy"}, "network: 'toy': give a mapping"),
        ({"prediction": {"name": "toj"}}, r"did you mean 'toy'\?"),
    ],
)
def test_recipes_name_the_nearest(values, said):
    with pytest.raises(LogsnrError, match=said):
        recipe_from({"steps": 1, **values})


def test_data_are_named_in_messages_and_help(run):
    assert torch.equal(load_data(DataConfig(source="stripes")).train_labels, torch.tensor([0, 1] * 4))
    with pytest.raises(LogsnrError, match=r"'stripe' does not exist: did you mean 'stripes'.* or 'stripes'"):
        load_data(DataConfig(source="stripe"))
    for command in ("evaluate", "compare", "passport"):
        assert "'stripes'" in run(command, "--help")[1]


def test_an_objective_is_found_by_recipes_and_the_command(run):
    """A preset, a weighting and a schedule: by name in a recipe, in `logsnr objective`, and in what names are near."""
    preset = recipe_from({"steps": 1, "objective": {"preset": "toy/preset"}}).objective
    assert build_objective(preset, dim=4, sigma_data=0.5).weighting == ToyWeighting(1)
    parts = recipe_from(RECIPE).objective
    assert build_objective(parts, dim=4, sigma_data=0.5).weighting == ToyWeighting(bias=1.0)
    for name in ("toy/preset", "toy"):
        code, out, err = run("objective", name)
        assert code == 0, err
        assert out.startswith(name)
    assert "toy/preset" in run("objective", "vdm++/sigmoid", "--json")[1]
    assert "did you mean 'toy/preset'" in run("objective", "toy/pre")[2]
