"""`python -m logsnr.cli`."""

from logsnr.cli import main

main()
