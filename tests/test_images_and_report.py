"""Pictures, and pages that need no second file."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from logsnr.images import data_uri, side_by_side, tile
from logsnr.report import figures
from logsnr.report.page import Html, cards, heading, markup, paragraph, picture, table, write_page
from logsnr.schedules import Cosine
from logsnr.weightings import Sigmoid


def test_tile_puts_every_pixel_where_it_belongs():
    images = torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 1, 2, 2)
    picture = tile(images, columns=2, scale=2, gap=1, background=200)
    assert picture.size == (2 * 4 + 1, 2 * 4 + 1)
    for i, (x, y) in enumerate([(0, 0), (5, 0), (0, 5)]):
        for dy in range(4):
            for dx in range(4):
                assert picture.getpixel((x + dx, y + dy)) == int(images[i, 0, dy // 2, dx // 2])
    assert picture.getpixel((4, 0)) == 200  # the gap
    assert picture.getpixel((7, 7)) == 200  # the missing fourth image


def test_tile_keeps_colour_and_refuses_floats():
    colour = tile(torch.tensor([[[[255]], [[0]], [[7]]]], dtype=torch.uint8), columns=1, scale=1)
    assert colour.getpixel((0, 0)) == (255, 0, 7)
    with pytest.raises(ValueError, match="uint8"):
        tile(torch.zeros(1, 1, 2, 2), columns=1)


def test_side_by_side_keeps_both_pictures():
    left, right = Image.new("L", (3, 5), 10), Image.new("L", (4, 2), 20)
    both = side_by_side(left, right, gap=2)
    assert both.size == (9, 5)
    assert both.crop((0, 0, 3, 5)).tobytes() == left.tobytes()
    assert both.crop((5, 0, 9, 2)).tobytes() == right.tobytes()
    assert both.getpixel((4, 0)) == both.getpixel((6, 4)) == 255


def test_data_uri_round_trip():
    image = tile(
        torch.randint(0, 256, (1, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), columns=1
    )
    head, body = data_uri(image).split(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).tobytes() == image.tobytes()


def test_text_is_escaped_and_markup_is_not():
    assert markup("a < b & c") == "a &lt; b &amp; c"
    assert markup(Html("<b>x</b>")) == "<b>x</b>"
    assert paragraph("1 < 2 ", Html("<b>yes</b>")) == '<p class="">1 &lt; 2 <b>yes</b></p>'
    assert '<th scope="row">&lt;i&gt;</th><td>2 &amp; 3</td>' in table(["a", "b"], [["<i>", "2 & 3"]], "what")
    assert "<caption><span>a &lt; b</span></caption>" in table([], [["x"]], "a < b")
    assert "&amp;" in heading("a & b")
    assert "<b>3</b>" in cards([("3", "things")])


def test_page_stands_alone_and_replaces_the_old_one(tmp_path):
    image = Image.new("L", (2, 2))
    svg = figures.weighting_and_density(Sigmoid(2.0), Cosine().truncate(-10, 10))
    path = tmp_path / "new" / "report.html"
    for title in ("first", "second"):
        write_page(path, title, [picture(image, "a picture"), Html(svg)])
    text = path.read_text(encoding="utf-8")
    assert "<h1>second</h1>" in text
    assert list(path.parent.iterdir()) == [path]
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert addresses
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert "<script" not in text


def test_figures_carry_their_labels_and_repeat_exactly():
    curves = {"model": ([-4.0, 0.0, 4.0], [0.1, 0.5, 0.9])}
    one = figures.loss_against_logsnr(curves, sigma_data=0.5)
    assert one == figures.loss_against_logsnr(curves, sigma_data=0.5)
    for words in ("model", "knows only sigma_data", "error of eps per dimension"):
        assert words in one
    both = figures.against_nfe({"DDIM": ([5, 10], [0.4, 0.2])}, ylabel="FD", floor=("real", 0.1))
    for words in ("DDIM", "real", "FD", "network evaluations per image"):
        assert words in both
    assert "step" in figures.training_curve([1, 2, 3], [3.0, 2.0, 1.0])
