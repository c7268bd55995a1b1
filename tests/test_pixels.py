"""The codec between stored grey levels and the box."""

from __future__ import annotations

import pytest
import torch

from logsnr.pixels import Pixels


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_decode_inverts_encode_within_half_a_spacing(levels: int) -> None:
    pixels = Pixels(levels)
    v = torch.arange(levels, dtype=torch.uint8)
    x = pixels.encode(v)
    assert torch.equal(pixels.decode(x), v)
    for nudge in (-0.499, 0.499):
        assert torch.equal(pixels.decode(x + nudge * pixels.spacing), v)


def test_encoding_is_vdms() -> None:
    """2 (v + .5)/256 - 1 (2107.00630, app. A): cell centres, symmetric about 0."""
    v = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(Pixels().encode(v).double(), 2 * (v.double() + 0.5) / 256 - 1, rtol=0, atol=1e-7)
    assert torch.equal(Pixels().encode(v), -Pixels().encode(v).flip(0))


def test_values_outside_the_box_clamp() -> None:
    assert Pixels(17).decode(torch.tensor([-3.0, -1.0, 1.0, 9.0])).tolist() == [0, 0, 16, 16]


def test_display_spans_all_of_8_bits() -> None:
    assert Pixels(17).display(torch.tensor([0, 8, 16], dtype=torch.uint8)).tolist() == [0, 128, 255]
    v = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(Pixels().display(v), v)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="grey_levels = 1"):
        Pixels(1)
    with pytest.raises(ValueError, match="grey_levels = 257"):
        Pixels(257)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        Pixels().encode(torch.zeros(2))
    with pytest.raises(ValueError, match="pixel value 17 with grey_levels = 17"):
        Pixels(17).encode(torch.tensor([17], dtype=torch.uint8))
