"""Every pipeline and scheduler class of diffusers with our scheduler: does it run, is it equal to stock, or why not?

    PYTHONPATH=tests python -m compatibility       writes docs/compatibility.md

components.py    tiny random networks, by family
pipelines.py     which pipelines are made of which, and how they are called
rarer.py         more of them
judge.py         one pipeline: its own scheduler, ours at gamma 1, ours unasked; and what the difference is
page.py          the page
"""
