"""`python -m modelmerge`, and the console script."""

from __future__ import annotations

import gc
import signal
import sys


def run() -> None:
    """Run the command line and exit with its code."""
    # Importing torch makes half a million objects that stay: looking through them for garbage every 700 objects, as
    # Python does by default, is an eighth of the start.
    gc.set_threshold(100_000)
    from modelmerge.cli import main, stop

    # A job that is cancelled (CI, SLURM, kill), or whose terminal closes, clears up as one that is interrupted does.
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, stop)
    sys.exit(main())


if __name__ == "__main__":
    run()
