"""The `logsnr` command: importing a module of commands puts them into the application."""

from logsnr.cli import commands, compare, generate, lists, objective, passport, probe, sample
from logsnr.cli.application import app, main

__all__ = ["app", "commands", "compare", "generate", "lists", "main", "objective", "passport", "probe", "sample"]
