"""Tables put together token by token: which rows of the models make each row of the output's embeddings and heads.

A run of rows that the same experts have is a part of its table, `TABLE[FIRST:LAST]`, with a plan of its own: what the
base lacks is the mean of the experts that have it, and experts that lack what the base has do not count. Files have the
table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelmerge.checkpoint.components import folder_of
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.tokens import with_tokenizer_of
from modelmerge.errors import PlanError, UsageError, named
from modelmerge.methods import registry
from modelmerge.plan.filling import Filling, fill
from modelmerge.plan.gathering import Places, count_of, gathered, refuse_hidden_tables
from modelmerge.plan.overrides import BASE, Setting
from modelmerge.plan.recipe import Tables
from modelmerge.plan.vocabulary import (
    Tokenizers,
    Vocabulary,
    compare,
    is_table,
    refuse_other_tokens,
    row_count,
    vocabulary_of,
)

if TYPE_CHECKING:
    from modelmerge.plan.tensors import TensorPlan

NEW = "average"  # the method that makes the rows of tokens which the base lacks
Run = tuple[int, int, bool, tuple[int, ...]]  # first and last row of the output, whether the base has them, who else


class Alignment:
    """Which rows of the models make each row of the output's tables.

    Args:
        tokenizers: Of all models.
        vocabulary: The output's tokens.
        everyone: Merge the tokens that all experts have, and keep the base's row of every other.
    """

    def __init__(self, tokenizers: Tokenizers, vocabulary: Vocabulary, *, everyone: bool = False) -> None:
        self._tokenizers, self._everyone, self.vocabulary = tokenizers, everyone, vocabulary
        self._rows = vocabulary.rows
        names = [BASE, *(expert.name for expert in tokenizers.models[1:])]
        self._template = names.index(vocabulary.giver)
        self._cut, self._maps = cache(self._cut_rows), cache(self._map)  # embedding and head are cut alike

    def cut(self, counts: Sequence[int]) -> tuple[list[Run], list[Places]]:
        """The runs of rows of a table that the same models have, and for each model where it has each row, or -1.

        A table gets as many rows as the giver's has, or more if the tokens need it.

        Args:
            counts: The number of rows in the base and in each expert.

        Raises:
            PlanError: No model has a row for a token.
        """
        return self._cut(tuple(counts))

    def _cut_rows(self, counts: tuple[int, ...]) -> tuple[list[Run], list[Places]]:
        size = max([counts[self._template], *(row + 1 for row, _ in self.vocabulary.new.values())])
        tokens = np.fromiter(self._rows.values(), np.int64)
        free = np.ones(size, bool)
        free[tokens[tokens < size]] = False
        places = np.stack([self._places(model, count, free) for model, count in enumerate(counts)])
        # What no token has is merged where it is so in all models, and else the giver's.
        alone = free & (places < 0).any(0)
        others = np.arange(len(counts)) != self._template
        places[np.ix_(others, alone)] = -1
        if self._everyone:
            places[1:, (places[1:] < 0).any(0)] = -1
        have = places >= 0
        if (nobody := ~have.any(0)).any():
            row = int(nobody.argmax())
            what = next((f"token {token!r}" for token, at in self._rows.items() if at == row), f"row {row}")
            raise PlanError(
                f"no model has a row for {what} of the tokenizer of '{self.vocabulary.giver}'",
                hint=f"take another tokenizer: {named('vocab')} or {named('files_from')}",
            )
        ends = [*(np.flatnonzero((have[:, 1:] != have[:, :-1]).any(0)) + 1).tolist(), size]
        runs = []
        for first, last in pairwise([0, *ends]):
            base, *others = have[:, first].tolist()
            runs.append((first, last, base, tuple(i for i, has in enumerate(others) if has)))
        return runs, list(places)

    def _map(self, model: int) -> tuple[Places, Places]:
        """The ids of a model's tokens, and the row of the output that each has, or -1."""
        ids = self._tokenizers.ids(model)
        ids = self._tokenizers.ids(0) or {} if ids is None else ids  # as the base's, which has been said
        rows = map(self._rows.get, ids, repeat(-1))
        return np.fromiter(ids.values(), np.int64), np.fromiter(rows, np.int64)

    def _places(self, model: int, count: int, free: np.ndarray[Any, np.dtype[np.bool_]]) -> Places:
        """Where a model has each row of the output; of rows without a token, where it has none either."""
        ids, rows = self._maps(model)
        places = np.full(len(free), -1)
        held = (ids < count) & (rows >= 0) & (rows < len(free))
        places[rows[held]] = ids[held]
        unnamed = np.ones(len(free), bool)
        unnamed[ids[ids < len(free)]] = False
        unnamed[count:] = False
        return np.where(free & unnamed, np.arange(len(free)), places)


