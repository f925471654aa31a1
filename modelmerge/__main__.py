"""`python -m modelmerge`, and the console script."""

from __future__ import annotations

import signal
import sys


def run() -> None:
    """Run the command line and exit with its code."""
    from modelmerge.cli import main

    # A job that is cancelled (CI, SLURM, kill) clears up as one that is interrupted does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())


if __name__ == "__main__":
    run()
