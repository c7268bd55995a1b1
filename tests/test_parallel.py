"""How a network is laid out: its blocks, what they keep for the backward pass, and batches in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from logsnr.errors import LogsnrError
from logsnr.gradients import output_layer
from logsnr.training import load_data, recipe_from
from logsnr.training.config import DataConfig
from logsnr.training.parallel import blocks
from logsnr.training.processes import own_accelerator
from logsnr.training.run import Run

NETWORK = {"channels": [8, 8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4, "dropout": 0.2}


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig())


@pytest.fixture
def fresh_run(digits):
    base = {
        "network": NETWORK,
        "objective": {"weighting": "elbo", "logsnr": [-8, 8], "adaptive": {"importance": "gradient", "true_every": 2}},
        "optimizer": {"warmup": 0},
        "conditional": True,
        "batch": 8,
        "steps": 4,
        "device": "cpu",
    }
    with own_accelerator():
        yield lambda **changes: Run(recipe_from({**base, **changes}), digits)


def weights(run, steps=3):
    for _ in range(steps):
        run.advance()
    return [p.detach().clone() for p in run.parameters]


def test_blocks_are_the_levels_and_hold_all_but_what_begins_and_answers(fresh_run):
    network = fresh_run().denoiser.network
    found = blocks(network)
    assert [type(block).__name__ for block in found] == ["DownBlock2D"] * 2 + ["UpBlock2D"] * 2 + ["ResnetBlock2D"] * 2
    inside = {id(p) for block in found for p in block.parameters()}
    assert not inside & {id(p) for p in output_layer(network).parameters()}
    assert sum(p.numel() for p in network.parameters() if id(p) in inside) > 0.6 * sum(
        p.numel() for p in network.parameters()
    )


def kept(run):
    """Bytes that a forward pass keeps for the backward pass, of the batch's share of them."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, cond = run.draw(0)
    logsnr, eps = run.draw.noise(run.objective.schedule, x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.objective.loss_at(run.denoiser, x, eps, logsnr, cond)
    return sum(seen.values()) - sum(p.untyped_storage().nbytes() for p in run.parameters)


@pytest.mark.heavy
def test_recomputed_activations_are_not_kept_and_change_nothing(fresh_run):
    """Bit for bit, dropout's masks included; the true gradient norms, taken one by one, to rounding."""
    plain, run = fresh_run(batch=64), fresh_run(batch=64, recompute=True)
    assert kept(run) < 0.5 * kept(plain)
    fixed = {"preset": "vdm++/sigmoid", "adaptive": True}
    for a, b in zip(
        weights(fresh_run(objective=fixed)), weights(fresh_run(objective=fixed, recompute=True)), strict=True
    ):
        assert torch.equal(a, b)
    still = {"network": {**NETWORK, "dropout": 0.0}}
    one, other = fresh_run(**still), fresh_run(**still, recompute=True)
    weights(one), weights(other)
    for name, value in one.objective.state_dict().items():
        torch.testing.assert_close(other.objective.state_dict()[name], value, rtol=1e-3, atol=1e-12)


def test_a_batch_in_parts_is_the_batch(fresh_run):
    still = {"network": {**NETWORK, "dropout": 0.0}}
    whole, parts = fresh_run(**still), fresh_run(**still, accumulate=4)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(parts.metrics.window, whole.metrics.window, rtol=1e-4, atol=1e-6)
    for name, value in whole.objective.state_dict().items():
        torch.testing.assert_close(parts.objective.state_dict()[name], value, rtol=1e-3, atol=1e-9)
    with pytest.raises(LogsnrError, match=r"batch = 8 over 1 processes in 3 parts each: give a multiple of 3"):
        fresh_run(accumulate=3)


def test_the_blocks_are_compiled_and_nothing_else(fresh_run, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    run = fresh_run(compile=True)
    assert compiled == blocks(run.denoiser.network)
    assert run.describe() == "1 process (cpu), float32, compiled: 8 images a step"
    told = fresh_run(accumulate=2, recompute=True).describe()
    assert told == "1 process (cpu), float32, activations recomputed: 2 x 4 images a step"


@pytest.mark.heavy
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_train_as_plain_ones(fresh_run, monkeypatch, recompute):
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend="aot_eager"))
    still = {"network": {**NETWORK, "dropout": 0.0}}
    plain, run = fresh_run(**still), fresh_run(**still, compile=True, recompute=recompute)
    torch.testing.assert_close(weights(run), weights(plain), rtol=1e-3, atol=1e-5)
