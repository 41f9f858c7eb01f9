"""Runs a command: `python -m patchmill COMMAND ...`, `torchrun --nproc-per-node 8 -m patchmill COMMAND ...`."""

import sys

from patchmill.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