# --- the plan ---


def by_token(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    tensors: dict[str, TensorPlan],
    vocab: str | None,
    files_from: str,
    on_mismatch: str,
    by: Tables | None,
    stands: Mapping[str, int],
    *,
    merging: bool,
    others: Sequence[Checkpoint] = (),
) -> tuple[Checkpoint, Sequence[Checkpoint], dict[str, TensorPlan], Vocabulary | None]:
    """The models and the plan with tables aligned by token, or with those that are merged row by row as they are.

    Of `others` the tokens are asked for alone: they are not merged.

    Raises:
        PlanError: The models number their tokens differently, and nothing says what is to become of that.
    """
    base, *experts = _in_components(base, experts, tensors)
    filled = by is not None and by["rows"] == "filled"
    tokenizers = Tokenizers(base, experts, lenient=filled, more=others)
    tables = {
        name: info for name, info in base.tensors.items() if is_table(info) and not folder_of(name, base.components)
    }
    more = by.get("tokens", ()) if by is not None and filled else None
    vocabulary = vocabulary_of(vocab, files_from, tokenizers, tables, more)
    if vocabulary is not None and by is not None and filled:
        base, others, tensors, sizes = fill(base, experts, tensors, Filling(tokenizers, vocabulary, by), stands)
        clause = "it has no tokenizer that can be read, and is taken to have the base's"
        lack = [i for i, e in enumerate(others, 1) if tokenizers.shares(i) and e.vector is None and e.adapter is None]
        experts = [replace(e, remarks=(*e.remarks, clause)) if i in lack else e for i, e in enumerate(others, 1)]
        return base, experts, tensors, replace(vocabulary, sizes=sizes)
    if vocabulary is not None:
        return align(base, experts, tensors, Alignment(tokenizers, vocabulary))
    merged = [tensor.name for tensor in tensors.values() if tensor.action == "merge" and tensor.name in tables]
    places = [i for i, expert in enumerate(experts, 1) if any(name in expert.tensors for name in merged)]
    places = sorted({*places, *(stands.get(name, 0) for name in tables)} - {0})
    infos = [model.tensors[name] for model in (base, *experts) for name in merged if name in model.tensors]
    if not places:
        return base, experts, tensors, None
    remarks, lines = compare(tokenizers, places, min(map(row_count, infos or tables.values())))
    if lines and by is not None and by["rows"] == "stored":
        vocabulary, lines = Vocabulary(None, files_from, {}, others=tuple(lines)), []
    if lines and on_mismatch != "common-rows":
        raise refuse_other_tokens(lines, merging=merging)
    if lines:
        alignment = Alignment(tokenizers, Vocabulary(None, BASE, tokenizers.ids(0) or {}), everyone=True)
        base, experts, tensors, _ = align(base, experts, tensors, alignment)
        parts = [t for t in tensors.values() if t.action == "merge" and merged[0] in (t.name, t.stack)]
        shared, every = sum(row_count(base.tensors[part.name]) for part in parts), row_count(tables[merged[0]])
        remarks[0] = (
            f"{shared:,} of its {every:,} rows of tokens, which all models have, are merged by token; the others stay"
        )
    else:
        tensors = {name: _with_rows(tensor) for name, tensor in tensors.items()}
    models = [
        replace(model, remarks=(*model.remarks, remarks[i])) if i in remarks else model
        for i, model in enumerate((base, *experts))
    ]
    return models[0], models[1:], tensors, vocabulary


