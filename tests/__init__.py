"""The tests. They mirror the package; what they share lies in `tests/support/`, and no test module imports another.

    pytest              what every change must pass: under two and a half minutes on two cores
    pytest -m slow      what takes longer: the whole demo, memory at scale, full products of which `pytest` runs a part
    pytest -m ""        both

A slow test has a quick one beside it that asserts the same of less: fewer methods, less training, smaller models. No
test depends on how quick the machine is: who waits, waits for something that happens, and a limit on the waiting is
there to end a run that hangs.
"""
