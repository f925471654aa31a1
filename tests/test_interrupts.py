"""Signals: they come through at once and quietly, wherever they come, and none is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import expert_state, write
from tests.support.commands import script
from tests.support.processes import running

PRELUDE = "import os, signal\nfrom modelmerge import interrupts\ninterrupts.install()\n"


@pytest.mark.parametrize("words", [["merge"], ["merge", "--json"]], ids=["text", "json"])
@pytest.mark.parametrize(("number", "code", "meaning"), [("SIGINT", 130, "interrupted"), ("SIGHUP", 129, "hung up")])
def test_a_signal_while_libraries_are_imported_is_quiet(words: list[str], number: str, code: int, meaning: str) -> None:
    done = script(
        "import os, runpy, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(name, *more):\n"
        "        if name == 'typer':\n"
        f"            os.kill(os.getpid(), signal.{number})\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv = {['modelmerge', *words]}\n"
        "runpy.run_module('modelmerge', run_name='__main__')\n"
    )
    assert (done.returncode, done.stderr) == (code, f"error: {meaning}\n")
    if "--json" in words:
        assert json.loads(done.stdout)["error"] == {"message": meaning, "hint": None, "exit_code": code}
    else:
        assert done.stdout == ""


def test_an_interrupt_that_is_swallowed_stops_the_work_all_the_same(models: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "metric.py"
    file.write_text(
        "import os, signal, time\n"
        "def f(model, task):\n"
        "    print(task)\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(1)\n"
        "    except BaseException:\n"
        "        return 1.0\n"
    )
    tasks = ["--task", "first", "--task", "second"]
    with running(["eval", "custom", str(models[0]), "--script", f"{file}:f", *tasks]) as run:
        assert run.end() == 130
        assert run.err() == "first\nstopping\nerror: interrupted\n"


def test_a_second_interrupt_ends_what_the_first_cannot(models: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "metric.py"
    file.write_text(
        "import os, signal, time\n"
        "def f(model):\n"
        "    while True:\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGSTOP)\n"
        "            while True:\n"
        "                time.sleep(0.01)\n"
        "        except BaseException:\n"
        "            pass\n"
    )
    with running(["eval", "custom", str(models[0]), "--script", f"{file}:f"]) as run:
        run.until_stopped()
        run.send(signal.SIGINT)
        run.until_stopped()
        time.sleep(0.3)
        run.send(signal.SIGINT)
        assert run.end() == 130
        assert run.err() == "stopping\nerror: interrupted\n"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two experts of one matrix, on which each method below works for longer than the runs may."""
    root, generator = tmp_path_factory.mktemp("large"), torch.Generator().manual_seed(0)
    base = {"model.layers.0.q_proj.weight": torch.randn(1024, 1024, generator=generator).mul(0.1)}
    experts = [expert_state(base, seed) for seed in range(2)]
    return [write(root / name, state) for name, state in zip(("base", "a", "b"), (base, *experts), strict=True)]


@pytest.mark.parametrize(("words", "stop"), [
    (["kron", "--tolerance", "1e-30"], "modelmerge.methods.merge.kron:_product"),
    (["apgd", "--published", "--steps", "1000000", "--lr", "1e-12"], "modelmerge.methods.products:remove_subspace"),
    (["wudi", "--solver", "adam", "--steps", "1000000"], "torch:addmm"),
], ids=["kron", "apgd", "wudi"])  # fmt: skip
def test_a_method_at_one_matrix_looks_for_the_signal(
    words: list[str], stop: str, large: list[Path], tmp_path: Path
) -> None:
    """The run may take ten seconds of the processor's time, after which the system kills it."""
    out = tmp_path / "out"
    command = ["merge", *words, *map(str, large), "-o", str(out), "--device", "cpu"]
    with running(command, stop=stop, call=4, limits={"RLIMIT_CPU": 10}) as run:
        run.until_stopped()
        run.send(signal.SIGINT)
        assert run.end() == 130
        lines = ["stopping", f"note: nothing is left of this run, and {out} is as it was", "error: interrupted"]
        assert run.err().splitlines() == lines
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and an expert of one matrix, whose decomposition takes longer than the runs may."""
    root, generator = tmp_path_factory.mktemp("huge"), torch.Generator().manual_seed(0)
    base = torch.randn(3072, 3072, generator=generator).mul_(0.1)
    states = {"base": base, "a": base + 0.01 * torch.randn(3072, 3072, generator=generator)}
    return [write(root / name, {"model.layers.0.q_proj.weight": state}) for name, state in states.items()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_decomposition_is_not_waited_for(huge: list[Path], tmp_path: Path) -> None:
    """It takes twice the processor's time that the run is allowed from there on."""
    out = tmp_path / "out"
    command = ["merge", "tsv-m", *map(str, huge), "-o", str(out), "--device", "cpu"]
    with running(command, stop="torch.linalg:eigh") as run:
        run.until_stopped()
        begun = run.processor_seconds()
        run.allow(begun + 3.0)
        run.send(signal.SIGCONT)
        run.until(lambda: run.processor_seconds() > begun + 0.5)
        run.send(signal.SIGINT)
        assert run.end() == 130
        lines = ["stopping", f"note: nothing is left of this run, and {out} is as it was", "error: interrupted"]
        assert run.err().splitlines() == lines
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_an_object_is_cleared_away_is_neither_shown_nor_lost() -> None:
    done = script(
        PRELUDE + "class Thing:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        for _ in range(10**6): pass\n"
        "Thing()\n"
        "assert interrupts.received() == signal.SIGINT\n"
        "try:\n"
        "    interrupts.check()\n"
        "except KeyboardInterrupt:\n"
        "    print('comes again')\n"
    )
    assert (done.stdout, done.stderr) == ("comes again\n", "")


def test_what_a_fork_is_sent_stays_with_it() -> None:
    done = script(
        PRELUDE + "import time, warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)  # Python 3.12 warns of forks beside threads\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    while True: time.sleep(0.01)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM\n"
        "interrupts.check()\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_ignored_as_under_nohup_stays_ignored() -> None:
    done = script(
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PRELUDE + "\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "interrupts.check()\n"
        "assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_begun_and_held_is_finished_first() -> None:
    done = script(
        PRELUDE + "with interrupts.held():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    for _ in range(10**5): pass\n"
        "    print('finished')\n"
        "interrupts.check()\n"
    )
    assert done.stdout == "finished\n"
    assert done.stderr.endswith("KeyboardInterrupt\n")


def test_the_exit_code_is_the_signals_wherever_it_came() -> None:
    """Through an `exec`, as dataclasses are made, Python would otherwise end by SIGINT."""
    done = script(
        PRELUDE + "try:\n"
        "    exec('os.kill(os.getpid(), signal.SIGTERM)\\nfor _ in range(10**5): pass')\n"
        "except KeyboardInterrupt:\n"
        "    interrupts.finish(143)\n"
    )
    assert (done.returncode, done.stderr) == (143, "")


@pytest.mark.slow
def test_hundreds_of_kills_leave_no_output_that_is_not_what_it_seems() -> None:
    command = [sys.executable, "-m", "tests.soak", "--kills", "150", "--minutes", "10", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 broken outputs, 0 lost, 0 strays\n")
