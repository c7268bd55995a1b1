"""Page: the parts of a self-contained HTML report (no scripts, no second file) and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from logsnr.images import data_uri
from logsnr.writing import replace_file

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --accent: #1f5fa8; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); }
body { max-width: 980px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; }
p { max-width: 72ch; } .lead, figcaption, .note { color: var(--soft); }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; max-width: 72ch; }
figure img { image-rendering: pixelated; max-width: 100%; height: auto; } figure svg { max-width: 100%; height: auto; }
.row { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; }
.row > * { flex: 1 1 400px; margin: .5rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; min-width: 9rem; flex: 1; }
.card b { display: block; font-size: 1.45rem; color: var(--accent); }
.card span { font-size: .85rem; color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; font-size: .9rem; }
td img { image-rendering: pixelated; display: block; margin-left: auto; }
code { background: #f2f5f8; padding: .1em .3em; border-radius: 4px; }
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
    """An SVG figure with its caption."""
    return Html(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")


def row(*parts: Html) -> Html:
    """Parts side by side where the window is wide enough."""
    return Html(f'<div class="row">{"".join(parts)}</div>')


def cards(values: Sequence[tuple[str, str]]) -> Html:
    """Headline numbers: (number, what it is)."""
    inner = "".join(f'<div class="card"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what in values)
    return Html(f'<div class="cards">{inner}</div>')


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """A table; cells are text or `Html`."""
    head = "".join(f"<th>{markup(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{markup(c)}</td>" for c in r) + "</tr>" for r in rows)
    return Html(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def write_page(path: Path, title: str, parts: Sequence[Html]) -> Path:
    """Write the page whole: to a temporary file beside `path`, then renamed over it."""
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    replace_file(path, text.encode())
    return path
