"""Page: the parts of a self-contained HTML report (no scripts, no second file) and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from logsnr.images import data_uri
from logsnr.writing import replace_file

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #55606f; --line: #dfe4ea; --accent: #1f5fa8;
  --ground: #fff; --code: #f2f5f8; --error: #b3261e; --warning: #8a5200; --info: #2c7046; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #a6b1bf; --line: #36404d; --accent: #86b6f0;
  --ground: #14181e; --code: #232b35; --error: #ff8f86; --warning: #f0b35a; --info: #7fcf9d; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 980px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; }
p { max-width: 72ch; } .lead, figcaption, caption, .note { color: var(--soft); }
figure { margin: 1rem 0; } figcaption, caption { font-size: .9rem; max-width: 72ch; }
figure img { image-rendering: pixelated; max-width: 100%; height: auto; }
figure svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.row { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
.row > * { flex: 1 1 min(400px, 100%); margin: .5rem 0; min-width: 0; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; min-width: 9rem; flex: 1; }
.card b { display: block; font-size: 1.45rem; color: var(--accent); }
.card span { font-size: .85rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: 1rem 0; } .scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { text-align: left; padding: .3rem 0; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(72ch, calc(100vw - 2.4rem)); }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; font-size: .9rem; }
tbody th { font-weight: 400; font-size: 1rem; white-space: normal; min-width: 8rem; }
td img { image-rendering: pixelated; display: block; margin-left: auto; }
.strip th, .strip td { min-width: 0; padding: .15rem .3rem; border: 0; text-align: center; }
.strip td img { margin: 0; }
.findings { list-style: none; padding: 0; max-width: 80ch; } .findings li { margin: .5rem 0; }
.error { color: var(--error); } .warning { color: var(--warning); } .info { color: var(--info); }
code { background: var(--code); padding: .1em .3em; border-radius: 4px; }
"""


class Html(str):
    """Text that is markup already; every other string is escaped on its way into a page."""

    __slots__ = ()


def markup(value: object) -> str:
    """The value as markup: `Html` as it stands, anything else escaped."""
    return value if isinstance(value, Html) else escape(str(value))


def heading(text: str) -> Html:
    """A section's heading."""
    return Html(f"<h2>{escape(text)}</h2>")


def paragraph(*parts: object, kind: str = "") -> Html:
    """A paragraph; `kind` "lead" or "note" sets it softer."""
    return Html(f'<p class="{kind}">{"".join(markup(p) for p in parts)}</p>')


def picture(image: Image.Image, caption: str = "", alt: str = "") -> Html:
    """An image with its caption, stored in the page."""
    tag = f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" alt="{escape(alt or caption)}">'
    return Html(f"<figure>{tag}<figcaption>{escape(caption)}</figcaption></figure>")


def inline_image(image: Image.Image, alt: str) -> Html:
    """An image without caption, for a table's cell."""
    return Html(f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" alt="{escape(alt)}">')


def chart(svg: str, caption: str) -> Html:
    """An SVG figure with its caption, which is its accessible name too."""
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return Html(f"<figure>{named}<figcaption>{escape(caption)}</figcaption></figure>")


def strip(columns: Sequence[tuple[str, Image.Image]], caption: str, *, what: str = "") -> Html:
    """Pictures side by side, each under its label; what the labels are of stands before them."""
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label, _ in columns)
    cells = "".join(f"<td>{inline_image(image, f'{what} {label}'.strip())}</td>" for label, image in columns)
    before = (f'<th scope="col">{escape(what)}</th>', "<td></td>") if what else ("", "")
    body = f"<thead><tr>{before[0]}{head}</tr></thead><tbody><tr>{before[1]}{cells}</tr></tbody>"
    return _scrolling(f'<table class="strip"><caption><span>{escape(caption)}</span></caption>{body}</table>', caption)


def row(*parts: Html) -> Html:
    """Parts side by side where the window is wide enough."""
    return Html(f'<div class="row">{"".join(parts)}</div>')


def cards(values: Sequence[tuple[str, str]]) -> Html:
    """Headline numbers: (number, what it is)."""
    inner = "".join(f'<div class="card"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what in values)
    return Html(f'<div class="cards">{inner}</div>')


def table(header: Sequence[object], rows: Sequence[Sequence[object]], caption: str) -> Html:
    """A table; cells are text or `Html`, the first of a row is its name.  An empty header is left out."""
    head = "".join(f'<th scope="col">{markup(h)}</th>' if h else "<td></td>" for h in header)
    body = "".join(
        f'<tr><th scope="row">{markup(first)}</th>' + "".join(f"<td>{markup(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return _scrolling(
        f"<table><caption><span>{escape(caption)}</span></caption>{head}<tbody>{body}</tbody></table>", caption
    )


def _scrolling(element: str, name: str) -> Html:
    """Wide contents, which scroll alone on a narrow screen; a keyboard reaches them too."""
    return Html(f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{element}</div>')


def write_page(path: Path, title: str, parts: Sequence[Html]) -> Path:
    """Write the page whole: to a temporary file beside `path`, then renamed over it."""
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )
    replace_file(path, text.encode())
    return path
