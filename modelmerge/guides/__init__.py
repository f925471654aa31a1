"""The guides that come with the package: Markdown files here, found by their names."""

from __future__ import annotations

from pathlib import Path

from modelmerge.errors import UsageError, suggestion

_FOLDER = Path(__file__).parent
_FIRST = "start"


def names() -> tuple[str, ...]:
    """The guides there are, by their files: the one for newcomers, then the others by their names."""
    return tuple(sorted((file.stem for file in _FOLDER.glob("*.md")), key=lambda stem: (stem != _FIRST, stem)))


def read(name: str) -> str:
    """A guide's text, as Markdown.

    Raises:
        UsageError: There is no such guide.
    """
    if name not in names():
        hint = suggestion(name, names(), also=f"there are: {', '.join(names())}")
        raise UsageError(f"there is no guide '{name}'", hint=hint)
    return (_FOLDER / f"{name}.md").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The first sentence of a guide, below its title."""
    lines = (line.strip() for line in read(name).splitlines())
    paragraph: list[str] = []
    for line in lines:
        if line and not line.startswith(("#", "<", "[", "!")):
            paragraph.append(line)
        elif paragraph:
            break
    first, stop, _ = " ".join(paragraph).partition(". ")
    return first + stop.rstrip()
