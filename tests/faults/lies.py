"""Archives and headers that lie: sizes that are not there, values without end, links to what never ends.

Every file is one that a person may be handed: data, a recipe, a plan, a model.  Nothing may take the machine's memory,
its time, or be read as what it is not.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

import logsnr as ls
from faults import Fault
from faults.calls import complaint, inside
from faults.damage import of_bytes
from faults.mutations import scene

Lie = tuple[str, tuple[str, ...]]
"""(what lies, the command that reads it)."""
WIDE = 2**62


def _npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header) + 1)
    return b"\x93NUMPY" + version + size + header.encode("latin1") + b"\n" + data


def _header(shape: object, kind: str = "|u1") -> str:
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}"


HEADERS = [
    _header("(10000000000000, 8, 8)"), _header(f"({WIDE}, {WIDE}, 8)"), _header("(-1, 8, 8)"), _header("(-1, -1, 8)"),
    _header("(8, 8)"), _header("(0, 8, 8)"), _header("8"), _header("('8', 8, 8)"), _header("(8.5, 8, 8)"),
    _header("None"), _header("(8, 8, 8)", "|O"), _header("(8, 8, 8)", "|V99999999"), _header("(8, 8, 8)", "<f8"),
    _header("(8, 8, 8)", "<U999999999"), _header("(8, 8, 8)", "nope"), _header("(" + "8, " * 60 + ")"), "{" * 5000,
    "(" * 3000, "[" * 60_000, "1" * 60_000, "", "__import__('os').system('touch pwned')",
    "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (8, 8, 8), }",
    _header("(8, 8, 8)").replace("False", "'yes'"), _header("(True, 8, 8)"), _header("(8, 8, 8)") + " " * 60_000,
]  # fmt: skip
"""Headers of .npy files with the bytes of eight small images behind them."""


def _zip(name: str, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, data)
    return out.getvalue()


def arrays() -> Iterator[Lie]:
    """Data: .npy and .npz."""
    images = bytes(8 * 64)
    for i, header in enumerate(HEADERS):
        for version in (b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"):
            Path("x.npy").write_bytes(_npy(header[:65_000], images, version))
            yield f"header {i} of version {version[0]}", _trained("x.npy")
    for i, header in enumerate(HEADERS):
        Path("x.npz").write_bytes(_zip("images.npy", _npy(header[:65_000], images)))
        yield f"header {i} in an archive", _trained("x.npz")
    whole = _npy(_header("(8, 8, 8)"), images)
    bomb = _npy(_header("(3000000, 8, 8)"), bytes(3_000_000 * 64))
    for name in ("DEFLATED", "BZIP2", "LZMA"):
        Path("x.npz").write_bytes(_zip("images.npy", bomb, getattr(zipfile, f"ZIP_{name}")))
        yield f"a bomb, {name}", _trained("x.npz")
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(300):
            archive.writestr(f"a{i}.npy", _npy(_header("(1000000,)"), bytes(1_000_000)))
        archive.writestr("images.npy", whole)
    Path("x.npz").write_bytes(many.getvalue())
    yield "three hundred parts", _trained("x.npz")
    packed = _zip("images.npy", whole)
    central = packed.rindex(b"PK\x01\x02")
    for what, at, form, value in (
        ("its size", 24, "<I", 2**32 - 2), ("its packed size", 20, "<I", 2**32 - 2), ("its method", 10, "<H", 99),
        ("its flags", 8, "<H", 1), ("its place", 42, "<I", 2**31), ("its sum", 16, "<I", 1), ("nothing", 24, "<I", 0),
    ):  # fmt: skip
        data = bytearray(packed)
        struct.pack_into(form, data, central + at, value)
        Path("x.npz").write_bytes(data)
        yield f"an archive that lies about {what}", _trained("x.npz")
    for name in ("../images.npy", "/images.npy", "images", "images.npy/", "\x1b[31m.npy", "a" * 60_000):
        Path("x.npz").write_bytes(_zip(name, whole))
        yield f"a part called {name[:20]!r}", _trained("x.npz")
    chance = random.Random(0)
    for i in range(60):
        Path("x.npz").write_bytes(of_bytes(packed, chance))
        yield f"an archive damaged at random, {i}", _trained("x.npz")


def _trained(source: str) -> tuple[str, ...]:
    return ("train", "recipe.yaml", "--out", "new", "--set", f"data.source={source}", "--set", "data.holdout=0")


def tensors() -> Iterator[Lie]:
    """Models whose cards vouch for weights that lie, and starts."""
    honest = next(Path("run").glob("model-*.safetensors")).read_bytes()
    size = struct.unpack("<Q", honest[:8])[0]
    header, body = json.loads(honest[8 : 8 + size]), honest[8 + size :]
    first = next(name for name in header if name != "__metadata__")

    def packed(changed: object, data: bytes = body) -> bytes:
        text = (changed if isinstance(changed, str) else json.dumps(changed)).encode()
        return struct.pack("<Q", len(text)) + text + data

    entry = header[first]
    lies: dict[str, bytes] = {
        "a length without end": struct.pack("<Q", 2**63) + honest[8:],
        "a length of 0": struct.pack("<Q", 0) + honest[8:],
        "no header": b"",
        "half a length": honest[:4],
        "nested": packed("[" * 100_000),
        "a list": packed([1]),
        "an empty header": packed({}),
        "NaN": packed("NaN"),
        "no data": packed(header, b""),
        "more data": packed(header, body * 2),
        "a kind that is none": packed({**header, first: {**entry, "dtype": "Q9"}}),
        "a rare kind": packed({**header, first: {**entry, "dtype": "F8_E8M0"}}),
        "complex": packed({**header, first: {**entry, "dtype": "C64"}}),
        "a shape without end": packed({**header, first: {**entry, "shape": [WIDE, WIDE]}}),
        "a negative shape": packed({**header, first: {**entry, "shape": [-1]}}),
        "another shape": packed({**header, first: {**entry, "shape": [1, *entry["shape"]]}}),
        "offsets beyond the file": packed({**header, first: {**entry, "data_offsets": [0, WIDE]}}),
        "offsets backwards": packed({**header, first: {**entry, "data_offsets": entry["data_offsets"][::-1]}}),
        "offsets that overlap": packed({**header, "again": entry}),
        "no offsets": packed({**header, first: {}}),
        "null": packed({**header, first: None}),
    }
    card = json.loads(Path("run/card.json").read_text())
    file = Path("run") / card["weights"]["file"]
    for what, data in lies.items():
        file.write_bytes(data)
        facts = {**card["weights"], "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        Path("run/card.json").write_text(json.dumps({**card, "weights": facts}))
        yield f"weights: {what}", SAMPLED
    file.write_bytes(honest)
    for what, network in {
        "channels": {"channels": [4096] * 10},
        "layers": {"layers_per_block": 64, "channels": [1024] * 8},
        "classes": {"classes": 1_000_000},
        "patches": {"patch": 4096},
        "a norm of 0": {"norm_groups": 0},
        "no channels": {"channels": []},
        "many levels": {"channels": [8] * 400},
        "heads": {"head_dim": 10**30},
        "fourier": {"fourier": [12] * 100_000},
    }.items():
        changed = {**card, "network": {**card["network"], **network}}
        Path("run/card.json").write_text(json.dumps({**changed, "classes": changed["network"].get("classes", 0)}))
        yield f"a card of too many {what}", SAMPLED
    for what, shape in {
        "pixels": [1, 10**9, 10**9],
        "channels": [10**12, 8, 8],
        "axes": [1] * 10_000,
        "none": [],
    }.items():
        Path("run/card.json").write_text(json.dumps({**card, "shape": shape}))
        yield f"a card of a shape of too many {what}", SAMPLED
    Path("run/card.json").write_text(json.dumps(card))
    for what, target in {"itself": file.name, "a device": "/dev/zero"}.items():
        file.unlink()
        os.symlink(target, file)
        yield f"weights that link to {what}", SAMPLED
    file.unlink()
    file.write_bytes(honest)
    start = ls.GaussianStart.fit(torch.randn(64, *card["shape"], generator=torch.Generator().manual_seed(0)))
    start.save("start.safetensors")
    honest = Path("start.safetensors").read_bytes()
    for i, facts in enumerate(
        ("null", "[]", "{}", "[" * 10_000, '{"format": 2}', '{"format": 1, "shape": 3, "kinds": [[]]}')
    ):
        Path("start.safetensors").write_bytes(save({"means": torch.zeros(1)}, {"logsnr_start": facts}))
        yield f"a start with the facts {i}", (*SAMPLED, "--start", "start.safetensors")
    chance = random.Random(1)
    for i in range(30):
        Path("start.safetensors").write_bytes(of_bytes(honest, chance))
        yield f"a start damaged at random, {i}", (*SAMPLED, "--start", "start.safetensors")


SAMPLED = ("sample", "run", "--nfe", "2", "-n", "1", "--out", "x.npy")


def texts() -> Iterator[Lie]:
    """Recipes, plans and configurations without end."""
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    few = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 10))
    for what, text in {
        "laughs": laughs,
        "merges": merges,
        "laughs within the bound": few,
        "itself": "steps: &a [*a]",
        "a key of itself": "&a [*a]: 1",
        "nested": "[" * 50_000,
        "nested blocks": "".join("- " * i + "\n" for i in range(1, 3000)),
        "long": "steps: 1 # " + "x" * 10**6,
        "a date": "steps: 2001-13-45",
        "a base": "seed: 0b",
        "a tag": "steps: !!int ''",
        "binary": "steps: !!binary =",
        "a set": "!!set {a, b}",
        "an object": "steps: !!python/object/apply:os.system [touch pwned]",
        "a stamp": "steps: !!timestamp x",
        "a bool": "steps: !!bool x",
        "digits": "steps: " + "9" * 100_000,
        "sixties": "steps: 1" + ":59" * 10_000,
        "documents": "---\nsteps: 1\n---\nsteps: 2",
        "keys": "? [a, b]\n: 1",
        "numbers as keys": "1: 2",
        "a newer one": "format: 2\nsteps: 1",
        "a null": "\x00",
        "utf-16": "\ufeffsteps: 1",
        "a secret": "password: hunter2",
        "one word": "hunter2",
        "tabs": "\tsteps: hunter2",
        "an alias": "steps: *hunter2",
        "tags": "!hunter2 x",
    }.items():
        Path("lie.yaml").write_bytes(text.encode("utf-16" if what == "utf-16" else "utf-8"))
        yield f"a recipe: {what}", ("train", "lie.yaml", "--out", "new", "--set", "max_seconds=1", "--set", "steps=1")
    plan = ls.solvers.ddim([4.0, 1.0, 0.0]).to_dict()
    for what, text in {
        "nested": "[" * 10**6,
        "nested plans": '{"2": ' * 500 + json.dumps(plan) + "}" * 500,
        "digits": '{"version": 1, "sigmas": [' + "9" * 5000 + "]}",
        "a path": '"text"',
        "paths": '["text"]',
        "a path by number": '{"2": "text"}',
        "itself": '"lie.json"',
        "large": " " * (2**26 + 1) + "{}",
        "a newer one": json.dumps({**plan, "version": 2}),
        "NaN": '{"version": NaN}',
        "surrogates": '{"version": 1, "\\ud800": 1}',
        "a word": "hunter2",
        "numbers": json.dumps({**plan, "sigmas": [10**400, 1, 0]}),
        "texts": json.dumps({**plan, "rows": "x" * 10**5}),
        "meta": json.dumps({**plan, "meta": [1]}),
        "tail": json.dumps({**plan, "meta": {"tail": "x", "start": {}}}),
    }.items():
        Path("lie.json").write_text(text, encoding="utf-8")
        yield f"a plan: {what}", (*SAMPLED, "--plan", "lie.json")
        shutil.copy("lie.json", "run/plans.json")
        yield f"a run's plans: {what}", SAMPLED
        Path("run/plans.json").unlink()
        yield f"a configuration: {what}", ("objective", "lie.json")
        yield f"a passport: {what}", ("calibrate", "run", "--passport", "lie.json")
    for what, words in {
        "a plan": (*SAMPLED, "--plan", "@"),
        "a recipe": ("train", "@"),
        "a configuration": ("objective", "@"),
    }.items():
        for suffix in (".json", ".yaml"):
            link = Path(f"endless{suffix}")
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/zero")
            yield f"{what} without end ({suffix})", tuple(str(link) if word == "@" else word for word in words)


def pictures() -> Iterator[Lie]:
    """Images whose headers promise more than there is."""
    Path("images").mkdir()
    file = Path("images") / "x.png"

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def image(width: int, height: int, data: bytes, depth: int = 8, colour: int = 0) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    dark = zlib.compress(bytes(9 * 8))
    for what, data in {
        "a bomb": image(60_000, 60_000, zlib.compress(bytes(10**7))),
        "a wide one": image(2**31 - 1, 1, dark),
        "no rows": image(8, 0, dark),
        "too few bytes": image(800, 800, dark),
        "no data": image(8, 8, b""),
        "a depth of 7": image(8, 8, dark, 7),
        "a colour of 9": image(8, 8, dark, 8, 9),
        "a long comment": image(8, 8, dark)[:-12]
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
        + chunk(b"IEND", b""),
    }.items():
        file.write_bytes(data)
        yield (
            f"an image: {what}",
            ("train", "recipe.yaml", "--out", "new", "--set", "data.source=images", "--set", "data.size=8"),
        )


PARTS: tuple[Callable[[], Iterator[Lie]], ...] = (arrays, tensors, texts, pictures)


def all_lies(folder: Path) -> Iterator[Fault]:
    """Every lie, each read by the command that would."""
    for part in PARTS:
        here = folder / part.__name__
        here.mkdir()
        scene(here)
        (here / "run" / "plans.json").unlink()
        (here / "text").write_text("hunter2", encoding="utf-8")
        with inside(here):
            for what, words in part():
                ended, trouble = complaint(*words)
                if Path("pwned").exists():
                    trouble = "ran code"
                elif "hunter2" in ended.err + ended.out:
                    trouble = "quotes what it read"
                shutil.rmtree("new", ignore_errors=True)
                yield what, trouble
