"""Vocabularies: rows of embeddings and heads belong to tokens, and models may number their tokens differently.

Where rows are merged one by one, the models' tokenizers must agree on them. Where they do not, `--vocab` says whose
tokens the output has, and `modelmerge.plan.tables` puts every table together token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import ne
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.companions import GENERATION_CONFIG
from modelmerge.checkpoint.config_file import with_values
from modelmerge.checkpoint.documents import read_entries
from modelmerge.checkpoint.header import TensorInfo
from modelmerge.checkpoint.matching import is_vocabulary
from modelmerge.checkpoint.new_tokens import moved_ids, moved_sizes, with_tokens
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.tokens import Tokenizer, tokenizer_of
from modelmerge.errors import PlanError, UsageError, named, suggestion
from modelmerge.plan.overrides import BASE, layer_of

UNION = "union"
_SHOWN = 3  # tokens, of those that differ
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}  # as added


def is_table(info: TensorInfo) -> bool:
    """Whether a tensor has a row for each token: no layer's own output, whatever its name ends in."""
    return bool(info.shape) and is_vocabulary(info.name) and layer_of(info.name) is None


def row_count(info: TensorInfo) -> int:
    """The number of tokens that a table has rows for; some biases are stored as one row [1, V]."""
    return info.shape[1] if len(info.shape) == 2 and info.shape[0] == 1 else info.shape[0]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of an output's tables.

    Args:
        name: What was asked for: base, union or an expert's name; None where nothing was.
        giver: Whose tokenizer it is: base or an expert's name.
        ids: The row of each token.
        new: Tokens that the giver lacks: the row each gets, and the flags it was added with where it was added.
        moved: The rows of the base's tokens that have another here, by the row there.
        lost: By model, how many of its tokens the output has no row for.
        sizes: Of each table whose rows are not the base's, how many it has there and here.
        others: Where rows go by their number in spite of that, what differs among the tokenizers, a line each.
    """

    name: str | None
    giver: str
    ids: Mapping[str, int]
    new: Mapping[str, tuple[int, dict[str, bool] | None]] = field(default_factory=dict)
    moved: Mapping[int, int] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def rows(self) -> dict[str, int]:
        """The row of each token, new ones too."""
        return {**self.ids, **{token: row for token, (row, _) in self.new.items()}}


class Tokenizers:
    """The tokenizers of a base and its experts; an adapter or a task vector without one has the base's.

    With `lenient`, as in mergekit, so has any other expert without one that can be read, and every adapter. `more`
    are models that are not merged, whose tokenizers are their own.
    """

    def __init__(
        self, base: Checkpoint, experts: Sequence[Checkpoint], *, lenient: bool = False, more: Sequence[Checkpoint] = ()
    ) -> None:
        self.models = (base, *experts, *more)
        ours = tokenizer_of(base)
        theirs = [None if lenient and e.adapter is not None else tokenizer_of(e) for e in experts]
        if lenient:  # the base's files are not read again
            theirs = [
                own if own and ((ours and own.same_files(ours)) or own.ids is not None) else None for own in theirs
            ]
        bases = [lenient or e.vector is not None for e in experts]
        self._each = [ours, *(own or (ours if base else None) for own, base in zip(theirs, bases, strict=True))]
        self._each += map(tokenizer_of, more)
        self._bases: dict[int, bool] = {0: True}

    def shares(self, place: int) -> bool:
        """Whether a model has the base's for want of its own."""
        return self._each[place] is self._each[0]

    def is_bases(self, place: int) -> bool:
        """Whether a model's tokenizer is the base's, file by file."""
        if place not in self._bases:
            mine, ours = self._each[place], self._each[0]
            self._bases[place] = mine is ours or (mine is not None and ours is not None and mine.same_files(ours))
        return self._bases[place]

    def of(self, place: int) -> Tokenizer | None:
        """A model's tokenizer; the base's where it has the same files, which then are read once."""
        return self._each[0 if self.is_bases(place) else place]

    def ids(self, place: int) -> dict[str, int] | None:
        """The ids of a model's tokens; None where they cannot be read."""
        tokenizer = self.of(place)
        return None if tokenizer is None else tokenizer.ids

    def unclear(self, place: int) -> str:
        """Why a model's tokens cannot be told."""
        tokenizer = self._each[place]
        what = "there are no tokenizer files beside its weights"
        return what if tokenizer is None else f"its {tokenizer.main.name} is of a kind that cannot be read"

    def differences(self, place: int, count: int) -> list[tuple[str, int | None, int | None]]:
        """Tokens of the first rows that an expert has elsewhere than the base: the token, its id there and here."""
        if self.is_bases(place) or (ours := self.ids(0)) is None or (theirs := self.ids(place)) is None:
            return []
        # Most begin alike, in the same order: a walk is several times as fast as so many look-ups.
        pairs = zip(range(min(len(ours), len(theirs))), map(ne, ours.items(), theirs.items()), strict=False)
        alike = next((i for i, differ in pairs if differ), min(len(ours), len(theirs)))
        other: set[str] = set()
        for one, two in ((ours, theirs), (theirs, ours)):
            other |= {
                token for token in islice(one, alike, None) if one[token] < count and two.get(token) != one[token]
            }
        differing = sorted(other, key=lambda token: (min(ours.get(token, count), theirs.get(token, count)), token))
        return [(token, ours.get(token), theirs.get(token)) for token in differing]


