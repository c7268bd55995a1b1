"""Damage: a seeded source of mutations of a file's bytes, or of the values that it holds."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-320, 1e308, 10**30, 10**400, float("inf"), float("nan"), "", "x",
    "inf", "nan", "[bold]", "$x^{", "\x1b[31m", "\ud800", "../../etc/passwd", "/etc/passwd", "a" * 10_000, "{}", [],
    {}, [[]], [None], [0] * 1000, {"name": {}}, {"": ""}, list(range(20)), [1e9] * 3, [-1, -1],
]  # fmt: skip
"""What no author of a file thought of."""
TOKENS = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 400,
    b"{",
    b"[",
    b"]",
    b"}",
    b'"',
    b"\x00",
    b"\xff",
    b":",
    b",",
]
WHOLE = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'""',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\xff\xfe",
    b"- " * 5000,
    b"\x00" * 100,
]


def of_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, cut, repeated, written over; seldom the whole."""
    kind = chance.randrange(12)
    if kind == 0:
        return chance.choice(WHOLE)
    i, j = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
    j = min(j, i + 40)
    if kind < 4:
        out = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
        return bytes(out)
    if kind < 6:
        return data[:i]
    if kind < 8:
        return data[:i] + data[j:]
    if kind < 9:
        return data[:j] + data[i:]
    return data[:i] + chance.choice(TOKENS) + data[j if kind < 11 else i :]


def of_values(values: Any, chance: random.Random) -> Any:
    """A value somewhere within replaced, removed, renamed, wrapped or repeated."""
    values = copy.deepcopy(values)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = [p for p in _places(values) if p]
        if not places:
            return chance.choice(VALUES)
        *path, key = chance.choice(places)
        inside = values
        for part in path:
            inside = inside[part]
        kind = chance.randrange(8)
        if kind < 4:
            inside[key] = copy.deepcopy(chance.choice(VALUES))
        elif kind == 4:
            del inside[key]
        elif kind == 5:
            inside[key] = [inside[key]] if chance.random() < 0.5 else {"name": inside[key]}
        elif kind == 6 and isinstance(inside, dict):
            inside[f"{key}x"] = inside.pop(key)
        else:
            inside[key] = copy.deepcopy(_at(values, chance.choice(places)))
    return values


def _places(values: Any) -> list[tuple[Any, ...]]:
    out: list[tuple[Any, ...]] = [()]
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        out += [(key, *rest) for rest in _places(value)]
    return out


def _at(values: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        values = values[part]
    return values


def of_json(data: bytes, chance: random.Random) -> bytes:
    """A mutation of a JSON file: of its bytes, or of its values."""
    if chance.random() < 0.4:
        return of_bytes(data, chance)
    return json.dumps(of_values(json.loads(data), chance)).encode()


def of_yaml(data: bytes, chance: random.Random) -> bytes:
    """A mutation of a YAML file."""
    if chance.random() < 0.4:
        return of_bytes(data, chance)
    text: str = yaml.safe_dump(of_values(yaml.safe_load(data), chance), allow_unicode=False)
    return text.encode("utf-8", "surrogatepass")


Mutation = Callable[[bytes, random.Random], bytes]
