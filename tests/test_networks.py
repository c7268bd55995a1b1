"""DiT, U-ViT and residual resampling: equal to diffusers weight by weight, F = 0 at the start, classes, compiling."""

from __future__ import annotations

import pytest
import torch

import logsnr as ls
from logsnr.adapters import export_diffusers
from logsnr.errors import LogsnrError
from logsnr.models import DiTConfig, UNetConfig, UViTConfig, build_network
from logsnr.training import train
from logsnr.training.config import recipe_from
from logsnr.training.parallel import _recompute, blocks

SMALL = {
    "unet": UNetConfig(channels=(8, 16), layers_per_block=1, norm_groups=4, head_dim=4, resample="residual"),
    "dit": DiTConfig(width=16, depth=2, heads=2),
    "uvit": UViTConfig(channels=(8, 12), layers_per_block=1, width=16, depth=2, heads=2, told=12, norm_groups=4),
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


def kept_in(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_computed_again_is_the_same(kind):
    """Gradients are equal bit for bit, and less is kept for them."""
    grads, kept = [], []
    for again in (False, True):
        network = awake(built(kind, classes=3)).train()
        if again:
            found = blocks(network)
            assert sum(p.numel() for block in found for p in block.parameters()) > 0.6 * kept_in(network)
            for block in found:
                _recompute(block)
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
@pytest.mark.parametrize("kind", ["dit", "uvit"])
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


def test_the_u_vits_dropout_is_for_coarse_maps_alone():
    """Levels 16 and 8 wide before a transformer of 4: none above `dropout_side`."""
    config = SMALL["uvit"].model_copy(update={"dropout": 0.5, "dropout_side": 8})
    network = build_network(config, (1, 16, 16))
    found = {name: m.p for name, m in network.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {name[:6]: p for name, p in found.items()} == {
        "down.0": 0.0, "down.1": 0.5, "up.0.0": 0.0, "up.1.0": 0.5, "blocks": 0.5
    }  # fmt: skip


def test_the_u_vits_skips_are_for_convolutions_alone():
    """A pixel that the transformer never sees reaches the answer; with the skips cut it does not."""
    network = awake(built("uvit"))
    x, label = inputs(1)
    with torch.no_grad():
        for narrow in network.narrow:
            narrow.weight.zero_()
        before = network(x, label)
        x[..., 0, 0] += 1
        assert (network(x, label) - before).abs().max() > 1e-3
        for blocks in network.up:
            for block in blocks:
                half = block.cut.weight.shape[1] // 2
                block.enter[0].weight[half:] = 0
                block.enter[0].bias[half:] = 0
                block.cut.weight[:, half:] = 0
        cut = network(x, label)
        x[..., 0, 0] += 1
        # Group norm takes its statistics over channels of one kind, of 4 groups half are of skips.
        torch.testing.assert_close(network(x, label), cut, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "values", "said"),
    [
        (DiTConfig, {"width": 10, "heads": 2}, "width 10 is no multiple of 4"),
        (DiTConfig, {"width": 16, "heads": 3}, "width 16 is no multiple of 3: heads share it"),
        (UViTConfig, {"width": 16, "heads": 3}, "width 16 is no multiple of 3: heads share it"),
        (UViTConfig, {"channels": (24,)}, "channels 24 with norm_groups 16"),
    ],
)
def test_widths_that_do_not_fit(config, values, said):
    with pytest.raises(ValueError, match=said):
        config(**values)


def test_patches_that_do_not_fit():
    with pytest.raises(LogsnrError, match=r"images of 9 x 8 in patches of 2: both sides must be multiples"):
        build_network(SMALL["dit"], (1, 9, 8))
    with pytest.raises(LogsnrError, match=r"halved behind each of 2 levels: both sides must be multiples of 4"):
        build_network(SMALL["uvit"], (1, 6, 8))


@pytest.mark.parametrize("kind", ["dit", "uvit"])
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
