"""The blocks of the README that are made from the code: `python -m tests.readme` writes them anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from modelmerge.methods import registry
from modelmerge.plan import mergekit

README = Path(__file__).parent.parent / "README.md"


def method_table(kind: Literal["merge", "transform"]) -> str:
    """Every method of a kind with its help line, its options and its source."""
    rows = ["| method | what it does | options (default) |", "|---|---|---|"]
    for name in registry.names(kind):
        chosen = registry.load(name, kind)
        # As they follow from one another where none is given: `-` has no effect then, or is found for each tensor.
        defaults = {
            name: "-" if value is None else value for name, value in dataclasses.asdict(chosen.options()).items()
        }
        told = [f"`--{name.replace('_', '-')}` ({default})" for name, default in defaults.items()]
        rows.append(f"| [`{name}`]({chosen.paper}) | {registry.summary(name, kind)} | {' '.join(told)} |")
    return "\n".join(rows)


def mergekit_table() -> str:
    """What becomes of each key of a mergekit configuration, and of each parameter of each method."""
    rows = ["| key in the YAML | here |", "|---|---|"]
    rows += [f"| `{key}` | {told} |" for key, told in mergekit.KEYS.items()]
    rows += ["", "| `merge_method` | here | its `parameters` |", "|---|---|---|"]
    for name, row in mergekit.METHODS.items():
        here = f"`{row.method}{typed(row.fixed)}`"
        here += f"; without a `base_model` `{row.method}{typed({**row.fixed, **row.alone})}`" if row.alone else ""
        told = "<br>".join(f"`{parameter.key}`: {becomes(parameter)}" for parameter in row.parameters)
        rows.append(f"| `{name}` | {here} | {told} |")
    return "\n".join(rows)


def typed(options: Mapping[str, Any]) -> str:
    return "".join(f" --{option.replace('_', '-')} {value}" for option, value in options.items())


def becomes(parameter: mergekit.Parameter) -> str:
    """What a parameter of mergekit is here."""
    if parameter.told is not None:
        return parameter.told
    if parameter.option is None:
        return f"only {str(parameter.only).lower()}" if parameter.only is not None else "has no effect"
    flag = f"--{parameter.option.replace('_', '-')}"
    if parameter.words:
        return ", ".join(f"{str(value).lower()} is `{flag} {word}`" for value, word in parameter.words.items())
    if parameter.option == "weight":
        return "`--weight NAME=W`"
    return f"`{flag}`, or `--vary NAME:{flag[2:]}=...`" if parameter.per_model else f"`{flag}`"


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": lambda: method_table("merge"),
    "disentanglers": lambda: method_table("transform"),
    "mergekit": mergekit_table,
}


def renewed(text: str) -> str:
    """The README's text with every block between its markers made anew."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name}: made by python -m tests.readme -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md has no block '{name}'")
        text = f"{before}{start}\n{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    README.write_text(renewed(README.read_text()))