def compare(tokenizers: Tokenizers, places: Sequence[int], count: int) -> tuple[dict[int, str], list[str]]:
    """Remarks on experts whose tokens cannot be compared with the base's, by place; and what differs, a line each.

    Args:
        tokenizers: Of all models.
        places: The experts whose rows are merged, from 1 on.
        count: The number of rows that all have.

    Raises:
        CheckpointError: A tokenizer's file is malformed.
    """
    remarks, lines = {}, []
    others = [place for place in places if not tokenizers.is_bases(place)]
    if others and tokenizers.ids(0) is None:
        return {0: f"the experts' tokenizers cannot be compared with its own: {tokenizers.unclear(0)}"}, []
    for place in others:
        name = tokenizers.models[place].name
        if tokenizers.ids(place) is None:
            remarks[place] = f"its tokenizer cannot be compared with the base's: {tokenizers.unclear(place)}"
        elif differences := tokenizers.differences(place, count):
            some = ", ".join(
                f"{token!r} ({'no token' if ours is None else ours} in the base, "
                f"{'none' if theirs is None else theirs} in {name})"
                for token, ours, theirs in differences[:_SHOWN]
            )
            many = f"{len(differences):,} token{'s' * (len(differences) > 1)}"
            lines.append(f"'{name}': {many} of another id: {some}{', ...' * (len(differences) > _SHOWN)}")
    return remarks, lines


def refuse_other_tokens(lines: Sequence[str], *, merging: bool) -> PlanError:
    """The error for tokenizers that differ."""
    hint = f"{named('exclude')} GLOB copies embeddings and heads from the base"
    if merging:
        hint = (
            f"{named('vocab')} base, union or NAME aligns the rows by token; {named('on_mismatch')} common-rows merges "
            f"the tokens that all have; {hint}"
        )
    return PlanError(
        "the models number their tokens differently, so equal rows of embeddings and heads do not belong together:\n  "
        + "\n  ".join(lines), hint=hint,
    )  # fmt: skip


