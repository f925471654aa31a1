"""From headers to what happens to each tensor, or one error that names every disagreement.

Nothing here reads a tensor: a plan costs milliseconds, whatever the size of the models.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from modelmerge.checkpoint.config_file import Values
from modelmerge.checkpoint.configs import compared
from modelmerge.checkpoint.header import DTYPE_BITS, MERGEABLE_DTYPES, QUANTISED_DTYPES, TensorInfo, is_buffer
from modelmerge.checkpoint.layout import Layout, lay_out_model
from modelmerge.checkpoint.leftovers import refuse_lookalikes
from modelmerge.checkpoint.matching import match, twins
from modelmerge.checkpoint.names import matches
from modelmerge.checkpoint.pairing import placed
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError, UsageError, named
from modelmerge.methods import registry
from modelmerge.plan.disagreements import SHAPE, disagreement
from modelmerge.plan.layers import Stack
from modelmerge.plan.linear import is_linear
from modelmerge.plan.overrides import BASE, Methods, glob_hint
from modelmerge.plan.quantised import refuse_8_bits, refuse_quantised
from modelmerge.plan.recipe import OnMismatch, Tables
from modelmerge.plan.stacks import as_matrices, as_wholes, entries, is_kernel, restack
from modelmerge.plan.tables import by_token
from modelmerge.plan.vocabulary import Vocabulary, is_table, row_count

Action = Literal["merge", "copy"]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor of the base, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as the base stores it
    out_dtype: str
    action: Action
    reason: str
    linear: bool  # the weight of a linear layer
    checked: bool = True  # refuse NaN and Inf
    rows: int | None = None  # so many all models have; the base's others are kept. None: all have the base's
    twin: str | None = None  # the tensor before it that it is tied to, in every model
    method: str | None = None  # what merges it, where that is known
    override: int | None = None  # the place of the override that decides
    stack: str | None = None  # the stored tensor that it is a part of: `STACK[INDEX]`, or `TABLE[FIRST:LAST]`
    whole: tuple[int, ...] | None = None  # the shape of that; or of a kernel that is merged as a matrix
    owners: tuple[int, ...] | None = None  # the places of the experts that it is merged from; None: of all
    new: bool = False  # rows that the base lacks: the mean of the owners'
    sources: tuple[int, ...] | None = None  # the places of the experts that its method sees; None: all
    members: tuple[tuple[str, tuple[int, ...]], ...] = ()  # what files have in its place, with their shapes, in order

    @property
    def stored_name(self) -> str:
        """The name of the tensor in files: its own, or of what it is a part of; of several, a glob."""
        return f"{self.name.rpartition('.')[0]}.*" if len(self.members) > 1 else self.stack or self.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in files, of the whole where it is a part of a tensor."""
        return self.whole or self.shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def out_bytes(self) -> int:
        """Bytes that it takes in the output."""
        return self.numel * DTYPE_BITS[self.out_dtype] // 8

    @property
    def row(self) -> int:
        """Number of elements of a row: what lies below the first dimension; a vector is one row."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else self.numel

    @property
    def mismatched(self) -> bool:
        """Whether its shape differs among the models, which `--on-mismatch` allowed."""
        return self.rows is not None or self.reason.startswith(SHAPE)

    @property
    def common(self) -> int:
        """Number of elements that all models have; they are its first."""
        return self.numel if self.rows is None else self.rows * math.prod(self.shape[1:])


Tensors = Sequence[TensorPlan]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a merge will do, known before it starts."""

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    tensors: dict[str, TensorPlan]
    expert_only: dict[str, tuple[str, ...]]  # tensor name -> the experts that have it; the merge leaves it out
    layout: Layout
    giver: Checkpoint  # whose tokenizer, chat template and generation config the output gets
    vocabulary: Vocabulary | None = None  # the tokens of its tables, where they are aligned by token
    config: Values = field(default_factory=dict)  # what the base's config.json must say otherwise of its layers

    def experts_of(self, tensor: TensorPlan) -> tuple[Checkpoint, ...]:
        """The experts that a tensor's method sees, in their order."""
        return self.experts if tensor.sources is None else tuple(self.experts[i] for i in tensor.sources)

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """The base, then the experts in their order."""
        return (self.base, *self.experts)

    def close(self) -> None:
        """Let go of the models' files."""
        for model in self.models:
            model.close()

    def in_order(self) -> list[TensorPlan]:
        """All tensors, in the order of the output's bytes."""
        return [self.tensors[name] for shard in self.layout.shards for name in shard.tensors]

    def select(self, action: Action) -> list[TensorPlan]:
        """The tensors with that action, in the order of the output's bytes."""
        return [tensor for tensor in self.in_order() if tensor.action == action]

    def stored_bytes(self, tensor: TensorPlan, *, experts: bool, streamed: bool = False) -> int:
        """Bytes of a tensor in the base and, with `experts`, in every expert; or only in models that are streamed."""
        models = (self.base, *(self.experts_of(tensor) if experts else ()))
        owners = [(model, model.owner(tensor.name)) for model in models]
        return sum(model.stored_bytes(tensor.name) for model, owner in owners if owner.streamed or not streamed)

    @property
    def bytes_written(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.file_bytes for shard in self.layout.shards)


