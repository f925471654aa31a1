"""From an expert's tensors to the base's: by their names, and through tied weights.

Only what is sure is matched, and the expert's remarks say so; what could be meant in two ways is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from modelmerge.checkpoint.components import folder_of
from modelmerge.checkpoint.header import TensorInfo
from modelmerge.checkpoint.image_layouts import in_image_layout_of
from modelmerge.checkpoint.names import by_base_names
from modelmerge.checkpoint.pairing import component_of
from modelmerge.checkpoint.reader import Checkpoint, with_prefix
from modelmerge.errors import PlanError, named

# Ends of the names of tensors that have a row for each token and that models tie to one another.
_INPUTS = (
    ".embed_tokens.weight", ".shared.weight", ".wte.weight", ".word_embeddings.weight", ".embed_in.weight",
    ".token_embedding.weight", ".tok_embeddings.weight",
)  # fmt: skip
_HEADS = (
    ".lm_head.weight", ".lm_head.decoder.weight", ".predictions.decoder.weight", ".proj_out.weight",
    ".embed_out.weight", ".output.weight", ".generator_lm_head.weight",
)  # fmt: skip
_BIASES = (
    ".lm_head.bias", ".lm_head.decoder.bias", ".predictions.bias", ".predictions.decoder.bias", ".final_logits_bias",
)  # fmt: skip
# Names that the one table of an encoder-decoder goes by: models keep any of them, or all.
_ONE_TABLE = (".shared.weight", ".encoder.embed_tokens.weight", ".decoder.embed_tokens.weight")
_GLANCE, _BLOCK = 1 << 12, 1 << 20  # bytes compared first, and at a time


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token of the vocabulary, by its name."""
    return _ends(name, (*_INPUTS, *_HEADS, *_BIASES))


def is_head(name: str) -> bool:
    """Whether a tensor belongs to an output head, by its name."""
    return _ends(name, (*_HEADS, *_BIASES))


def match(base: Checkpoint, expert: Checkpoint, merges: Callable[[str], bool]) -> tuple[Checkpoint, list[str]]:
    """The expert with its tensors by the base's names, and complaints about ties that are not sure.

    Args:
        base: The base.
        expert: An expert. A task vector or an adapter has the base's names already.
        merges: Whether a tensor of that name is to be merged; others cause no complaint.

    Raises:
        PlanError: The names of some layers could be the base's in several ways, or a layer is there in part.
        CheckpointError: A file cannot be read.
    """
    if expert.vector is not None:
        return _through_adapted_twins(base, expert), []
    tensors, layout = in_image_layout_of(expert.name, base.tensors, expert.tensors, merges)
    expert = replace(expert, tensors=tensors, remarks=(*expert.remarks, *layout))
    if base.components.keys() == {""} == expert.components.keys():
        return _match(base, expert, merges)
    tensors = {n: info for n, info in expert.tensors.items() if folder_of(n, expert.components) not in base.components}
    remarks, complaints = list(expert.remarks), []
    for folder, component in base.components.items():
        ours, theirs = (component_of(model, folder, base.components) for model in (base, expert))
        mine = {name: info for name, info in theirs.tensors.items() if component.prefix + name not in tensors}
        if not mine:
            continue

        def merges_here(name: str, prefix: str = component.prefix) -> bool:
            return merges(prefix + name)

        try:
            theirs, unsure = _match(ours, replace(theirs, tensors=mine), merges_here)
        except PlanError as error:
            where = f"{component.prefix}: " if folder else ""
            raise PlanError(f"{where}{error.template}", hint=error.hint_template) from error
        _refuse_stranger(ours, theirs, component.prefix, merges_here)
        tensors |= with_prefix(component.prefix, theirs.tensors)
        remarks += [f"{component.prefix}: {remark}" if folder else remark for remark in theirs.remarks]
        complaints += [f"'{component.prefix}{clause[1:]}" for clause in unsure]
    return replace(expert, tensors=tensors, remarks=tuple(remarks)), complaints


def _match(base: Checkpoint, expert: Checkpoint, merges: Callable[[str], bool]) -> tuple[Checkpoint, list[str]]:
    """`match` for a component of an expert and the base's."""
    tensors, remarks = by_base_names(base, expert)
    expert = replace(expert, tensors=tensors)
    through, complaints = _through_twins(base, expert, merges)
    return replace(expert, remarks=(*expert.remarks, *remarks, *through)), complaints