def _in_components(
    base: Checkpoint, experts: Sequence[Checkpoint], tensors: Mapping[str, TensorPlan]
) -> list[Checkpoint]:
    """The models with remarks on tables of components in folders, whose rows are merged as they are.

    Raises:
        PlanError: Their tokenizers number the tokens differently.
    """
    models = [base, *experts]
    for folder in filter(None, base.components):
        names = [
            tensor.name
            for tensor in tensors.values()
            if tensor.action == "merge" and folder_of(tensor.name, base.components) == folder
            and is_table(base.tensors[tensor.name])
        ]  # fmt: skip
        places = [i for i, model in enumerate(models) if i and any(name in model.tensors for name in names)]
        if not places:
            continue
        counts = [row_count(model.tensors[name]) for model in models for name in names if name in model.tensors]
        ours, *theirs = (with_tokenizer_of(model, folder) for model in models)
        remarks, lines = compare(Tokenizers(ours, theirs), places, min(counts))
        if lines:
            raise refuse_other_tokens([f"{folder}/: {line}" for line in lines], merging=False)
        for i, remark in remarks.items():
            models[i] = replace(models[i], remarks=(*models[i].remarks, f"{folder}/: {remark}"))
    return models


def _with_rows(tensor: TensorPlan) -> TensorPlan:
    """A table of which the first rows are merged says so."""
    if tensor.rows is None:
        return tensor
    few = f"the first {tensor.rows} rows are merged, the base's others kept"
    return replace(tensor, reason=f"{tensor.reason}: {few}")


Aligned = tuple[Checkpoint, tuple[Checkpoint, ...], dict[str, "TensorPlan"], Vocabulary]


def align(
    base: Checkpoint, experts: Sequence[Checkpoint], plans: Mapping[str, TensorPlan], alignment: Alignment
) -> Aligned:
    """The models and the plan with the rows of all tables in the output's order, the tables in parts where need be.

    Raises:
        PlanError: A change cannot be cut, no model has a row for a token, or a tensor may be a table without its name.
    """
    models = [dict(model.tensors) for model in (base, *experts)]
    aligned: dict[str, TensorPlan] = {}
    lenders: dict[Path, Checkpoint] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, plan in plans.items():
        table = base.tensors[name]
        aligned[name] = plan
        if not is_table(table):
            continue
        counts = [row_count(table), *(count_of(expert, table) for expert in experts)]
        runs, places = alignment.cut(counts)
        moved = not np.array_equal(places[0], np.arange(counts[0]))
        if moved:
            sizes[name] = counts[0], runs[-1][1]
        if plan.action == "copy":
            runs = _copied(runs)
            if not moved:
                continue
        long = row_count(table) == table.shape[0]
        stored = [model.pop(name, None) for model in models]
        del aligned[name]
        for first, last, has, owners in runs:
            part = name if len(runs) == 1 else f"{name}[{first}:{last}]"
            shape = (last - first, *table.shape[1:]) if long else (1,) * (len(runs) == 1) + (last - first,)
            cuts = [each[first:last] for each in places]
            for i in owners:
                info = stored[i + 1]
                if info is not None:
                    models[i + 1][part] = gathered(info, cuts[i + 1], part, shape)
            origin, rows_there = table, cuts[0]
            if not has:
                lender = _lender(name, experts, owners, cuts)
                rows_there = cuts[lender + 1]
                info = stored[lender + 1]
                if info is not None and info.change is None:
                    origin = info
                    lenders |= dict.fromkeys(info.files, experts[lender])
            models[0][part] = gathered(origin, rows_there, part, shape)
            new = replace(plan, name=part, shape=shape, dtype=origin.dtype, owners=owners, rows=None)
            if len(runs) > 1:
                size = runs[-1][1]
                new = replace(new, stack=name, whole=(size, *table.shape[1:]) if long else (1, size))
                twin = f"{plan.twin}[{first}:{last}]"
                new = replace(new, twin=twin if twin in aligned else None)
            aligned[part] = _of_run(new, has, [experts[i].name for i in owners], len(experts))
    refuse_hidden_tables(base, plans, sizes)
    base = replace(base, tensors=models[0], lenders={**base.lenders, **lenders})
    others = tuple(replace(expert, tensors=own) for expert, own in zip(experts, models[1:], strict=True))
    return base, others, aligned, replace(alignment.vocabulary, sizes=sizes)


