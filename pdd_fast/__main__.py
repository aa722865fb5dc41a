"""Run the command line as ``python -m pdd_fast``."""

from pdd_fast.cli.main import main

main()
