"""The grammar of `--layers`: runs of layers of the output, and the models that each is made from."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from modelmerge.errors import UsageError, suggestion
from modelmerge.plan.overrides import BASE

FORM = "write it like math:0-8, 8-16 for all models, 'math:0-8 code:4-12' for some, or 'encoder: math:0-8' for a module"
WORD = re.compile(r"(?:(.*):)?(\d{1,9})-(\d{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Run:
    """A run of layers of the output, and the places of the models it is from (the base's is 0) with the first layer.

    `base` is the place of the model that it names as its base, if it does. A `count` of None is all of a module.
    """

    text: str
    sources: tuple[tuple[int, int], ...]
    count: int | None
    base: int | None = None

    @property
    def based(self) -> bool:
        """Whether it names its base."""
        return self.base is not None

    @property
    def lone(self) -> bool:
        """Whether it is the layers of one model, as they are."""
        return len(self.sources) == 1


def split(text: str) -> tuple[str, list[str]]:
    """The module that a text speaks of, empty where it names none, and the words of the run.

    Raises:
        UsageError: Its quotes do not match.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"'{text}': {error}", option="layers", hint=FORM) from None
    module = words[0].removesuffix(":") if words and words[0].endswith(":") else ""
    return module, words[bool(module) :]


def parse(text: str, module: str, words: Sequence[str], names: Sequence[str], counts: Sequence[int]) -> Run:
    """The run that a text says in these words, of models with these names, the base's first, and so many layers each.

    A name without layers is all of a `module`, or of the base.

    Raises:
        UsageError: It is none, or names a model or layers that there are not.
    """

    def refusal(why: str, hint: str | None = FORM) -> UsageError:
        return UsageError(f"'{text}': {why}", option="layers", hint=hint)

    spans: dict[int, tuple[int, int] | None] = {}
    bases: list[int] = []
    for word in words:
        form, name, span = WORD.fullmatch(word), word, None
        if form is not None:
            name, span = form[1], (int(form[2]), int(form[3]))
        whole = form is None and (module or word == BASE) and word.removeprefix(f"{BASE}=") in names
        if not (whole or form) or (name is None and len(words) > 1):
            raise refusal(f"'{word}' is not {'NAME:' if len(words) > 1 else '[NAME:]'}FIRST-LAST")
        if span is not None and span[0] > span[1]:
            raise refusal(f"{span[0]}-{span[1]} holds no layer: the last is not part of it")
        plain = name if name is None or name in names else name.removeprefix(f"{BASE}=")
        if plain is not None and plain not in names:
            raise refusal(f"there is no model '{plain}'",
                          suggestion(plain, names, f"there are: {', '.join(names)}"))  # fmt: skip
        bases += [0 if plain is None else names.index(plain)] if plain in (None, BASE) or plain != name else []
        for model in range(len(names)) if plain is None else [names.index(plain)]:
            if span is not None and span[0] < span[1] > counts[model]:
                raise refusal(f"'{names[model]}' has {counts[model]} layers", f"the last is {counts[model]} at most")
            if model in spans:
                raise refusal(f"names '{names[model]}' twice", "name the model twice among the experts, NAME=REF each")
            spans[model] = span
    if len({span and span[1] - span[0] for span in spans.values()}) != 1:
        raise refusal("needs as many layers of each model" if spans else "names no layers")
    if len(bases) > 1:
        raise refusal("names two bases", "name the base among the experts too, NAME=REF, to merge it into another")
    first = next(iter(spans.values()))
    sources = tuple((model, span[0] if span else 0) for model, span in spans.items())
    return Run(text, sources, first and first[1] - first[0], *bases)