def _of_run(plan: TensorPlan, has: bool, owners: Sequence[str], experts: int) -> TensorPlan:
    """What happens to a run of rows that these experts have, and the base has or has not."""
    if not has:
        why = f"tokens that the base lacks: the mean of {', '.join(owners)}"
        return replace(plan, action="merge", reason=why, method=NEW, override=None, new=True, checked=True)
    if plan.action == "merge" and not owners:
        return replace(plan, action="copy", reason="tokens that the base alone has", method=None)
    if len(owners) < experts and owners:
        return replace(plan, reason=f"{plan.reason}; its tokens are in {', '.join(owners)}")
    return replace(plan, owners=None)


def _copied(runs: Sequence[Run]) -> list[Run]:
    """The runs of a table that is copied: what the base has is one, whoever else has it."""
    merged: list[Run] = []
    for first, last, has, owners in runs:
        if has and merged and merged[-1][2]:
            merged[-1] = merged[-1][0], last, True, ()
        else:
            merged.append((first, last, has, () if has else owners))
    return merged


def _lender(name: str, experts: Sequence[Checkpoint], owners: Sequence[int], cuts: Sequence[Places]) -> int:
    """The expert whose rows stand in for the base's; a change is to what the base has at its own rows."""
    infos = {i: experts[i].tensors.get(name) for i in owners}
    changes = [i for i, info in infos.items() if info is None or info.change is not None]
    if any((cuts[i + 1] != cuts[changes[0] + 1]).any() for i in changes):
        raise PlanError(
            f"'{name}': {' and '.join(experts[i].name for i in changes)} have the same new tokens in other rows of it",
            hint="merge these adapters into the base with peft and name the results",
        )
    return changes[0] if changes else owners[0]


def refuse_parts(vocabulary: Vocabulary | None, plans: Iterable[TensorPlan], where: str) -> None:
    """Refuse tables in parts, or with other rows than the base's, for what needs the base's.

    Raises:
        UsageError: There are such.
    """
    parts = [plan.stack for plan in plans if plan.stack is not None and len(plan.whole or ()) < 3]
    if parts or (vocabulary is not None and vocabulary.sizes):
        raise UsageError(
            f"embeddings and heads are put together token by token, and {where} needs them as the base has them",
            hint="merge into a checkpoint first, and go on from there",
        )


# --- settings ---


def of_owners(plan: TensorPlan, setting: Setting | None, experts: int) -> Setting:
    """How a tensor is merged: the rows of some experts alone without the others' weights.

    Raises:
        UsageError: The weights of an average add up to zero.
    """
    if plan.new or setting is None:
        method = registry.load(NEW)
        setting = Setting(NEW, method.options(), (1.0,) * experts)
    if plan.owners is None:
        return setting
    method = registry.load(setting.method)
    if method.most_experts is not None and len(plan.owners) < experts:
        setting = Setting(NEW, registry.load(NEW).options(), setting.weights)  # it merges that many or none
    weights = tuple(weight * (i in plan.owners) for i, weight in enumerate(setting.weights))
    if registry.load(setting.method).normalises(setting.options) and abs(sum(weights)) < 1e-8:
        raise UsageError(
            f"in '{plan.name}' the weights add up to zero: their average does not exist",
            hint=f"check {named('weights')}",
        )
    return replace(setting, weights=weights)
