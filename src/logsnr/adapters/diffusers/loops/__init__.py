"""Our objectives in other people's training loops: `LoopObjective`."""

from logsnr.adapters.diffusers.loops.objective import Draw, LoopObjective

__all__ = ["Draw", "LoopObjective"]
