"""`python -m modelmerge`, and the console script."""

from __future__ import annotations

import gc
import json
import os
import sys

from modelmerge import interrupts


def run() -> None:
    """Run the command line and exit with its code."""
    interrupts.install()  # first of all: importing the rest takes seconds
    _mend_surroundings()
    # Importing torch makes half a million objects that stay: looking through them for garbage every 700 objects, as
    # Python does by default, is an eighth of the start.
    gc.set_threshold(100_000)
    try:
        from modelmerge.cli import main
    except BaseException:
        number = interrupts.received()
        if number is None:
            raise
        _say(interrupts.MEANINGS[number], 128 + number)
        interrupts.quit_now(number)
    code = main()
    interrupts.release()
    sys.exit(code)


def _mend_surroundings() -> None:
    """Make sense of what a shell, a service or a mistake may have left to this process."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file would get its number, and what is printed would go into that
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w"))  # noqa: SIM115
    os.umask(os.umask(0) & 0o077)  # what a run writes it must be able to read
    for name in ("COLUMNS", "LINES"):
        if not os.environ.get(name, "1").isdecimal() or int(os.environ.get(name, "1")) < 1:
            del os.environ[name]  # nothing would fit


def _say(message: str, code: int) -> None:
    """What the command line would say of an end before it is there."""
    sys.stderr.write(f"error: {message}\n")
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": {"message": message, "hint": None, "exit_code": code}}, indent=2) + "\n")
    sys.stderr.flush()
    sys.stdout.flush()


if __name__ == "__main__":
    run()
