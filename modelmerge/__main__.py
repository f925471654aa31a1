"""`python -m modelmerge`, and the console script."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line and exit with its code."""
    from modelmerge.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
