"""Tables filled before they are merged, as mergekit does it: every model has a row for every token of the output.

What a model has stays; what it lacks comes from the models that have it (`modelmerge.plan.recipe.Tables`). So a token
that only one expert has is the same in all models, and no task vector changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelmerge.checkpoint.header import Change, TensorInfo, rows
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError
from modelmerge.plan.gathering import Places, as_rows, count_of, joined_blocks, refuse_hidden_tables, with_left
from modelmerge.plan.overrides import BASE
from modelmerge.plan.recipe import Tables
from modelmerge.plan.vocabulary import Tokenizers, Vocabulary, is_table, row_count

if TYPE_CHECKING:
    from modelmerge.checkpoint.means import Means
    from modelmerge.plan.tensors import TensorPlan

# For every model and row, whose row it is, which it is there, and which the models have that make a mean: [M, size].
Sources = tuple[Places, Places, Places]
_ZERO, _MEAN = -1, -2  # in place of the model that a row comes from


class Filling:
    """Where every model's rows come from, and the tables that are made of them.

    Args:
        tokenizers: Of all models.
        vocabulary: The output's tokens.
        tables: How the tables are put together.
    """

    def __init__(self, tokenizers: Tokenizers, vocabulary: Vocabulary, tables: Tables) -> None:
        self._tokenizers, self._models, self._tables = tokenizers, tokenizers.models, tables
        self._rows, self._bases = vocabulary.rows, vocabulary.name == BASE and not tables.get("apart")
        self._names = [BASE, *(expert.name for expert in self._models[1:])]
        self.size = max(self._rows.values(), default=-1) + 1
        self.padded = -(-self.size // tables.get("multiple", 1)) * tables.get("multiple", 1)
        from modelmerge.checkpoint.means import Means  # with torch, which takes a second

        self.means = Means()
        self.sources = cache(self._sources)  # embedding and head are filled alike

    def _sources(self, counts: tuple[int, ...], seen: tuple[int, ...], stand: int) -> Sources:
        """Where the rows of a table come from.

        Args:
            counts: How many each model has.
            seen: The places of the models that are merged there, the base's apart.
            stand: The place of the model whose table stands in the base's.

        Raises:
            PlanError: A token is to come from a row that there is not.
        """
        own = np.stack([self._places(model or stand, count) for model, count in enumerate(counts)])
        texts = {model: self._models[model or stand].reference.text for model in (0, *seen)}
        # The base is one of the others where it is an expert as well, or another stands in its place.
        members = [model for model in texts if model or texts[0] not in [texts[other] for other in seen]]
        wanted = self._models[0].reference.text if self._tables.get("lacking") == "base" else None
        bases = [model for model in members if texts[model] == wanted]
        have = own[members] >= 0
        owners = have.sum(0)
        donor = np.where(owners == 0, _ZERO, np.where(owners == 1, np.array(members)[have.argmax(0)], _MEAN))
        for model in bases:
            donor[own[model] >= 0] = model
        place = np.where(donor >= 0, own[donor, np.arange(self.size)], np.arange(self.size))
        forced = np.zeros(self.size, bool)
        for token, entry in self._tables.get("tokens", {}).items():
            row = self._rows[token]
            forced[row] = entry.get("force", False)
            if entry.get("zero"):
                donor[row], place[row] = _ZERO, row
            elif "model" in entry and (forced[row] or not have[:, row].all()):
                model = self._names.index(entry["model"]) if entry["model"] in self._names else -1
                if model not in (stand, *seen):
                    raise PlanError(
                        f"the row of {token!r} is to be that of '{entry['model']}', which is not merged there"
                    )
                donor[row] = model if model != stand else 0
                place[row] = self._place_of(token, entry, int(own[donor[row], row]), counts[donor[row]])
        stays = (own >= 0) & ~forced
        models = np.arange(len(counts))[:, None]
        whose, places = np.where(stays, models, donor[None]), np.where(stays, own, place[None])
        own[[model not in members for model in range(len(counts))]] = -1
        return whose, places, own

    def _ids(self, model: int) -> Mapping[str, int]:
        """The ids of a model's tokens.

        mergekit adds `tokens` to the base's own tokenizer, where the output has that, before it asks which tokens the
        base has: so it has them, in the padding of its tables. Where the file names that by its path, it is another.
        """
        if self._bases and self._tokenizers.shares(model) and self._models[model].adapter is None:
            return self._rows
        return self._tokenizers.ids(model) or {}

    def _places(self, model: int, count: int) -> Places:
        """Where a model has each row of the output, or -1."""
        ids = self._ids(model)
        places = np.full(self.size, -1)
        for token, row in self._rows.items():
            if (at := ids.get(token, count)) < count:
                places[row] = at
        return places

    def _place_of(self, token: str, entry: Mapping[str, Any], own: int, count: int) -> int:
        """The row that a token is to come from."""
        there, place = entry.get("token", token), own
        if "id" in entry:
            there, place = entry["id"], entry["id"]
        elif there != token:
            place = self._ids(self._names.index(entry["model"])).get(there, -1)
        if not 0 <= place < count:
            raise PlanError(
                f"the row of {token!r} is to be that of {there!r} of '{entry['model']}', which has none",
                hint="check the tokens of the configuration",
            )
        return place

    def table(self, model: int, stored: Sequence[TensorInfo], sources: Sources) -> TensorInfo:
        """A model's table, filled, given the tables of all, and where the rows come from.

        Raises:
            PlanError: A change cannot be cut, or does not tell the row that is wanted of it.
        """
        info, whose = stored[model], sources[0][model]
        change = info.change
        if change is None:
            return self._joined(info, model, stored, whose, sources)
        if self.padded == row_count(info) and bool((whose == model).all()) and not np.diff(sources[1][model], 2).any():
            return info
        # A change is nothing in rows that come from elsewhere: the base has the same.
        whose = np.where(whose == model, model, _ZERO)
        if change == Change(scale=change.scale):
            return replace(self._joined(info, model, stored, whose, sources), change=change)
        changed = with_left(info, self.padded, lambda left: self._joined(left, model, stored, whose, sources))
        return replace(changed, shape=(self.padded, *info.shape[1:]))

    def _joined(
        self, info: TensorInfo, model: int, stored: Sequence[TensorInfo], whose: Places, sources: Sources
    ) -> TensorInfo:
        """`info` with a model's rows, filled, and their mean behind them where there are to be more."""
        table, long = as_rows(info), info.shape[:1] != (1,)
        inner, places = table.shape[1:], sources[1][model]
        ends = (np.flatnonzero((np.diff(whose) != 0) | (np.diff(places) != 1)) + 1).tolist()
        blocks: list[TensorInfo] = []
        for first, last in pairwise([0, *ends, self.size]):
            who, at = int(whose[first]), int(places[first])
            if who == _ZERO:
                blocks.append(self.means.add(info.name, table.dtype, (last - first, *inner)))
            elif who == _MEAN:
                for row in range(first, last):
                    parts = [
                        self._lent(i, stored, int(own[row]), 1) for i, own in enumerate(sources[2]) if own[row] >= 0
                    ]
                    blocks.append(self.means.add(info.name, table.dtype, (1, *inner), parts))
            else:
                own = rows(table, at, at + last - first) if who == model else None
                blocks.append(own or self._lent(who, stored, at, last - first))
        filled = joined_blocks(info.name, (self.size, *inner), blocks)
        if self.padded > self.size:
            mean = self.means.add(info.name, table.dtype, (1, *inner), [filled])
            filled = joined_blocks(info.name, (self.padded, *inner), [filled, *[mean] * (self.padded - self.size)])
        return replace(filled, change=None) if long else replace(filled, shape=(1, self.padded), change=None)

    def _lent(self, model: int, stored: Sequence[TensorInfo], at: int, count: int) -> TensorInfo:
        """Rows of a model for another."""
        info = stored[model]
        if info.change is not None:
            raise PlanError(
                f"{info.file}: changes '{info.name}' of the base, and a token's row is to be its own",
                hint="merge the adapter into its base with peft and name the result",
            )
        return rows(as_rows(info), at, at + count)


