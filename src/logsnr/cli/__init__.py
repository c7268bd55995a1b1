"""The `logsnr` command."""

from logsnr.cli.commands import app, main

__all__ = ["app", "main"]
