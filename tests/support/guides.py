"""The blocks of the guides that are made from the code: `python -m tests.support.guides` writes them anew."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from modelmerge.errors import spelled
from modelmerge.methods import registry
from modelmerge.plan import mergekit_methods

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
# By topic, in the order of the alphabet.
GUIDES = {file.stem: file for file in sorted((ROOT / "modelmerge" / "guides").glob("*.md"))}


def method_table(kind: Literal["merge", "transform"]) -> str:
    """Every method of a kind with its help line, its options and its source."""
    rows = ["| method | what it does | options (default) |", "|---|---|---|"]
    for name in registry.names(kind):
        chosen = registry.load(name, kind)
        # As they follow from one another where none is given: `-` has no effect then, or is found for each tensor.
        defaults = {
            name: "-" if value is None else value for name, value in dataclasses.asdict(chosen.options()).items()
        }
        options = [f"`{flag(name)}` ({default})" for name, default in defaults.items()]
        rows.append(f"| [`{name}`]({chosen.paper}) | {registry.summary(name, kind)} | {' '.join(options)} |")
    return "\n".join(rows)


def mergekit_table() -> str:
    """What becomes of each key of a mergekit configuration, and of each parameter of each method."""
    rows = ["| key in the YAML | here |", "|---|---|"]
    rows += [f"| `{key}` | {spelled(text, flag)} |" for key, text in mergekit_methods.KEYS.items()]
    rows += ["", "| `merge_method` | here | its `parameters` |", "|---|---|---|"]
    for name, row in mergekit_methods.METHODS.items():
        here = f"`{row.method}{typed(row.fixed)}`"
        here += f"; without a `base_model` `{row.method}{typed({**row.fixed, **row.alone})}`" if row.alone else ""
        text = "; ".join(f"`{parameter.key}`: {becomes(parameter)}" for parameter in row.parameters)
        rows.append(f"| `{name}` | {here} | {text} |")
    return "\n".join(rows)


def flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def typed(options: Mapping[str, Any]) -> str:
    return "".join(f" {flag(option)}" + ("" if value is True else f" {value}") for option, value in options.items())


def becomes(parameter: mergekit_methods.Parameter) -> str:
    """What a parameter of mergekit is here."""
    if parameter.option is None:
        return "has no effect"
    if parameter.outcome is not None:
        return spelled(parameter.outcome, flag)
    typed = flag(parameter.option)
    if parameter.words:
        return ", ".join(f"{str(value).lower()} is `{typed} {word}`" for value, word in parameter.words.items())
    if parameter.option == "weight":
        return "`--weight NAME=W`"
    return f'`{typed}`, or `--at "*: NAME.{typed[2:]}=..."`' if parameter.per_model else f"`{typed}`"


# The generated blocks of each guide, by its topic.
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "methods": {"methods": lambda: method_table("merge"), "transforms": lambda: method_table("transform")},
    "mergekit": {"mergekit": mergekit_table},
}


def renewed(topic: str, text: str) -> str:
    """A guide's text with every block between its markers made anew."""
    for name, make in BLOCKS.get(topic, {}).items():
        start, end = f"<!-- {name}: made by python -m tests.support.guides -->", f"<!-- end of {name} -->"
        before, marker, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not (marker and found):
            raise ValueError(f"the guide '{topic}' has no block '{name}'")
        text = f"{before}{start}\n{make()}\n{end}{after}"
    return text


def blocks(text: str, language: str) -> list[str]:
    """The contents of a page's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """Every command line of a page: in its blocks for a shell, and in the steps of its jobs, up to a redirection."""
    for block in blocks(text, "sh"):
        yield from re.findall(r"^modelmerge.*$", block, flags=re.MULTILINE)
    for block in blocks(text, "yaml"):
        steps = re.findall(r"^ *- run: (modelmerge.*)$", block, flags=re.MULTILINE)
        yield from (step.partition(" > ")[0] for step in steps)


if __name__ == "__main__":
    for topic in BLOCKS:
        GUIDES[topic].write_text(renewed(topic, GUIDES[topic].read_text()))
