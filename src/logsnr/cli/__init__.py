"""The `logsnr` command: importing a module of commands puts them into the application."""

from logsnr.cli import (
    calibrate,
    commands,
    compare,
    encode,
    evaluate,
    generate,
    information,
    lists,
    objective,
    passport,
    prepare,
    probe,
    sample,
    stats,
)
from logsnr.cli.application import app, main

__all__ = [
    "app",
    "calibrate",
    "commands",
    "compare",
    "encode",
    "evaluate",
    "generate",
    "information",
    "lists",
    "main",
    "objective",
    "passport",
    "prepare",
    "probe",
    "sample",
    "stats",
]