def _refuse_stranger(base: Checkpoint, expert: Checkpoint, prefix: str, merges: Callable[[str], bool]) -> None:
    """Refuse a component that has nothing in common with the base's, which would be left as it is."""
    if expert.tensors and not expert.tensors.keys() & base.tensors.keys() and any(map(merges, base.tensors)):
        ours, theirs = next(iter(base.tensors)), next(iter(expert.tensors))
        raise PlanError(
            f"no tensor of the base's '{prefix}*' is in {expert.name}: the base has '{ours}', {expert.name} '{theirs}'",
            hint=f"are these of one kind? If the base's shall stay: {named('exclude')} '{prefix}*'",
        )


def twins(base: Checkpoint, experts: Sequence[Checkpoint]) -> dict[str, str]:
    """Tensors that are tied, in the base and in every expert, to another, with that one's name: of a head its table.

    To merge one is to merge both: what is counted over a whole model counts them once.
    """
    if base.components.keys() == {""}:
        return _twins(base, experts)
    tables: dict[str, str] = {}
    for folder, component in base.components.items():
        parts = [component_of(model, folder, base.components) for model in (base, *experts)]
        for name, table in _twins(parts[0], parts[1:]).items():
            tables[component.prefix + name] = component.prefix + table
    return tables


def _twins(base: Checkpoint, experts: Sequence[Checkpoint]) -> dict[str, str]:
    tables: dict[str, str] = {}
    ties = _Ties(base)
    # The same one whatever the order of the file.
    order = {name: (_ends(name, _HEADS), name) for name in base.tensors}
    for name in base.tensors:
        for other in ties.candidates(name):
            first = other not in tables and order[other] < order[name]
            # What the config says is not read up on: a model on the Hub may be far away.
            separate = _says_tied(base) is False and _ends(name, _HEADS) and not _ends(other, _HEADS)
            if first and not separate and all(_same(model, name, other) for model in (base, *experts)):
                tables[name] = other
                break
    return tables


def doubled_tables(base: Checkpoint) -> set[str]:
    """Embeddings and heads that the base stores twice though they are one, by both names."""
    if _says_tied(base) is False:
        return set()
    ties = _Ties(base)
    tables = [name for name in base.tensors if _ends(name, (*_INPUTS, *_HEADS))]
    return {name for name in tables if any(_same(base, name, other) for other in ties.candidates(name))}


# --- ties ---


class _Ties:
    """Which tensors of a model may be one: they lie at one place, or have the names of tied ones."""

    def __init__(self, model: Checkpoint) -> None:
        self._groups: dict[object, list[str]] = defaultdict(list)
        for name, info in model.tensors.items():
            for key in self._keys(name, info):
                self._groups[key].append(name)
        self._model = model

    def candidates(self, name: str) -> list[str]:
        """The other tensors that a tensor may be one with."""
        info = self._model.tensors[name]
        names = dict.fromkeys(other for key in self._keys(name, info) for other in self._groups[key])
        return [other for other in names if other != name]

    @staticmethod
    def _keys(name: str, info: TensorInfo) -> Iterator[object]:
        if info.nbytes:
            yield _place(info)
            if _ends(name, (*_INPUTS, *_HEADS)):
                yield "table", info.shape
            if _ends(name, _BIASES):
                yield "bias", info.shape