def make_plan(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    methods: Methods | None = None,
    dtype: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: int | None = None,
    on_mismatch: str = "error",
    vocab: str | None = None,
    files_from: str = BASE,
    tables: Tables | None = None,
    others: Sequence[Checkpoint] = (),
    strict: int | None = None,
    stack: Stack | None = None,
    whole_experts: bool = False,
) -> Plan:
    """The plan for merging `experts` onto `base`.

    Args:
        base: The base, whose keys the output will have.
        experts: The experts.
        methods: Which method merges which tensor; None where it is enough to know what could be merged.
        dtype: safetensors dtype to store floating tensors in, None for the base's own.
        include: Globs of tensor names to merge; all if empty. Overrides what a method for linear layers leaves out
            by name (embeddings, output heads).
        exclude: Globs of tensor names to copy from the base, whatever the experts hold.
        max_shard_size: Largest output shard, in bytes; None for the usual one, and one file for a base that is one.
        on_mismatch: What becomes of tensors whose shapes differ: `error`; `copy` takes the base's; `common-rows`
            merges the rows of embeddings and heads that all have, by token where tokenizers can be read, else the
            first, and keeps the base's others.
        vocab: Whose tokens embeddings and heads have: `base`, `union` or an expert's name; rows go by token then. None:
            rows go by their number, and tokenizers that number them differently are an error.
        files_from: Whose tokenizer goes with the output: `base` or an expert's name.
        tables: How embeddings and heads are put together, where mergekit says it.
        others: Models that are not merged, whose tokenizers `vocab` may name.
        strict: How many of the overrides, from the first on, are refused if they change nothing; all if None.
        stack: How layers from several places are put together; `base` and `experts` are its.
        whole_experts: Whether the experts of a layer are one tensor, as in mergekit.

    Raises:
        PlanError: The models disagree, or there is nothing to merge.
        UsageError: A glob matches no tensor, or an override changes none.
    """
    refuse_quantised((base, *experts))
    complaints: list[str] = []
    if stack is None:
        experts = [placed(base, expert) for expert in experts]
        experts, complaints = _matched(base, compared(base, experts), include, exclude)
    elif tables is None:
        stack.refuse_tables(vocab, files_from)
    refuse_8_bits(base, experts, lambda name: _is_merged(name, include, exclude))
    _refuse_idle_globs(base, experts, include, exclude)
    tensors = {}
    for name, info in base.tensors.items():
        linear = is_linear(info, include) or (methods is not None and is_kernel(info) and methods.names_matrices(name))
        try:
            here = experts if stack is None else stack.takers(name)
            rows = _common_rows(info, here) if on_mismatch == "common-rows" or vocab is not None else None
            method, place, reason = _method_of(methods, name, linear)
            if stack is not None and methods is not None:
                choice = methods.choose(name, place, linear=linear)
                overridden = place is not None and methods.overrides[place].method is not None
                method, reason = stack.method_of(name, choice, method, reason, overridden=overridden)
            action, reason = _decide(info, here, method, reason, include, exclude, on_mismatch, rows)
            if stack is not None and action == "copy" and reason == ONLY_IN_BASE and not stack.origins[name].experts:
                action, reason = stack.of_lone(info, method)
        except PlanError as complaint:
            complaints.append(complaint.message)
            continue
        floating = info.dtype in MERGEABLE_DTYPES
        out_dtype = dtype if dtype and floating else base.stored_dtype(info)
        checked = floating and reason != _EXCLUDED
        tensors[name] = TensorPlan(
            name, info.shape, info.dtype, out_dtype, action, reason, linear, checked,
            rows=rows if action == "merge" else None, method=method if action == "merge" else None, override=place,
            sources=None if stack is None else stack.origins[name].experts,
        )  # fmt: skip
    beyond = sorted({name for expert in experts for name in expert.tensors} - base.tensors.keys())
    lost = [name for name in beyond if base.lost(name) and _is_merged(name, include, exclude)]
    complaints += [f"'{name}': missing in the base, whose index lists it" for name in lost]
    if complaints:
        grown = any(_common_rows(info, experts) for info in base.tensors.values())
        raise disagreement(complaints, tables=grown and methods is not None)
    tied = experts if stack is None else stack.tied()
    for name, twin in (twins(base, tied) if tied is not None else {}).items():
        one, other = tensors[name], tensors[twin]
        alike = (one.action, one.override, one.method) == (other.action, other.override, other.method)
        if one.action == "merge" and alike:
            tensors[name] = replace(one, twin=twin)
    if stack is None and not any(tensor.action == "merge" for tensor in tensors.values()):
        raise _nothing_to_merge(base, experts, tensors)
    if methods is not None:
        methods.refuse_idle({t.name: (t.action == "merge", t.linear, t.override) for t in tensors.values()}, strict)
    expert_only = {name: tuple(expert.name for expert in experts if name in expert.tensors) for name in beyond}
    stands = {} if stack is None else {name: origin.stand for name, origin in stack.origins.items()}
    base, experts, tensors, vocabulary = by_token(
        base, experts, tensors, vocab, files_from, on_mismatch, tables, stands, merging=methods is not None,
        others=others,
    )  # fmt: skip
    if whole_experts and methods is not None:
        base, experts, tensors = as_wholes(base, experts, tensors, functools.partial(_kind, methods))
    base, experts, tensors = as_matrices(base, experts, tensors)
    stored, parts = entries(tensors.values())
    layout = lay_out_model(stored, base.components, max_shard_size, parts=parts)
    config = {} if stack is None else stack.config
    return Plan(base, tuple(experts), tensors, expert_only, layout, base, vocabulary, config)