def fill(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    plans: Mapping[str, TensorPlan],
    filling: Filling,
    stands: Mapping[str, int],
) -> tuple[Checkpoint, tuple[Checkpoint, ...], dict[str, TensorPlan], dict[str, tuple[int, int]]]:
    """The models and the plan with filled tables, and of each table how many rows the base has and the output.

    `stands` are the places of models, by table, whose own stands in the base's.

    Raises:
        PlanError: A token's row cannot be had, a change cannot be cut, or a tensor may be a table without its name.
    """
    models, means = (base, *experts), filling.means
    tensors = [dict(model.tensors) for model in models]
    changed, sizes = dict(plans), dict[str, tuple[int, int]]()
    lenders: dict[Path, Checkpoint | Means] = {means.file: means}
    for name, plan in plans.items():
        table = base.tensors[name]
        if not is_table(table):
            continue
        seen = tuple(i + 1 for i in (range(len(experts)) if plan.sources is None else plan.sources))
        counts = row_count(table), *(count_of(e, table) if i in seen else 0 for i, e in enumerate(experts, 1))
        sources = filling.sources(counts, seen, stands.get(name, 0))
        stored = [model.tensors.get(name, table) for model in models]
        for model, info in zip(models, stored, strict=True):
            lenders |= dict.fromkeys(info.files, model if name in model.tensors else base)
        whose = sources[0][[0, *seen]]
        stored = _of_one_dtype(stored, means, bool((whose != np.array([0, *seen])[:, None]).any()))
        for i, model in enumerate(models):
            if name in model.tensors:
                tensors[i][name] = filling.table(i, stored, sources)
        info = tensors[0][name]
        changed[name] = replace(plan, shape=info.shape, dtype=info.dtype, rows=None)
        if filling.padded != row_count(table) or (sources[0][0] != 0).any() or (np.diff(sources[1][0]) != 1).any():
            said = base.config.get("vocab_size") if stands.get(name) else None
            sizes[name] = (said if isinstance(said, int) else row_count(table)), filling.padded
    refuse_hidden_tables(base, plans, sizes)
    means.reader = replace(base, lenders={**base.lenders, **{f: m for f, m in lenders.items() if m is not base}})
    base, *others = (
        replace(model, tensors=each, lenders={**model.lenders, **{f: m for f, m in lenders.items() if m is not model}})
        for model, each in zip(models, tensors, strict=True)
    )
    return base, tuple(others), changed, sizes


def _of_one_dtype(stored: Sequence[TensorInfo], means: Means, mixed: bool) -> list[TensorInfo]:
    """The tables of all models; where rows of some go to others, in the widest dtype of all."""
    dtypes = {info.dtype for info in stored if info.change is None}
    if not mixed or len(dtypes) < 2:
        return list(stored)
    widest = next((dtype for dtype in ("F64", "F32") if dtype in dtypes), "F32")
    return [
        info if info.dtype == widest or info.change is not None else means.add(info.name, widest, info.shape, [info])
        for info in stored
    ]
