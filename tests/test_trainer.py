"""Training: exact resume, closed forms of its parts, and a model that learns what can be computed by hand."""

from __future__ import annotations

import copy
import errno
import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from logsnr import files, load
from logsnr.errors import LogsnrError
from logsnr.files import read_pair
from logsnr.training import Dataset, load_data, recipe_from, train
from logsnr.training.config import DataConfig
from logsnr.training.draws import derived_seed
from logsnr.training.ema import EMA
from logsnr.training.processes import own_accelerator
from logsnr.training.run import Run
from logsnr.uncertainty import Uncertainty

NETWORK = {"channels": [8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4}
TIMES = ("images_per_second", "seconds")


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig())


def recipe(**changes):
    base = {
        "network": NETWORK,
        "objective": {"preset": "vdm++/sigmoid", "logsnr": [-10, 10], "adaptive": True},
        "optimizer": {"warmup": 4},
        "samples": {"every": 0},
        "conditional": True,
        "batch": 8,
        "steps": 12,
        "checkpoint_every": 3,
        "log_every": 2,
        "device": "cpu",
    }
    return recipe_from({**base, **changes})


@pytest.fixture
def fresh_run(digits):
    """A maker of runs outside `train`, with accelerate's singleton cleared afterwards."""
    with own_accelerator():
        yield lambda **changes: Run(recipe(**changes), digits)


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def tensors(out):
    return {**read_pair(out / "state", "state")[1], **{f"card.{k}": v for k, v in read_pair(out, "card")[1].items()}}


def assert_same_run(first, second):
    assert metrics(first) == metrics(second)
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert different == []


class Killed(Exception):  # noqa: N818
    """Stands for a power cut."""


def kill_at(step):
    def callback(info):
        if info.step == step:
            raise Killed

    return callback


# Exactness


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path, digits, dropout):
    changes = {"network": {**NETWORK, "dropout": dropout}, "data": {"flip": True}}
    train(recipe(**changes), tmp_path / "whole", data=digits)
    # Killed at 8: the last checkpoint is step 6's, and metrics of step 8 are already on disk.
    with pytest.raises(Killed):
        train(recipe(**changes), tmp_path / "cut", data=digits, callback=kill_at(8))
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [2, 4, 6, 8]
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    torch.rand(7)  # the global random state is nobody's business
    summary = train(recipe(**changes), tmp_path / "cut", resume=True, data=digits)
    assert (summary.resumed_from, summary.steps) == (6, 12)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    again = train(recipe(**changes), tmp_path / "cut", resume=True, data=digits)
    assert str(again) == "nothing to do: all 12 steps were taken before (--set steps=N takes more)"


def test_a_resume_in_the_middle_of_a_line_of_metrics(tmp_path, digits):
    train(recipe(log_every=5), tmp_path / "whole", data=digits)
    with pytest.raises(Killed):
        train(recipe(log_every=5), tmp_path / "cut", data=digits, callback=kill_at(4))
    train(recipe(log_every=5), tmp_path / "cut", resume=True, data=digits)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_two_runs_are_equal_bit_for_bit_and_another_seed_is_not(tmp_path, digits):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(recipe(seed=seed, steps=5), tmp_path / name, data=digits)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


def test_checkpoints_samples_and_callbacks_do_not_disturb_the_run(tmp_path, digits):
    train(recipe(), tmp_path / "plain", data=digits)
    busy = recipe(checkpoint_every=1, samples={"every": 5, "count": 4, "steps": 2})
    train(busy, tmp_path / "busy", data=digits, callback=lambda info: torch.rand(3))
    assert_same_run(tmp_path / "plain", tmp_path / "busy")
    assert [path.name for path in sorted((tmp_path / "busy" / "samples").iterdir())] == [
        "step-00000005.png",
        "step-00000010.png",
    ]


def test_training_leaves_the_global_state_alone(tmp_path, digits):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    train(recipe(steps=2, network={**NETWORK, "dropout": 0.1}), tmp_path, data=digits)
    assert torch.equal(torch.rand(3), expected)
    assert not AcceleratorState._shared_state


