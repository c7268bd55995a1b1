"""The demo: a model of real digits is trained, measured and sampled in front of you, and a report says how it went."""

from logsnr.demo.run import run_demo

__all__ = ["run_demo"]