ON_MISMATCH: tuple[str, ...] = get_args(OnMismatch)
_EXCLUDED = "excluded"
ONLY_IN_BASE = "only in the base"


def _decide(
    info: TensorInfo,
    experts: Sequence[Checkpoint],
    method: str,
    why: str,
    include: Sequence[str],
    exclude: Sequence[str],
    on_mismatch: str,
    rows: int | None,
) -> tuple[Action, str]:
    """What happens to a tensor of the base, and why.

    `method` merges it, or is `base`, and `why` says why. `rows`: it is a table of which all models have so many.

    Raises:
        PlanError: The experts disagree with the base or with one another.
    """
    if matches(info.name, exclude):
        return "copy", _EXCLUDED
    if include and not matches(info.name, include):
        return "copy", "not included"
    have = [expert for expert in experts if expert.has(info.name)]
    lost = [expert.name for expert in experts if expert not in have and expert.lost(info.name)]
    if not have and not lost:
        return "copy", ONLY_IN_BASE
    if info.dtype not in MERGEABLE_DTYPES and info.dtype not in QUANTISED_DTYPES:
        return "copy", f"{info.dtype}, not floating"
    if is_buffer(info):
        return "copy", "a buffer, not a weight"
    if lost and not have:
        raise PlanError(f"'{info.name}': missing in {', '.join(lost)}, whose index lists it")
    shapes = "" if rows is not None else _other_shapes(info, have)
    if shapes and on_mismatch == "copy" and len(have) == len(experts):
        return "copy", f"{SHAPE}{list(info.shape)} in the base, but {shapes}"
    _refuse_disagreement(info, experts, have, shapes)
    return ("copy" if method == BASE else "merge"), why


def _method_of(methods: Methods | None, name: str, linear: bool) -> tuple[str, int | None, str]:
    """The name of the method that merges a tensor, the place of the override that says so, and the reason."""
    if methods is None:
        return "", None, "shared by all"
    place = methods.place_of(name)
    choice = methods.choose(name, place, linear=linear)
    where = "" if place is None else f"override '{methods.overrides[place].tensors}': "
    if choice is None:
        overridden = place is not None and methods.overrides[place].method == BASE
        return BASE, place, where + (BASE if overridden else "not the weight of a linear layer")
    why = choice.name
    if choice.rest:
        why = f"not the weight of a linear layer: {choice.name}"
    elif place is None:
        why = "the weight of a linear layer" if choice.method.matrices else "shared by all"
    return choice.name, place, where + why