def test_a_resumed_run_may_go_on_longer(tmp_path, digits):
    train(recipe(steps=12), tmp_path / "long", data=digits)
    train(recipe(steps=6), tmp_path / "short", data=digits)
    train(recipe(steps=12), tmp_path / "short", resume=True, data=digits)
    assert_same_run(tmp_path / "long", tmp_path / "short")


def test_resume_refuses_another_recipe(tmp_path, digits):
    train(recipe(steps=2), tmp_path, data=digits)
    with pytest.raises(
        LogsnrError, match=r"was trained with batch = 8, this recipe says 16: .*only steps, max_seconds"
    ):
        train(recipe(batch=16), tmp_path, resume=True, data=digits)


def test_a_folder_is_neither_overwritten_nor_resumed_by_accident(tmp_path, digits):
    with pytest.raises(LogsnrError, match="holds no run to resume: start it without resume"):
        train(recipe(), tmp_path, resume=True, data=digits)
    train(recipe(steps=2), tmp_path, data=digits)
    with pytest.raises(
        LogsnrError, match=r"already holds a run: resume it \(resume=True, --resume\) or choose another"
    ):
        train(recipe(), tmp_path, data=digits)


def test_overwriting_removes_the_earlier_run_and_nothing_else(tmp_path, digits):
    train(recipe(seed=1, samples={"every": 4, "count": 2, "steps": 1}), tmp_path / "again", data=digits)
    (tmp_path / "again" / "notes.txt").write_text("mine")
    train(recipe(steps=5), tmp_path / "again", data=digits, overwrite=True)
    train(recipe(steps=5), tmp_path / "fresh", data=digits)
    assert_same_run(tmp_path / "again", tmp_path / "fresh")
    assert (tmp_path / "again" / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "again" / "samples").iterdir())
    with pytest.raises(LogsnrError, match="resume and overwrite exclude each other"):
        train(recipe(steps=6), tmp_path / "fresh", resume=True, overwrite=True, data=digits)


def test_a_summary_says_what_happened(tmp_path, digits):
    summary = train(recipe(steps=4, log_every=4), tmp_path, data=digits)
    facts = json.loads(json.dumps(summary.to_dict()))
    assert (facts["steps"], facts["resumed_from"]) == (4, 0)
    assert facts["loss"] == metrics(tmp_path)[-1]["loss"]
    assert str(summary).startswith("4 steps in ")


def test_a_damaged_state_is_refused(tmp_path, digits):
    train(recipe(steps=2), tmp_path, data=digits)
    (path,) = (tmp_path / "state").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    with pytest.raises(LogsnrError, match=r"SHA-256 .*flipped bit"):
        train(recipe(steps=3), tmp_path, resume=True, data=digits)