def vocabulary_of(
    name: str | None,
    files_from: str,
    tokenizers: Tokenizers,
    tables: Mapping[str, TensorInfo],
    more: Iterable[str] | None = None,
) -> Vocabulary | None:
    """The output's tokens, as `--vocab` asks; None where it does not ask.

    Args:
        name: `base`, `union`, an expert's name, or None.
        files_from: Whose tokenizer goes with the output: `base` or an expert's name.
        tokenizers: Of all models.
        tables: The base's tables.
        more: Where tables are filled, as in mergekit, tokens that are added besides.

    Raises:
        UsageError: There is no such expert, or the two options contradict one another.
        PlanError: A tokenizer that is needed cannot be read, or `files_from` has other tokens and `name` is None.
    """
    models = tokenizers.models
    names = [BASE, *(expert.name for expert in models[1:])]
    if name is not None and name not in (*names, UNION):
        hint = suggestion(name, [*names, UNION], f"there are: {', '.join([BASE, UNION, *names[1:]])}")
        raise UsageError(f"must be base, union or an expert, not '{name}'", option="vocab", hint=hint)
    wanted = files_from if name in (None, UNION) or (files_from != BASE) else name
    place = names.index(wanted) if wanted in names else 0  # who names another is told so elsewhere
    count = max(map(row_count, tables.values()), default=0)
    if name is None:
        if place and tables and (differences := tokenizers.differences(place, count)):
            raise PlanError(
                f"{named('files_from')} {wanted}: its tokenizer numbers {len(differences):,} tokens otherwise than the "
                f"base's, such as {differences[0][0]!r}, and the merged tables have the base's rows",
                hint=f"{named('vocab')} {wanted} gives the tables its rows, {named('vocab')} union those of all",
            )
        return None
    alike = tokenizers.of(0) is not None and all(map(tokenizers.is_bases, range(len(models))))
    for other in range(len(models)):
        if tokenizers.ids(other) is None and (more is not None or not alike):
            who = f"'{models[other].name}'" if other else "the base"
            raise PlanError(
                f"{named('vocab')} {name} aligns rows by token, and the tokens of {who} cannot be told: "
                f"{tokenizers.unclear(other)}",
                hint=f"copy its tokenizer into its directory, {models[other].reference.text}",
            )
    if name != UNION and wanted != name and tokenizers.ids(place) != tokenizers.ids(names.index(name)):
        raise UsageError(
            f"{name} gives the tables the tokens of {name}, and {named('files_from')} {files_from} has other tokens",
            option="vocab", hint=f"leave {named('files_from')} out, or name the same",
        )  # fmt: skip
    ids = tokenizers.ids(place) or {}  # of a kind that cannot be read, and the same in all
    new = _new(tokenizers, place, tables, pieces_first=more is not None) if name == UNION else {}
    end = max([*ids.values(), *(row for row, _ in new.values())], default=-1) + 1
    new |= {t: (end + i, _PLAIN) for i, t in enumerate(t for t in more or () if t not in ids and t not in new)}
    giver = tokenizers.of(place)
    following = giver.following if giver is not None and new else None
    if new and following != next(iter(new.values()))[0]:
        assert giver is not None, "its ids have been read"
        raise PlanError(
            f"{len(new):,} tokens cannot be added to the tokenizer of '{models[place].name}', {giver.main.name}, such "
            f"as {next(iter(new))!r}: "
            + ("such files have no place for them" if following is None else "its ids have a gap before the last"),
            hint=f"{named('files_from')} NAME takes another's, or a tokenizer.json beside its weights",
        )
    vocabulary = Vocabulary(name, wanted if place else BASE, ids, new)
    if more is not None and tokenizers.shares(place):
        vocabulary = replace(vocabulary, giver=BASE)
    placed = vocabulary.rows
    moved = {i: placed[token] for token, i in (tokenizers.ids(0) or {}).items() if placed.get(token, i) != i}
    lost = {model.name: len((tokenizers.ids(i) or {}).keys() - placed.keys()) for i, model in enumerate(models)}
    return replace(vocabulary, moved=moved, lost={model: tokens for model, tokens in lost.items() if tokens})


