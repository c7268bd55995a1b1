"""DiT, U-ViT and residual resampling: equal to diffusers weight by weight, F = 0 at the start, classes, compiling."""

from __future__ import annotations

import pytest
import torch

import logsnr as ls
from logsnr.adapters import export_diffusers
from logsnr.errors import LogsnrError
from logsnr.models import DiTConfig, UNetConfig, build_network
from logsnr.training import train
from logsnr.training.config import recipe_from

SMALL = {
    "unet": UNetConfig(channels=(8, 16), layers_per_block=1, norm_groups=4, head_dim=4, resample="residual"),
    "dit": DiTConfig(width=16, depth=2, heads=2),
}
SHAPE = (3, 8, 12)


def built(kind, *, classes=0, seed=0, shape=SHAPE):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(SMALL[kind].model_copy(update={"classes": classes}), shape)


def awake(network, seed=1):
    """The same network, none of whose layers is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network.eval()


def inputs(n=3, shape=SHAPE, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), torch.rand(n, generator=generator) * 1000


def test_the_dit_is_diffusers_weight_by_weight():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=5, norm_eps=1e-6,
    )  # fmt: skip
    ours = awake(built("dit", classes=5, shape=(3, 8, 8)))
    mine = ours.state_dict()
    patches = mine["out.weight"].unflatten(0, (3, 4)).transpose(0, 1).flatten(0, 1)  # theirs ends in channels
    copied = {
        "pos_embed.proj.weight": mine["embed.weight"], "pos_embed.proj.bias": mine["embed.bias"],
        "proj_out_1.weight": mine["modulation.weight"], "proj_out_1.bias": mine["modulation.bias"],
        "proj_out_2.weight": patches, "proj_out_2.bias": mine["out.bias"].unflatten(0, (3, 4)).T.flatten(),
    }  # fmt: skip
    names = {"modulation": "norm1.linear", "project": "attn1.to_out.0", "mlp.0": "ff.net.0.proj", "mlp.3": "ff.net.2"}
    told = {"level.0": "timestep_embedder.linear_1", "level.2": "timestep_embedder.linear_2"}
    for i in range(2):
        for part in ("weight", "bias"):
            block, to = f"blocks.{i}", f"transformer_blocks.{i}"
            copied |= {f"{to}.{theirs_}.{part}": mine[f"{block}.{name}.{part}"] for name, theirs_ in names.items()}
            for name, each in zip("qkv", mine[f"{block}.qkv.{part}"].chunk(3), strict=True):
                copied[f"{to}.attn1.to_{name}.{part}"] = each
            copied |= {f"{to}.norm1.emb.{new}.{part}": mine[f"condition.{name}.{part}"] for name, new in told.items()}
        copied[f"{to}.norm1.emb.class_embedder.embedding_table.weight"] = mine["condition.classes.weight"]
    assert copied.keys() == theirs.state_dict().keys() - {"pos_embed.pos_embed"}
    theirs.load_state_dict(copied, strict=False)
    x, label = inputs(shape=(3, 8, 8))
    classes = torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected = theirs.eval()(x, label, classes, return_dict=False)[0]
        torch.testing.assert_close(ours(x, label, classes), expected, rtol=0, atol=2e-5)
        assert expected.std() > 0.1


@pytest.mark.parametrize("kind", SMALL)
def test_they_begin_as_zero_and_learn_from_there(kind):
    network = built(kind, classes=3)
    x, label = inputs()
    assert torch.equal(network(x, label), torch.zeros_like(x))
    (network(x, label) - 1).square().mean().backward()
    assert max(p.grad.abs().max() for p in network.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("kind", SMALL)
def test_classes_and_the_null_condition(kind):
    network, plain = awake(built(kind, classes=3)), awake(built(kind))
    x, label = inputs()
    with torch.no_grad():
        null = network(x, label, torch.full((3,), 3))
        assert torch.equal(network(x, label), null)
        assert not torch.allclose(network(x, label, torch.zeros(3, dtype=torch.long)), null, atol=1e-3)
        begun = built(kind, classes=7, seed=5).eval()
        begun.begin_as(network)
        torch.testing.assert_close(begun(x, label, torch.tensor([0, 6, 7])), null)
        forgot = built(kind, seed=5).eval()
        forgot.begin_as(network)
        torch.testing.assert_close(forgot(x, label), null)
        named = built(kind, classes=2, seed=5).eval()
        named.begin_as(plain)
        torch.testing.assert_close(named(x, label, torch.tensor([0, 1, 2])), plain(x, label))
    with pytest.raises(LogsnrError, match="without classes: leave them out"):
        plain(x, label, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_computed_again_is_the_same(kind):
    """Gradients are equal bit for bit, and less is kept for them."""
    grads, kept = [], []
    for again in (False, True):
        network = awake(built(kind, classes=3)).train()
        if again:
            network.enable_gradient_checkpointing()
        count = 0

        def keep(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(*inputs(), torch.tensor([0, 1, 3])).square().mean()
        kept.append(count)
        loss.backward()
        grads.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["dit"])
def test_they_compile_whole(kind):
    """One graph without breaks, equal to the network: what torch.compile needs."""
    network = awake(built(kind, classes=3))
    x, label = inputs()
    with torch.no_grad():
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, label), network(x, label))


@pytest.mark.parametrize("kind", SMALL)
def test_true_gradients_of_samples(kind):
    """vmap goes through: the norm of each sample's gradient is that of a backward pass of its own."""
    network = awake(built(kind, classes=3))
    denoiser = ls.NetworkDenoiser(network, ls.predictions.V(label="flow"), shape=SHAPE)
    x, eps = inputs()[0], inputs(seed=3)[0]
    sigma, cond = torch.tensor([0.1, 1.0, 9.0]), {"class_labels": torch.tensor([0, 1, 3])}
    norms = ls.gradients.gradient_norms(denoiser, x, eps, sigma, cond)
    network.zero_grad()
    one = {"class_labels": cond["class_labels"][1:2]}
    (denoiser.eps_error(x[1:2], eps[1:2], sigma[1:2], **one).sum() / 2).backward()
    expected = sum(p.grad.square().sum() for p in network.parameters() if p.grad is not None)
    torch.testing.assert_close(norms[1], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"width": 10, "heads": 2}, "width 10 is no multiple of 4"),
        ({"width": 16, "heads": 3}, "width 16 is no multiple of 3: heads share it"),
    ],
)
def test_widths_that_do_not_fit(config, said):
    with pytest.raises(ValueError, match=said):
        DiTConfig(**config)


def test_patches_that_do_not_fit():
    with pytest.raises(LogsnrError, match=r"images of 9 x 8 in patches of 2: both sides must be multiples"):
        build_network(SMALL["dit"], (1, 9, 8))


@pytest.mark.parametrize("kind", ["dit"])
def test_they_are_trained_from_a_recipe_and_loaded(kind, tmp_path):
    network = SMALL[kind].model_dump(exclude={"classes"})
    recipe = recipe_from(
        {"network": network, "conditional": True, "steps": 3, "batch": 8, "samples": {"every": 0}, "device": "cpu"}
    )
    summary = train(recipe, tmp_path / "run", progress=False)
    denoiser = ls.load(tmp_path / "run")
    assert denoiser.network.config == SMALL[kind].model_copy(update={"classes": 10})
    z, cond = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {"class_labels": torch.arange(2)}
    assert torch.equal(denoiser(z, 1.0, **cond).x0, summary.denoiser(z, 1.0, **cond).x0)
    assert denoiser(z, 1.0, **cond).x0.std() > 0
    with pytest.raises(LogsnrError, match=rf"kind '{kind}' is no UNet2DModel"):
        export_diffusers(denoiser, tmp_path / "pipeline")