def test_a_full_disk_stops_the_run_and_resume_goes_on(tmp_path, digits, monkeypatch):
    train(recipe(), tmp_path / "whole", data=digits)
    real = files.replace_file

    def replace_file(path, data):
        if path.name.startswith("state-00000006"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(files, "replace_file", replace_file)
    with pytest.raises(LogsnrError, match=r"No space left on device; the checkpoint before it is intact.*then resume"):
        train(recipe(), tmp_path / "full", data=digits)
    monkeypatch.undo()
    assert load(tmp_path / "full").card["step"] == 3
    train(recipe(), tmp_path / "full", resume=True, data=digits)
    assert_same_run(tmp_path / "whole", tmp_path / "full")


# The parts


def test_the_average_of_weights_has_its_closed_form():
    target, average = torch.tensor([3.0]), torch.tensor([1.0])
    ema = EMA([average], decay=0.9, ramp=False)
    for n in range(20):
        ema.update([target], n)
    # After n updates towards a constant c: c + beta^n (start - c).
    assert average.item() == pytest.approx(3 - 2 * 0.9**20, rel=1e-6)

    average = torch.tensor([1.0])
    ema = EMA([average], decay=0.99)
    for n in range(5):
        ema.update([target], n)
    # prod_n (1 + n)/(10 + n) = 5! 9! / 14!
    assert average.item() == pytest.approx(3 - 2 * math.factorial(5) * math.factorial(9) / math.factorial(14), rel=1e-6)
    assert ema.beta(10**6) == 0.99


def test_the_run_averages_its_weights_with_that_ramp(fresh_run):
    run = fresh_run()
    expected = [p.detach().clone() for p in run.parameters]
    for n in range(3):
        run.advance()
        for value, p in zip(expected, run.parameters, strict=True):
            value.lerp_(p.detach(), 1 - (1 + n) / (10 + n))
    for value, average in zip(expected, run.average.network.parameters(), strict=True):
        torch.testing.assert_close(average, value, rtol=1e-6, atol=1e-7)


def test_warm_up_is_linear_and_then_constant(tmp_path, digits, fresh_run):
    run = fresh_run(optimizer={"lr": 1e-3, "warmup": 4})
    rates = []
    for _ in range(6):
        rates.append(run.learning_rate(run.step))
        run.advance()
        assert run.optimizer.param_groups[0]["lr"] == rates[-1]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert fresh_run(optimizer={"warmup": 0}).learning_rate(0) == 1e-3
    train(recipe(optimizer={"lr": 1e-3, "warmup": 4}, log_every=1, steps=6), tmp_path, data=digits)
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx(rates)


def test_linear_decay_reaches_zero_at_the_last_step_and_a_later_end_is_said(tmp_path, digits, fresh_run, capsys):
    options = {"lr": 1e-3, "warmup": 2, "decay": "linear"}
    run = fresh_run(optimizer=options, steps=10)
    rates = [run.learning_rate(n) for n in range(11)]
    assert rates == pytest.approx([0.5e-3, *(1e-3 * (1 - n / 10) for n in range(1, 11))])
    # Given another end, the rate is that of the new one from there on: 1 - 4/8 where it had come to 0.
    train(recipe(optimizer=options, steps=4, log_every=1), tmp_path, data=digits)
    capsys.readouterr()
    train(recipe(optimizer=options, steps=8, log_every=1), tmp_path, resume=True, data=digits)
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.5e-3, 0.25e-3, *(1e-3 * (1 - n / 8) for n in range(4, 8))])
    assert (
        "steps = 4 before, 8 now: the learning rate falls to zero at step 8, so it goes on from 0.0005 instead of 0;"
        in (capsys.readouterr().err)
    )
    with pytest.raises(LogsnrError, match="falls to zero at the last step: give steps"):
        recipe_from({"max_seconds": 5, "optimizer": {"decay": "linear"}})


