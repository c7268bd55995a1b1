"""Seconds that `import logsnr` adds to `import torch`: each in a fresh interpreter, in turn; medians.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys
import time

RUNS = 7


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    seconds("import torch, logsnr")  # compiled files and disk cache
    pairs = [(seconds("import torch"), seconds("import torch, logsnr")) for _ in range(RUNS)]
    extra = [b - a for a, b in pairs]
    print(f"import torch          {statistics.median(a for a, _ in pairs):.2f} s")
    print(f"import torch, logsnr  {statistics.median(b for _, b in pairs):.2f} s")
    print(f"added by logsnr       {statistics.median(extra):.2f} s (median of {RUNS} pairs; target < 0.4 s)")


if __name__ == "__main__":
    main()
