"""`python -m logsnr.cli`."""

from logsnr.cli.commands import main

main()