def test_clipping_is_the_norms_and_does_not_see_the_objectives_units(fresh_run, monkeypatch):
    def advance(factor, clip):
        run = fresh_run(
            objective={"weighting": "sigmoid", "schedule": "cosine", "logsnr": [-8, 8]},
            optimizer={"clip": clip, "warmup": 0},
        )
        log = type(run.objective.weighting).log
        shift = math.log(factor)
        with monkeypatch.context() as patch:
            patch.setattr(type(run.objective.weighting), "log", lambda self, logsnr: log(self, logsnr) + shift)
            run.objective._scales.clear()
            run.scale = run.objective.scale(run.denoiser.dim, run.denoiser.sigma_data)
            seen = []
            step = type(run.optimizer).step
            patch.setattr(
                type(run.optimizer),
                "step",
                lambda self, *a, **k: (seen.extend(p.grad.clone() for p in run.parameters), step(self, *a, **k))[1],
            )
            per_dim = run.advance()
        norm = torch.stack([g.norm() for g in seen]).norm()
        return run.scale, per_dim, run.metrics.window[1], norm, seen

    # A factor 1024 of the weighting is exact in float32 only up to the rounding of exp and of the scale.
    one, many = advance(1.0, 0.01), advance(1024.0, 0.01)
    assert many[0] / one[0] == pytest.approx(1024, rel=1e-9)
    assert float(many[1] / one[1]) == pytest.approx(1024, rel=1e-5)
    assert float(many[2]) == pytest.approx(float(one[2]), rel=1e-5)
    for a, b in zip(one[4], many[4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
    # Clipped to .01; unclipped, the norm is what the metrics say, and the gradient has the same direction.
    assert float(one[3]) == pytest.approx(0.01, rel=1e-3)
    free = advance(1.0, None)
    assert float(free[3]) == pytest.approx(float(free[2]), rel=1e-5)
    assert float(free[3]) > 0.01
    torch.testing.assert_close(one[4][-1], free[4][-1] * (0.01 / float(free[3])), rtol=1e-3, atol=1e-8)


def test_label_dropout_is_a_coin_and_puts_the_null_class(fresh_run, digits):
    run = fresh_run(batch=4096, label_dropout=0.2)
    plain = fresh_run(batch=4096, label_dropout=0.0)
    (x, cond), (x0, cond0) = run.draw(0), plain.draw(0)
    labels, kept = cond["class_labels"], cond0["class_labels"]
    assert torch.equal(x, x0)
    dropped = labels != kept
    assert abs(dropped.float().mean().item() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 4096)
    assert (labels[dropped] == 10).all()
    # Labels that stay are their images' own.
    of = {bytes(i.flatten().tolist()): int(t) for i, t in zip(digits.train_images, digits.train_labels, strict=True)}
    stored = run.average.decode(x)
    assert [of[bytes(i.flatten().tolist())] for i in stored[:64]] == kept[:64].tolist()


def test_samples_are_the_codecs_cell_centres_and_flips_are_a_coin(digits, fresh_run):
    run = fresh_run(batch=2048, data={"flip": True}, conditional=False)
    x, cond = run.draw(0)
    assert cond is None
    stored = run.average.decode(x)
    assert torch.equal(run.average.encode(stored), x)
    known = {bytes(image.flatten().tolist()) for image in digits.train_images}
    upright = [bytes(image.flatten().tolist()) in known for image in stored]
    mirrored = [bytes(image.flip(2).flatten().tolist()) in known for image in stored]
    assert all(a or b for a, b in zip(upright, mirrored, strict=True))
    assert abs(np.mean(mirrored) - 0.5) < 4 * math.sqrt(0.25 / 2048)


def test_sigma_data_and_the_trained_range_are_measured(fresh_run, digits):
    run = fresh_run()
    x = run.average.encode(digits.train_images)
    assert run.average.sigma_data == pytest.approx(float(x.double().std(correction=0)), rel=1e-6)
    assert run.average.prediction.sigma_data == run.average.sigma_data
    assert run.average.trained_range == pytest.approx((math.exp(-5), math.exp(5)))
    assert fresh_run(sigma_data=0.5).average.sigma_data == 0.5
    # Central 99.8 % of ln sigma ~ N(-1.2, 1.2^2): 3.0902 deviations; the preset is sampled between its paper's levels.
    edm = {"weighting": "edm", "schedule": "edm-training", "logsnr": [-20, 20]}
    drawn = fresh_run(objective=edm).average.trained_range
    assert drawn == pytest.approx((math.exp(-1.2 - 1.2 * 3.0902), math.exp(-1.2 + 1.2 * 3.0902)), rel=1e-3)
    assert fresh_run(objective={"preset": "edm"}).average.trained_range == pytest.approx((0.002, 80.0))


def test_seeds_of_different_purposes_differ():
    seeds = {derived_seed(s, name, n, r) for s in range(3) for name in "ab" for n in range(50) for r in range(2)}
    assert len(seeds) == 3 * 2 * 50 * 2
    assert derived_seed(0, "step", 1, 1) != derived_seed(0, "step", 11)
    assert max(seeds) < 2**63


def test_no_step_reads_a_value_back(fresh_run, monkeypatch):
    run = fresh_run()
    run.advance()

    def forbidden(self, *args, **kwargs):
        raise AssertionError("a value was read back from the device within a step")

    # Values of the host-side noise schedule and of optimizers on the CPU are no device reads: these are the ways that
    # a loss, a gradient norm or an image would come back.
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    run.advance()
    monkeypatch.undo()
    assert run.step == 2
    assert float(run.metrics.window[0]) > 0


# The loop


def test_a_callback_can_end_the_training(tmp_path, digits):
    seen = []

    def callback(info):
        seen.append((info.step, float(info.loss)))
        return info.step == 4

    summary = train(recipe(log_every=1), tmp_path, data=digits, callback=callback)
    assert summary.steps == 4
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert [line["loss"] for line in metrics(tmp_path)] == pytest.approx([loss for _, loss in seen])
    assert load(tmp_path).card["step"] == 4


def test_time_ends_a_training_after_at_least_one_step(tmp_path, digits):
    summary = train(recipe(steps=None, max_seconds=1e-6), tmp_path, data=digits)
    assert summary.steps == 1
    before = read_pair(tmp_path / "state", "state")[0]["seconds"]
    # A resumed run counts the seconds before it.
    again = train(recipe(steps=None, max_seconds=1e-6), tmp_path, resume=True, data=digits)
    assert again.steps == 2
    assert again.seconds > before > 0


def test_a_loss_that_is_no_number_ends_the_run_with_the_checkpoint_intact(tmp_path, digits):
    runs = []
    original = Run.__init__

    def remember(self, *args):
        original(self, *args)
        runs.append(self)

    def poison(info):
        if info.step == 4:
            runs[0].parameters[0].detach().fill_(math.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "__init__", remember)
        with pytest.raises(
            LogsnrError, match=r"the loss is nan .*steps 5 \.\.\. 6; the checkpoint of step 3 is intact: lower"
        ):
            train(recipe(), tmp_path, data=digits, callback=poison)
    assert load(tmp_path).card["step"] == 3


def test_recipes_that_do_not_fit_the_data(tmp_path, digits):
    unlabelled = Dataset(
        train_images=digits.train_images,
        train_labels=None,
        test_images=digits.test_images,
        test_labels=None,
        grey_levels=17,
        classes=0,
    )
    with pytest.raises(LogsnrError, match=r"conditional: true, but 'digits' has no labels: add labels"):
        train(recipe(), tmp_path, data=unlabelled)
    grey = Dataset(
        train_images=torch.full((4, 1, 4, 4), 7, dtype=torch.uint8),
        train_labels=None,
        test_images=digits.test_images,
        test_labels=None,
        grey_levels=17,
        classes=0,
    )
    with pytest.raises(LogsnrError, match="one and the same grey value: there is nothing to learn"):
        train(recipe(conditional=False), tmp_path, data=grey)
    with pytest.raises(LogsnrError, match="precision = 'fp16' needs a GPU: use 'bf16' or 'no' on a CPU"):
        train(recipe(precision="fp16"), tmp_path, data=digits)
    assert not (tmp_path / "card.json").exists()


def test_bf16_trains_the_network_in_half_precision_and_keeps_the_loss_in_float32(tmp_path, digits):
    dtypes = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype) if isinstance(module, nn.Conv2d) else None
    )
    try:
        summary = train(recipe(precision="bf16", steps=3), tmp_path / "half", data=digits)
    finally:
        handle.remove()
    assert set(dtypes) == {torch.bfloat16}
    full = train(recipe(steps=3), tmp_path / "full", data=digits)
    half_loss, full_loss = metrics(tmp_path / "half")[0]["loss"], metrics(tmp_path / "full")[0]["loss"]
    assert half_loss == pytest.approx(full_loss, rel=0.02)
    assert half_loss != full_loss
    assert all(p.dtype == torch.float32 for p in summary.denoiser.parameters())
    assert full.denoiser.sigma_data == summary.denoiser.sigma_data


