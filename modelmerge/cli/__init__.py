"""The command line: a table of contents, and the edge where errors become words and exit codes.

Typer by its public names only. Torch is never imported to print help: a method's command is made from its options,
and only for the method that the command line names; the others are listed by their files' first lines.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import modelmerge
from modelmerge import interrupts
from modelmerge.cli import demo, evaluate, guide, merge, push, search, vectors, verify
from modelmerge.cli.help import with_examples
from modelmerge.cli.output import Sink, Unprinted
from modelmerge.errors import ModelMergeError
from modelmerge.methods import registry
from modelmerge.verbs.auto import AUTO, SUMMARY

_ONE_LINE = "1000"  # columns in which any help line is one line, as zsh wants it
EXAMPLES = ("modelmerge demo", "modelmerge merge ties base math code -o merged")


# Why some work is not shared out, and what is.
_ONE_PROCESS = {
    "disentangle": "each vector that it writes takes all experts; --cluster is for merge --disentangle and extract",
    "eval": "eval is one process; --cluster is for merge and extract",
    "search": "a search is one process; --cluster is for merge and extract",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    sink = Sink("json" if "--json" in words else "human")
    code = 0
    try:
        code = _run(words, sink)
        sys.stdout.flush()
        return code
    except (OSError, Unprinted) as error:  # what was to be written is there, and what there is to say of it is lost
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain at exit
        sink.failed(f"stdout cannot be written: {error.args[-1]}")
        return code or 1


def _run(words: list[str], sink: Sink) -> int:
    try:
        app = build(_completing() or words)
        code = app(args=words or ["--help"], prog_name="modelmerge", standalone_mode=False) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except typer.TyperException as error:
        sink.failure(error.format_message(), _where_to_look(error, words), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Unprinted:
        raise
    except Exception as error:
        if interrupts.received() is None:
            return _failed(error, sink)
        code = 1  # a library has made an error of the interrupt, or what it broke off is one
    number = interrupts.received() or signal.SIGINT
    if code == 128 + signal.SIGINT or (code and interrupts.received()):
        code = 128 + number
        sink.failure(interrupts.MEANINGS[number], None, code)
    return code


def _failed(error: Exception, sink: Sink) -> int:
    if isinstance(error, ModelMergeError):
        sink.error(error)
        return error.exit_code
    if isinstance(error, OSError) and error.filename is None:  # where stdout is what fails, it does so again
        sys.stdout.write("\n")
        sys.stdout.flush()
    sink.trace("".join(traceback.format_exception(error)))
    hint = "this is a bug in modelmerge: please report it with the lines above"
    sink.failure(f"{type(error).__name__}: {error}", hint, 1)
    return 1


def build(words: Sequence[str]) -> typer.Typer:
    """The application, with the options of that method filled in which `words` name.

    Raises:
        ModelMergeError: A recipe that `words` name cannot be read.
    """
    app = typer.Typer(
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=with_examples("Merge fine-tuned experts of one base model into one checkpoint.", EXAMPLES),
    )
    app.callback()(_root)
    app.command("extract", help=with_examples(vectors.EXTRACT, vectors.EXTRACT_EXAMPLES))(vectors.extract())
    merging = functools.partial(merge.command, preset=_names(words, "--preset"))
    groups = (
        ("disentangle", "transform", merge.listing("disentangle", "transform"), vectors.command, vectors.DISENTANGLE),
        ("merge", "merge", merge.replay_or_list(words), merging, merge.MERGE),
        ("search", "merge", merge.listing("search", "merge"), search.command, search.SEARCH),
    )
    for verb, kind, callback, command, summary in groups:
        app.add_typer(_methods(verb, kind, callback, command, summary, words), name=verb)
    app.add_typer(evaluate.suites(), name="eval")
    for name, one in (("verify", verify), ("push", push), ("guide", guide), ("demo", demo)):
        app.command(name, help=with_examples(one.SUMMARY, one.EXAMPLES))(one.command())
    return app


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=lambda value: _version(value), is_eager=True),
    ] = False,
) -> None:
    pass


def _version(asked: bool) -> None:
    if asked:
        typer.echo(modelmerge.__version__)
        raise typer.Exit


def _methods(
    verb: str,
    kind: str,
    callback: Callable[..., None],
    command: Callable[[str], Callable[..., None]],
    summary: str,
    words: Sequence[str],
) -> typer.Typer:
    """The commands of a verb, by method: all are listed, those that the command line names have their options."""
    app = typer.Typer(
        rich_markup_mode="rich", invoke_without_command=True, help=summary,
        subcommand_metavar="METHOD BASE EXPERT...",
    )  # fmt: skip
    app.callback()(callback)
    for name in (*registry.names(kind), *((AUTO,) if kind == "merge" else ())):
        line = SUMMARY if name == AUTO else registry.summary(name, kind)
        if name in words:
            app.command(name, short_help=line, help=with_examples(line, merge.usage(verb, name)))(command(name))
        else:
            app.command(name, short_help=line, help=line)(_not_named)
    return app


def _not_named() -> None:
    """A method that the command line does not name: it is listed, and never run."""


def _where_to_look(error: typer.TyperException, words: Sequence[str]) -> str | None:
    """What to do about words that Typer could not make sense of."""
    file = next((word for word in words[1:2] if word.endswith((".yaml", ".yml", ".json"))), None)
    if file is not None and words[0] == "merge":
        return f"a recipe has an option of its own: --recipe {file}"
    if words[0] in _ONE_PROCESS and _names(words, "--cluster"):
        return _ONE_PROCESS[words[0]]
    context: typer.Context | None = getattr(error, "ctx", None)
    if context is None:
        return None
    return f"{context.command_path} --help lists what there is"


def _names(words: Sequence[str], option: str) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in words)


def _completing() -> list[str]:
    """The words typed so far, where a shell asks what may come next: bash, or another."""
    if "_MODELMERGE_COMPLETE" not in os.environ:
        return []
    os.environ["COLUMNS"] = _ONE_LINE
    return os.environ.get("COMP_WORDS", "").split() or os.environ.get("_TYPER_COMPLETE_ARGS", "").split()
