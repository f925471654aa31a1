"""`python -m modelmerge`, and the console script."""

from __future__ import annotations

import gc
import os
import sys

from modelmerge import interrupts

_NARROWEST = 20  # columns of a terminal in which words fit


def run() -> None:
    """Run the command line and exit with its code."""
    _mend_surroundings()
    _let_threads_sleep()
    interrupts.install()  # before all else: importing it takes seconds
    # Importing torch makes half a million objects that stay: looking through them for garbage every 700 objects, as
    # Python does by default, is an eighth of the start.
    gc.set_threshold(500_000)
    try:
        from modelmerge.cli import main
    except BaseException:
        number = interrupts.received()
        if number is None:
            raise
        _say(interrupts.MEANINGS[number], 128 + number)
        interrupts.quit_now(number)
    interrupts.finish(main())


def _mend_surroundings() -> None:
    """Make sense of what a shell, a service or a mistake may have left to this process."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(descriptor, "w" if descriptor else "r"))  # noqa: SIM115
    os.umask(os.umask(0) & 0o077)  # what a run writes it must be able to read
    columns = os.environ.get("COLUMNS", "")
    if not columns.isdecimal() or int(columns) < _NARROWEST:
        os.environ.pop("COLUMNS", None)
    try:
        os.getcwd()
    except OSError:
        _say("the directory that you are in is gone", 1, hint="go to another one")  # torch could not be imported
        sys.exit(1)


def _let_threads_sleep() -> None:
    """Have OpenMP's threads sleep while they wait, unless the user has said how they shall; before torch is loaded.

    By themselves they spin, for others that may not even have a processor: on a busy machine two threads then took five
    times the processor time of one, and six times as long as two that sleep. No result depends on it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _say(message: str, code: int, hint: str | None = None) -> None:
    """What the command line would say of an end before it is there."""
    sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    if "--json" in sys.argv:
        import json

        sys.stdout.write(json.dumps({"error": {"message": message, "hint": hint, "exit_code": code}}, indent=2) + "\n")
    sys.stderr.flush()
    sys.stdout.flush()


if __name__ == "__main__":
    run()