def _new(
    tokenizers: Tokenizers, giver: int, tables: Mapping[str, TensorInfo], *, pieces_first: bool
) -> dict[str, tuple[int, dict[str, bool] | None]]:
    """The tokens that only others than the giver have, in the order of the command line, and the rows they get.

    With `pieces_first`, as in mergekit, what was added to any of the vocabularies follows the pieces of all.
    """
    ids = tokenizers.ids(giver) or {}
    each = [
        {} if (tokenizer := tokenizers.of(i)) is None else tokenizer.additions for i in range(len(tokenizers.models))
    ]
    added = {token: flags for additions in reversed(each) for token, (_, flags) in additions.items()}
    new: dict[str, dict[str, bool] | None] = {}
    for wanted in (False, True) if pieces_first else (None,):
        for place, model in enumerate(tokenizers.models):
            count = min((row_count(model.tensors.get(name, info)) for name, info in tables.items()), default=1 << 62)
            if pieces_first and type(stated := model.config.get("vocab_size")) is int:
                count = stated
            lack = [(at, t) for t, at in (tokenizers.ids(place) or {}).items() if t not in ids and t not in new]
            for at, token in sorted(lack):
                if at < count and wanted in (None, token in added):  # others have no row to merge
                    flags = each[place].get(token, (at, None))[1]
                    new[token] = added.get(token) if pieces_first else flags
    following = max(ids.values(), default=-1) + 1
    return {token: (row, flags) for row, (token, flags) in enumerate(new.items(), following)}


def remarks_on_tokens(vocabulary: Vocabulary) -> list[str]:
    """Sentences on what becomes of the base's tokens."""
    remarks = []
    if new := vocabulary.new:
        some = ", ".join(map(repr, list(new)[:_SHOWN])) + ", ..." * (len(new) > _SHOWN)
        what = "1 token follows as an added token" if len(new) == 1 else f"{len(new):,} tokens follow as added tokens"
        remarks.append(f"The tokens are those of '{vocabulary.giver}'; {what}: {some}.")
        if pieces := sum(flags is None for _, flags in new.values()):
            many = "1 is an ordinary piece" if pieces == 1 else f"{pieces:,} are ordinary pieces"
            remarks.append(
                f"Of these {many} elsewhere, and as added tokens are cut out of texts only where they stand as words."
            )
    elif vocabulary.sizes:
        remarks.append(f"The tokens, and the rows of embeddings and heads, are those of '{vocabulary.giver}'.")
    for name, count in vocabulary.lost.items():
        remarks.append(f"{count:,} token{'s' * (count > 1)} of '{name}' {'are' if count > 1 else 'is'} left out.")
    for line in vocabulary.others:
        remarks.append(
            f"Rows of embeddings and heads go by their number, as in mergekit, though tokens differ: {line}."
        )
    for before, after in sorted({size for size in vocabulary.sizes.values() if size[0] != size[1]}):
        remarks.append(f"Embeddings and heads have {after:,} rows, and the base's {before:,}.")
    return remarks


def config_values(vocabulary: Vocabulary, base: Checkpoint, giver: Checkpoint) -> dict[tuple[str, ...], Any]:
    """What the base's config must say of how many tokens there are, and of those that have other ids now."""
    sizes = {before: after for before, after in vocabulary.sizes.values() if before != after}
    values = dict(moved_sizes(base.config, sizes))
    for place, value in moved_ids(base.config, vocabulary.moved).items():
        stated: Any = giver.config  # whose ids they are
        for key in place:
            stated = stated.get(key) if isinstance(stated, dict) else None
        values[place] = value if stated is None else stated
    return values


def with_vocabulary(
    files: Mapping[str, bytes | Path], vocabulary: Vocabulary, base: Checkpoint
) -> dict[str, bytes | Path]:
    """The files beside merged weights, the tokenizer's with the new tokens, a generation config with their ids."""
    changed = with_tokens(files, vocabulary.new)
    file = files.get(GENERATION_CONFIG)
    if isinstance(file, Path) and file.parent == base.directory:  # another's has the giver's ids
        values = moved_ids(read_entries(file), vocabulary.moved)
        changed[GENERATION_CONFIG] = with_values(file.read_bytes(), values) if values else file
    return changed
