"""The command line: a table of contents, and the edge where errors become words and exit codes.

Typer by its public names only. Torch is never imported to print help: a method's command is made from its options,
and only for the method that the command line names; the others are listed by their files' first lines.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import modelmerge
from modelmerge.cli import demo, evaluate, merge, vectors
from modelmerge.cli.output import Sink
from modelmerge.errors import ModelMergeError
from modelmerge.methods import registry
from modelmerge.verbs.auto import AUTO, SUMMARY

EXAMPLES = (
    "modelmerge demo",
    "modelmerge merge ties base math code -o merged",
    "modelmerge merge apgd base math code -o merged --dry-run",
    "modelmerge merge apgd --help",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        build(words)(args=words, prog_name="modelmerge")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ModelMergeError as error:
        Sink("json" if _asks_for_json(words) else "human").error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout went away, as `| head` does; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()
        sys.stderr.write("\nThis is a bug in modelmerge: please report it with the lines above.\n")
        return 1
    return 0


def build(words: Sequence[str]) -> typer.Typer:
    """The application, with the options of that method filled in which `words` name."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=merge.examples(EXAMPLES),
        help="Merge fine-tuned experts of one base model into one checkpoint.",
    )
    app.callback()(_root)
    app.command("extract", epilog=merge.examples(vectors.EXTRACT_EXAMPLES))(vectors.extract())
    merging = functools.partial(merge.command, preset=_names_preset(words))
    kinds = (
        ("disentangle", "transform", vectors.disentangle_or_list, vectors.command, vectors.DISENTANGLE_EXAMPLES),
        ("merge", "merge", merge.replay_or_list(), merging, merge.EXAMPLES),
    )
    for verb, kind, callback, command, lines in kinds:
        app.add_typer(_methods(verb, kind, callback, command, lines, words), name=verb)
    evaluate.add_suites(app)
    app.command(epilog=merge.examples(demo.EXAMPLES))(demo.demo)
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
    lines: tuple[str, ...],
    words: Sequence[str],
) -> typer.Typer:
    """The commands of a kind of methods: all are listed, those that the command line names have their options."""
    app = typer.Typer(
        rich_markup_mode="rich", invoke_without_command=True, epilog=merge.examples(lines),
        subcommand_metavar="METHOD BASE EXPERT...",
    )  # fmt: skip
    app.callback()(callback)
    asked = _completing() or words
    for name in (*registry.names(kind), *((AUTO,) if kind == "merge" else ())):
        made = command(name) if name in asked else _unasked
        usage = merge.usage(verb, name) if name in asked else ()
        summary = SUMMARY if name == AUTO else registry.summary(name, kind)
        app.command(name, help=summary, epilog=merge.examples(usage))(made)
    return app


def _unasked() -> None:
    """A method that the command line does not name: it is listed, and never run."""


def _names_preset(words: Sequence[str]) -> bool:
    return any(word == "--preset" or word.startswith("--preset=") for word in words)


def _completing() -> list[str]:
    """The words typed so far, where a shell asks for completion."""
    return os.environ.get("COMP_WORDS", "").split() or os.environ.get("_TYPER_COMPLETE_ARGS", "").split()


def _asks_for_json(words: Sequence[str]) -> bool:
    return "--json" in words or "--format=json" in words or ("--format", "json") in itertools.pairwise(words)