def _through_twins(base: Checkpoint, expert: Checkpoint, merges: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Give the expert what it leaves out because it is tied, and take what the base leaves out for that reason."""
    remarks: list[str] = []
    complaints: list[str] = []
    tensors = expert.tensors
    lacks = [name for name in base.tensors if name not in tensors and merges(name)]
    extra = [name for name in tensors if name not in base.tensors]
    if not lacks and not extra:
        return remarks, complaints
    ours, theirs = _Ties(base), _Ties(expert)
    denying = [model.name for model in (base, expert) if _says_tied(model) is False]
    for name in lacks:
        have = [other for other in ours.candidates(name) if other in tensors]
        twin = next((other for other in have if _same(base, name, other)), None)
        if twin and not (denying and _ends(name, _HEADS) != _ends(twin, _HEADS)):
            tensors[name] = tensors[twin]
            remarks.append(f"it leaves '{name}' out, which in the base is the same as '{twin}': read from there")
        elif twin:
            complaints.append(
                f"'{name}': the same as '{twin}' in the base, but missing in {expert.name}, and the config of "
                f"{denying[0]} says that they are not tied"
            )
        elif have and _ends(name, _HEADS) and _says_tied(expert):
            complaints.append(
                f"'{name}': other than '{have[0]}' in the base, but missing in {expert.name}, whose config ties them"
            )
    headless = _says_tied(base) is False or any(_ends(name, _HEADS) for name in base.tensors)
    for name in extra:
        have = [other for other in theirs.candidates(name) if other in base.tensors]
        twin = next((other for other in have if _same(expert, name, other)), None)
        if twin:
            del tensors[name]
            remarks.append(f"its '{name}' is the same as its '{twin}' and is left out, as in the base")
        elif have and _ends(name, _HEADS) and not headless and merges(name):
            complaints.append(
                f"'{name}': of its own in {expert.name}, other than '{have[0]}'; the base has none, and would lose it"
            )
    remarks += _one_table(base, expert)
    return remarks, complaints


def _through_adapted_twins(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """An adapter that changes one of two tied tensors, both of which the base stores, changes the other as well."""
    factors = [name for name, info in expert.tensors.items() if info.change is not None and info.change.factors]
    tables = [name for name in factors if is_vocabulary(name)] if expert.adapter is not None else []
    if not tables or _says_tied(base) is False:
        return expert
    ties, tensors = _Ties(base), dict(expert.tensors)
    for name in tables:
        for other in ties.candidates(name):
            if other not in expert.tensors and _same(base, name, other):
                tensors[other] = replace(expert.tensors[name], name=other)
    return replace(expert, tensors=tensors)


def _one_table(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Match the one table of an encoder-decoder where base and expert keep it under different names."""
    ours = [name for name in base.tensors if _ends(name, _ONE_TABLE)]
    theirs = [name for name in expert.tensors if _ends(name, _ONE_TABLE)]
    if not ours or not theirs or set(ours) & set(theirs):
        return []
    if not all(_same(base, ours[0], name) for name in ours) or not all(_same(expert, theirs[0], n) for n in theirs):
        return []
    table = expert.tensors[theirs[0]]
    for name in theirs:
        del expert.tensors[name]
    expert.tensors.update(dict.fromkeys(ours, table))
    return [f"its table '{theirs[0]}' is the base's '{ours[0]}'"]


def _same(model: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors of a model are one: at the same place, or equal to the last byte."""
    left, right = model.tensors.get(name), model.tensors.get(other)
    if left is None or right is None:  # a task vector or an adapter that leaves out what did not change
        return left is right and model.has(name) and model.has(other)
    if _place(left) == _place(right):
        return True
    parts, others = _parts(left), _parts(right)
    return len(parts) == len(others) and all(map(_equal, [model] * len(parts), parts, others))


def _parts(info: TensorInfo) -> tuple[TensorInfo, ...]:
    return (info.change.parts if info.change is not None else ()) or (info,)


def _equal(model: Checkpoint, left: TensorInfo, right: TensorInfo) -> bool:
    """Whether two stored tensors are equal, byte by byte; a look at the start tells most that are not apart."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    try:
        start = 0
        while start < left.nbytes:
            stop = min(start + (_BLOCK if start else _GLANCE), left.nbytes)
            blocks = bytearray(stop - start), bytearray(stop - start)
            for info, block in zip((left, right), blocks, strict=True):
                model.read_into(info, start, memoryview(block), follow=False)
            if blocks[0] != blocks[1]:
                return False
            start = stop
        return True
    finally:
        model.close()  # what is far away now may have been fetched when it is read in earnest


def _place(info: TensorInfo) -> tuple[object, ...]:
    return info.file, info.start, info.dtype, info.shape, info.strides, info.change


def _says_tied(model: Checkpoint) -> bool | None:
    """Whether the model's config says that its head is its embedding; None where it says nothing."""
    for config in (model.config, model.config.get("text_config")):
        answer = config.get("tie_word_embeddings") if isinstance(config, dict) else None
        if isinstance(answer, bool):
            return answer
    return None


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return f".{name.replace('/', '.')}".endswith(ends)
