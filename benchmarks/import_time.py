"""Seconds that imports take: each in a fresh interpreter, in turn; medians.

    nothing is named      import logsnr, which imports no torch
    everything is named   import torch, logsnr and every public name, over import torch alone

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys
import time

RUNS = 7
EMPTY, TORCH, LOGSNR = "pass", "import torch", "import logsnr"
NAMED = "import torch, logsnr; [getattr(logsnr, name) for name in logsnr.__all__]"


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    seconds(NAMED)  # compiled files and disk cache
    rounds = [[seconds(code) for code in (EMPTY, LOGSNR, TORCH, NAMED)] for _ in range(RUNS)]
    empty, alone, torch, named = zip(*rounds, strict=True)

    def added(after: tuple[float, ...], before: tuple[float, ...]) -> float:
        return statistics.median(b - a for a, b in zip(before, after, strict=True))

    print(f"import torch                     {added(torch, empty):.2f} s over an empty interpreter")
    print(f"import logsnr, nothing named     {added(alone, empty):.2f} s over an empty interpreter (target .15 s)")
    print(f"import logsnr, all names named   {added(named, torch):.2f} s over import torch")


if __name__ == "__main__":
    main()