def test_training_learns_what_can_be_computed(tmp_path):
    """Images of one grey value, Gaussian over images: a rank-one Gaussian, whose best loss has a closed form.

    With x = g 1, g ~ N(0, sd^2), the best eps error is sigmoid(lambda + ln(D sd^2)) in one direction and nothing in the
    D - 1 others, where a network at F = 0 (EDM's row) errs like white data: sigmoid(lambda + 2 ln sd) in each.
    """
    D = 16
    g = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.4
    grey = (((g.clamp(-1, 1) + 1) / 2) * 255).round().to(torch.uint8)
    images = grey[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    data = Dataset(
        train_images=images, train_labels=None, test_images=images[:1], test_labels=None, grey_levels=256, classes=0
    )
    learner = recipe(
        network={**NETWORK, "channels": [16]},
        objective={"weighting": {"name": "sigmoid", "bias": 0.0}, "schedule": "cosine", "logsnr": [-6, 6]},
        optimizer={"lr": 3e-3, "warmup": 10},
        conditional=False,
        batch=64,
        steps=150,
        log_every=100,
        checkpoint_every=0,
    )
    summary = train(learner, tmp_path, data=data)

    sd = summary.denoiser.sigma_data
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    w = torch.sigmoid(-x)
    initial = float(torch.trapezoid(0.5 * w * torch.sigmoid(x + 2 * math.log(sd)), x))
    optimum = float(torch.trapezoid(0.5 * w * torch.sigmoid(x + math.log(D * sd**2)), x)) / D

    def loss_of(denoiser):
        """Loss in nats per dimension on fixed noise, over a grid of levels."""
        generator = torch.Generator().manual_seed(1)
        total = []
        sample = denoiser.encode(images[:512])
        for level in torch.linspace(-5.85, 5.85, 40, dtype=torch.float64):
            eps = torch.randn(sample.shape, generator=generator)
            with torch.no_grad():
                error = denoiser.eps_error(sample, eps, float((-0.5 * level).exp())).mean().item()
            total.append(0.5 * float(torch.sigmoid(-level)) * error / D * 0.3)
        return sum(total)

    trained = loss_of(load(tmp_path))
    assert 0.9 * optimum < trained < 1.6 * optimum
    assert trained < 0.35 * initial


# Adaptive noise levels


def adaptive(importance, **changes):
    section = {"importance": importance, **({"true_every": 2, "true_samples": 2} if importance == "gradient" else {})}
    return recipe(
        objective={"weighting": "elbo", "logsnr": [-8, 8], "adaptive": section},
        steps=7,
        log_every=5,
        checkpoint_every=3,
        **changes,
    )


@pytest.mark.parametrize("importance", ["error", "auto"])
def test_what_only_the_gradient_needs_is_refused_elsewhere(tmp_path, digits, importance):
    section = {"importance": importance, "true_every": 7}
    objective = {"weighting": {"name": "sigmoid", "bias": 2.0}, "logsnr": [-8, 8], "adaptive": section}
    with pytest.raises(LogsnrError, match=r"objective.adaptive.true_every = 7 is of importance: gradient"):
        train(recipe(objective=objective), tmp_path, data=digits)


@pytest.mark.parametrize(
    ("importance", "changes"),
    [
        ("error", {}),
        ("gradient", {}),
        ("gradient", {"precision": "bf16", "network": {**NETWORK, "dropout": 0.2}}),
    ],
)
def test_an_adaptive_run_resumes_exactly_by_every_importance(tmp_path, digits, importance, changes):
    """Killed in the middle of a line of metrics, after true gradient norms: densities, sums and weights go on."""
    plan = adaptive(importance, **changes)
    train(plan, tmp_path / "whole", data=digits)
    with pytest.raises(Killed):
        train(plan, tmp_path / "cut", data=digits, callback=kill_at(4))
    train(plan, tmp_path / "cut", resume=True, data=digits)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    (line,) = metrics(tmp_path / "whole")
    assert line["gradient_excess"] >= 1
    assert line["variance_within"] > 0
    assert bool((tensors(tmp_path / "whole")["objective.true"] > 0).any()) == (importance == "gradient")


def test_importances_draw_differently(tmp_path, digits):
    losses = []
    for importance in ("error", "gradient"):
        train(adaptive(importance), tmp_path / importance, data=digits)
        losses.append(metrics(tmp_path / importance)[0]["loss"])
    assert len(set(losses)) == 2


def test_a_state_that_knew_only_the_error_goes_on_bit_for_bit(tmp_path, digits):
    """As runs were saved before: what decides the draws by error is there, and so are the options by their defaults."""
    plain = recipe(steps=6, checkpoint_every=3)
    train(plain, tmp_path / "whole", data=digits)
    with pytest.raises(Killed):
        train(plain, tmp_path / "cut", data=digits, callback=kill_at(4))
    folder = tmp_path / "cut" / "state"
    card, found = read_pair(folder, "state")
    kept = {k: v for k, v in found.items() if not k.startswith(("objective.", "spread"))}
    kept |= {k: found[k] for k in ("objective.error", "objective.visits")}
    kept["objective.square"] = found["objective.error"] ** 2  # of version 0.1
    card["recipe"]["objective"]["adaptive"] = True
    card.pop("weights")
    pair = files.Pair(folder=folder, name="state", stem="state", card=card, tensors=kept)
    files.write_pairs([pair], step=card["step"])
    train(plain, tmp_path / "cut", resume=True, data=digits)
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert [k for k in a if k.startswith(("network.", "average.")) and not torch.equal(a[k], b[k])] == []
    assert torch.equal(a["objective.error"], b["objective.error"])


def test_the_logged_spread_is_that_of_the_windows_draws(fresh_run):
    """Against sums written out, bin by bin."""
    run = fresh_run(steps=4)
    seen = []
    learn = run.objective.update

    def record(output, gradient):
        seen.append((output.logsnr, output.loss.detach().double(), gradient.double()))
        learn(output, gradient)

    run.objective.update = record
    for _ in range(3):
        run.advance()
    spread = run.adaptation.meter.read()
    lo, hi = run.objective.schedule.range
    logsnr, loss, norms = map(torch.cat, zip(*seen, strict=True))
    groups = ((logsnr - lo) / (hi - lo) * 100).floor().long()
    means = [loss[groups == b].mean().item() for b in groups]
    repeated = [b for b in groups.unique() if (groups == b).sum() > 1]
    pooled = sum((groups == b).sum() * loss[groups == b].var() for b in repeated) / sum(
        (groups == b).sum() for b in repeated
    )
    variance = [loss[groups == b].var() if b in repeated else pooled for b in groups]
    n, within = len(loss), float(sum(variance)) / len(loss)
    total = sum((m - float(loss.mean())) ** 2 for m in means)
    scatter = sum(
        float(v) / int((groups == b).sum()) * (1 - int((groups == b).sum()) / n)
        for v, b in zip(variance, groups, strict=True)
    )
    assert spread.within == pytest.approx(within / float(loss.mean()) ** 2, rel=1e-6)
    assert spread.between == pytest.approx((total - scatter) / n / float(loss.mean()) ** 2, rel=1e-6)
    least = sum(math.sqrt(norms[groups == b].mean().item()) for b in groups) / n
    assert spread.gradient_excess == pytest.approx(float(norms.mean()) / least**2, rel=1e-6)


def test_a_fixed_schedule_logs_no_spread(tmp_path, digits):
    train(recipe(objective={"preset": "edm"}, steps=2), tmp_path, data=digits)
    assert metrics(tmp_path)[0].keys() == {"step", "loss", "grad_norm", "lr"}


# EDM2's uncertainty


def uncertain(on, **changes):
    section = {"preset": "edm2", "logsnr": [-6, 8], "uncertainty": on}
    return recipe(objective=section, steps=7, checkpoint_every=3, **changes)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_with_uncertainty_resumes_exactly(tmp_path, digits, precision):
    """The head, its moments and the weights go on bit for bit; the saved model knows nothing of it."""
    plan = uncertain(True, precision=precision)
    train(plan, tmp_path / "whole", data=digits)
    with pytest.raises(Killed):
        train(plan, tmp_path / "cut", data=digits, callback=kill_at(4))
    train(plan, tmp_path / "cut", resume=True, data=digits)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    state = tensors(tmp_path / "whole")
    assert bool((state["uncertainty.linear.weight"] != 0).all())
    assert not any("uncertainty" in key for key in state if key.startswith(("card.", "network.", "average.")))
    with pytest.raises(LogsnrError, match="was trained with objective"):
        train(uncertain(False, precision=precision), tmp_path / "cut", resume=True, data=digits)


def test_a_step_with_uncertainty_is_that_of_the_loss_over_it(fresh_run):
    """u = 0 at first, so the first step is the plain one; then gradients are those of l e^-u + u, written out."""
    plain, run = (fresh_run(**uncertain(on).model_dump(exclude={"network"})) for on in (False, True))
    for each in (plain, run):
        each.advance()
    torch.testing.assert_close(run.parameters, plain.parameters, rtol=1e-5, atol=1e-6)
    twin, head = copy.deepcopy(run.denoiser), copy.deepcopy(run.uncertainty)
    x, cond = run.draw(1)
    output = run.objective(twin, x, cond=cond, generator=run.generator)
    with torch.no_grad():
        u = head(output.logsnr)
    assert float(u.abs().min()) > 0
    (output.loss / run.scale * (-u).exp()).mean().backward()
    seen = {}
    run.optimizer.zero_grad = lambda set_to_none: seen.update(
        network=[p.grad.clone() for p in run.parameters], head=[p.grad.clone() for p in run.uncertainty.parameters()]
    )
    run.advance()
    norm = torch.stack([p.grad.norm() for p in twin.network.parameters()]).norm()
    clip = min(1.0, run.recipe.optimizer.clip / float(norm))
    for mine, p in zip(seen["network"], twin.network.parameters(), strict=True):
        torch.testing.assert_close(mine, clip * p.grad, rtol=1e-4, atol=1e-7)
    # d/du (l e^-u + u) = 1 - l e^-u, through the bias; the head is not clipped.
    slope = (1 - output.loss.detach() / run.scale * (-u).exp()).mean()
    torch.testing.assert_close(seen["head"][1], slope[None], rtol=1e-4, atol=1e-6)


def test_uncertaintys_gradients_are_averaged_over_processes(fresh_run, monkeypatch):
    """The head has no distributed wrapper: what the optimizer sees is what the processes' mean is."""
    run = fresh_run(**uncertain(True).model_dump(exclude={"network"}))
    asked = []
    monkeypatch.setattr(run.accelerator, "reduce", lambda g, how: asked.append(how) or torch.full_like(g, 0.5))
    run.advance()
    assert asked == ["mean", "mean"]
    moments = run.optimizer.state_dict()["state"]
    for i in (len(run.parameters), len(run.parameters) + 1):
        assert torch.equal(moments[i]["exp_avg"], torch.full_like(moments[i]["exp_avg"], 0.05))  # (1 - .9) of it


@pytest.mark.heavy
def test_uncertainty_learns_how_large_the_loss_is(tmp_path, digits):
    """On a network that hardly moves, u becomes the logarithm of the loss at each level."""
    plan = uncertain(True, batch=64, optimizer={"lr": 3e-2, "warmup": 1, "clip": 1e-9})
    run_out = train(plan.model_copy(update={"steps": 160, "checkpoint_every": 0}), tmp_path, data=digits)
    state = tensors(tmp_path)
    head = Uncertainty(generator=torch.Generator().manual_seed(0))
    head.load_state_dict({k.removeprefix("uncertainty."): v for k, v in state.items() if k.startswith("uncertainty.")})
    objective, denoiser = run_out.objective, run_out.denoiser
    dim, sd = denoiser.dim, denoiser.sigma_data
    x = denoiser.encode(digits.train_images)
    for level in (-3.0, -1.0, 1.0, 3.0):
        logsnr = torch.full((len(x),), level, dtype=torch.float64)
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            loss = objective.loss_at(denoiser, x, eps, logsnr).loss.mean() / objective.scale(dim, sd)
            assert float(head(logsnr[:1])) == pytest.approx(float(loss.log()), abs=0.1)


def test_uncertainty_and_an_adaptive_density_exclude_each_other():
    with pytest.raises(LogsnrError, match="leave one of them out"):
        recipe(objective={"preset": "edm2", "logsnr": [-6, 8], "uncertainty": True, "adaptive": True})
    words = recipe(objective={"preset": "edm2", "uncertainty": True}).objective.describe()
    assert words == "edm2 over its learned uncertainty"
