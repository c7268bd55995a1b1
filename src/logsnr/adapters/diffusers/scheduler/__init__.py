"""The scheduler: any plan inside any diffusers pipeline.

plan_for.py      from a config and a `set_timesteps` call to one plan
grid_for.py      from a config and a number of steps to a grid
trajectory.py    runs of a plan, and which of them a call of `step` belongs to
scheduler.py     the class that diffusers sees (it imports diffusers, nothing else here does)
"""