def _kind(methods: Methods, tensor: TensorPlan) -> object:
    """The same of tensors that are merged alike; None of one that is not, or by a method for matrices."""
    if tensor.action != "merge" or tensor.rows is not None or registry.load(str(tensor.method)).matrices:
        return None
    said = None if tensor.override is None else replace(methods.overrides[tensor.override], tensors="")
    return tensor.out_dtype, tensor.method, said, tensor.owners, tensor.sources


def _other_shapes(info: TensorInfo, have: Sequence[Checkpoint]) -> str:
    """The experts whose tensor has another shape than the base's, in words; empty where there are none."""
    held = [(e.name, e.tensors[info.name].shape) for e in have if info.name in e.tensors]
    return ", ".join(f"{list(shape)} in {name}" for name, shape in held if shape != info.shape)


def _common_rows(info: TensorInfo, experts: Sequence[Checkpoint]) -> int | None:
    """How many rows all models have of a table or head that differs in nothing else; None where that is not so."""
    infos = [info, *(expert.tensors[info.name] for expert in experts if info.name in expert.tensors)]
    if not all(map(is_table, infos)) or len({each.shape for each in infos}) == 1:
        return None
    widths = {(len(each.shape), math.prod(each.shape) // (row_count(each) or 1)) for each in infos}
    return min(map(row_count, infos)) or None if len(widths) == 1 else None


def _refuse_disagreement(
    info: TensorInfo, experts: Sequence[Checkpoint], have: Sequence[Checkpoint], shapes: str
) -> None:
    lacking = [expert.name for expert in experts if expert not in have]
    if lacking:
        holders = ", ".join(expert.name for expert in have)
        raise PlanError(f"'{info.name}': in {holders}, but missing in {', '.join(lacking)}")
    if shapes:
        raise PlanError(f"'{info.name}': {SHAPE}{list(info.shape)} in the base, but {shapes}")
    kinds = [(e.name, e.tensors[info.name].dtype) for e in have if info.name in e.tensors]
    odd = [f"{dtype} in {name}" for name, dtype in [("the base", info.dtype), *kinds] if dtype not in MERGEABLE_DTYPES]
    if odd:
        can = "only float64, float32, float16, bfloat16 can be merged"
        raise PlanError(f"'{info.name}': dtype {', '.join(odd)}: {can}")


def _matched(
    base: Checkpoint, experts: Sequence[Checkpoint], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Checkpoint], list[str]]:
    """The experts by the base's names, and what about that is not sure."""

    def merges(name: str) -> bool:
        return _is_merged(name, include, exclude)

    pairs = [match(base, restack(base, expert), merges) for expert in experts]
    for expert, _ in pairs:
        refuse_lookalikes(base, expert, merges)
    return [matched for matched, _ in pairs], [each for _, unsure in pairs for each in unsure]


def _refuse_idle_globs(
    base: Checkpoint, experts: Sequence[Checkpoint], include: Sequence[str], exclude: Sequence[str]
) -> None:
    # What experts alone have can be excluded: then they may have it.
    excludable = base.tensors.keys() | {name for expert in experts for name in (*expert.tensors, *expert.excluded)}
    for option, globs, names in (("include", include, base.tensors.keys()), ("exclude", exclude, excludable)):
        for glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise UsageError(
                    f"'{glob}' matches no tensor of the base", option=option, hint=glob_hint(glob, base.tensors)
                )


def _nothing_to_merge(base: Checkpoint, experts: Sequence[Checkpoint], tensors: dict[str, TensorPlan]) -> PlanError:
    reasons = sorted({tensor.reason for tensor in tensors.values()})
    strangers = [e.name for e in experts if not e.tensors.keys() & base.tensors.keys()]
    if strangers:
        theirs = next(iter(next(e for e in experts if e.name == strangers[0]).tensors), "nothing")
        ours = next(iter(base.tensors), "nothing")
        return PlanError(
            f"no tensor of the base is in {', '.join(strangers)}: the base has '{ours}', {strangers[0]} has '{theirs}'",
            hint="are these experts of this base?",
        )
    return PlanError(
        f"nothing is left to merge: {'; '.join(reasons)}", hint=f"check {named('include')} and {named('exclude')}"
    )


def _is_merged(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether the globs leave a tensor to be merged."""
    return not matches(name, exclude) and (not include or matches(name, include))


DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what `--dtype` takes
