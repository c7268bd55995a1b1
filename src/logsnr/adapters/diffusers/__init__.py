"""diffusers: our plans in its pipelines, its models as denoisers, our objectives in its training scripts.

config.py     the noise levels and the prediction that a scheduler's config describes
classes.py    its scheduler classes by name: what each implies, or why it is not ours
stock.py      configs of its own schedulers, read as ours
scheduler/    `GradientEstimationScheduler`
pipelines/    a pipeline's network as a `Denoiser`
loops/        `LoopObjective`
export.py     a run as a stock pipeline
"""
