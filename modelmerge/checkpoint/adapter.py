"""PEFT adapters: what the keys of an adapter file say about the tensors of a base.

The conventions are those of the peft library (0.21): the task vector that comes out is what its `merge_and_unload` adds
to the base. For a module with rank r and scale s = alpha / r (or alpha / sqrt(r), rank-stabilised):

- linear layers: s B A, with A [r, in] and B [out, r]; convolutions: the same, A [r, in, *kernel] and B [out, r, 1, 1];
- weights that are stored [in, out], as GPT-2's are, and embeddings [words, width]: s (B A)^T;
- DoRA: base plus that, each output's weights rescaled to the norm that was learnt for it;
- modules that were trained whole, and biases, stand in the file as they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from modelmerge.checkpoint.adapter_config import MERGE_FIRST, PREFIX, Adapter, unmergeable
from modelmerge.checkpoint.adapter_places import Places, is_saved
from modelmerge.checkpoint.header import Change, TensorInfo
from modelmerge.checkpoint.matching import doubled_tables, is_vocabulary
from modelmerge.checkpoint.names import matches
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.tables import TABLES, has_head, is_tied, tied_groups, tied_table
from modelmerge.errors import CheckpointError, PlanError, named

# What a module's keys end in. peft writes the magnitude without `.weight`.
_PARTS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias",
    "lora_embedding_A": "A", "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_PEFT_TIES = ("embed_tokens", "lm_head")  # names of tables that ensure_weight_tying concerns
# Layers that GPT-2 and its kin store as [in, out]; others have them under the same names as [out, in].
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True, slots=True)
class Translation:
    """An adapter as changes to a base's tensors, by the base's names.

    `excluded` are the names of keys that the base has no place for and a glob excludes, with and without peft's prefix.
    """

    changes: dict[str, TensorInfo]
    excluded: frozenset[str]
    remarks: tuple[str, ...]


def translate(expert: Checkpoint, base: Checkpoint, exclude: Sequence[str] = ()) -> Translation:
    """The adapter's tensors as changes to those of the base.

    Names may differ by words in front, as between a model and the model inside it: each group of layers must fit in
    exactly one way, shapes included. Whole modules that the base lacks, such as a new head, keep their own names. Keys
    that `exclude` matches by their own names need no place in the base.

    Raises:
        CheckpointError: Keys that belong together are missing or disagree with the config.
        PlanError: A key fits no tensor of the base, or several; or a table is trained apart from what it is tied to.
    """
    adapter, ours = expert.adapter, base.tensors
    assert adapter is not None, "the expert is an adapter"
    excluded: list[str] = []

    def excludes(key: str) -> bool:
        return any(matches(name, exclude) for name in _names_of(key))

    modules, whole = _sorted_keys(adapter, expert.tensors, excludes, excluded)
    optional = {name for name, parts in modules.items() if all(excludes(part.name) for part in parts.values())}
    places = Places(adapter, ours, tied_table(ours) if is_tied(base.config) else None)
    for name, parts in modules.items():
        if name not in optional:
            _refuse_incomplete(adapter, name, parts)
    _refuse_stacked(modules, ours)
    place_of = places.find({f"{n}.weight": _shapes(parts) for n, parts in modules.items() if n not in optional})
    changes: dict[str, TensorInfo] = {}

    def add(entries: Mapping[str, TensorInfo], key: str) -> None:
        for name in entries.keys() & changes.keys():
            raise PlanError(
                f"{adapter.file.parent}: two of its modules change '{name}' of the base; one is '{key}'",
                hint=f"the base stores tied weights once; {MERGE_FIRST}",
            )
        changes.update(entries)

    conv1d = stores_conv1d(ours)
    for name, parts in modules.items():
        try:
            if name in optional:
                _refuse_incomplete(adapter, name, parts)
                place_of |= places.find({f"{name}.weight": _shapes(parts)})
            add(_changes(adapter, name, parts, ours, place_of[f"{name}.weight"], conv1d), name)
        except (CheckpointError, PlanError):
            if name not in optional:
                raise
            excluded += (part.name for part in parts.values())
    placed: dict[str, tuple[str, TensorInfo]] = {}
    for name, info in whole.items():
        try:
            place = places.of_whole(name, info)
        except PlanError:
            if not excludes(info.name):
                raise
            place = None
        if place is not None or not excludes(info.name):
            placed[name] = place or places.table or name, info
        else:
            excluded.append(info.name)
    group_of: dict[str, tuple[str, ...]] = {}
    if _trains_head(adapter, base) or any(map(_is_head, (*placed, *(f"{name}.weight" for name in modules)))):
        group_of = tied_groups(base, {*place_of.values(), *(place for place, _ in placed.values())})
    for entries, key in _whole_changes(expert, placed, group_of, exclude):
        add(entries, key)
    remarks = [
        f"its LoRA on '{place}' changes the embedding and the head that is tied to it, as merging with peft does; "
        "unmerged, it changes one of them"
        for place in dict.fromkeys(place_of.values()) if place in group_of
    ]  # fmt: skip
    if excluded:
        more = f" and {len(excluded) - 1} more" if excluded[1:] else ""
        remarks.append(f"its '{excluded[0]}'{more} has no place in the base and is left out, as excluded")
    return Translation(changes, frozenset(name for key in excluded for name in _names_of(key)), tuple(remarks))


def _whole_changes(
    expert: Checkpoint,
    placed: Mapping[str, tuple[str, TensorInfo]],
    group_of: Mapping[str, tuple[str, ...]],
    exclude: Sequence[str],
) -> Iterator[tuple[dict[str, TensorInfo], str]]:
    """The changes that whole modules are, and the key of each; to tables that the base ties, one for all of them.

    Raises:
        PlanError: A table is trained apart from what the base ties it to.
    """
    adapter, groups = expert.adapter, defaultdict[tuple[str, ...], list[str]](list)
    assert adapter is not None, "the expert is an adapter"
    for name, (place, info) in placed.items():
        if place in group_of:
            groups[group_of[place]].append(name)
        else:
            yield {place: replace(info, name=place)}, info.name
    for group, names in groups.items():
        keys = [placed[name][1].name for name in names]
        apart = [name for name in names if is_saved(adapter, name)]
        if len(names) > 1:
            kept = doubled_tables(expert).issuperset(keys) and (len(names) >= len(group) or not apart)
        else:  # peft loads what it did not train apart into the one tensor, and ties two of these names
            ensured = adapter.config.get("ensure_weight_tying") and names[0].split(".")[-2] in _PEFT_TIES
            kept = not apart or bool(ensured)
        if not kept and not all(matches(place, exclude) for place in group):
            keep = " ".join(f"{named('exclude')} '{place}'" for place in group)
            raise PlanError(
                f"{adapter.file.parent}: '{keys[0]}' was trained apart, and the base ties embedding and head, "
                f"in '{group[0]}': a merge would lose one of them or change both",
                hint="give the base a head of its own: save it untied, with tie_word_embeddings false; or keep the "
                f"base's: {keep}",
            )
        info = placed[names[0]][1]
        yield {place: replace(info, name=place) for place in group}, info.name


def _is_head(name: str) -> bool:
    return is_vocabulary(name) and name.split(".")[-2] not in TABLES


def _trains_head(adapter: Adapter, base: Checkpoint) -> bool:
    """Whether the model that the adapter was trained on has an output head, as far as task and class tell."""
    task = adapter.config.get("task_type")
    return task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") if task else has_head(base.config)


def _names_of(key: str) -> tuple[str, str]:
    """What a key may be called: by all of its words, or without peft's prefix."""
    return key, key.removeprefix(PREFIX)


def _sorted_keys(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], excludes: Callable[[str], bool], excluded: list[str]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """The parts of each adapted module, by the module's name; and the tensors that were trained whole.

    Keys of another kind go to `excluded`, if they may.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    rest: dict[str, TensorInfo] = {}
    for key, info in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in _PARTS if name.endswith(f".{end}")), None)
        if end is None:
            rest[name] = info
            continue
        parts = modules.setdefault(name.removesuffix(f".{end}").replace(".base_layer", ""), {})
        if _PARTS[end] in parts:
            raise CheckpointError(f"{info.file}: '{key}' stands beside another key for the same module")
        parts[_PARTS[end]] = info
    whole: dict[str, TensorInfo] = {}
    for name, info in rest.items():
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        module = plain.rpartition(".")[0]
        if "lora_" in name or "trainable_tokens" in name or not module:
            if excludes(info.name):
                excluded.append(info.name)
                continue
            raise unmergeable(f"{info.file}: the key '{info.name}' cannot be merged here")
        if name.endswith(".base_layer.weight") and module in modules:
            modules[module]["origin"] = info
        else:
            whole[plain] = info
    if not modules:
        raise CheckpointError(
            f"{adapter.file.parent}: holds no LoRA weights", hint="was it saved with save_pretrained?"
        )
    return modules, whole


def _refuse_incomplete(adapter: Adapter, name: str, parts: Mapping[str, TensorInfo]) -> None:
    some = next(iter(parts.values()))
    needed = {"A", "B"} | ({"magnitude"} if adapter.config.get("use_dora") else set())
    absent = sorted(needed - parts.keys())
    if absent:
        raise CheckpointError(f"{some.file}: '{some.name}' has no matching {absent[0]} of '{name}'")
    if "magnitude" in parts and not adapter.config.get("use_dora"):
        raise CheckpointError(f"{some.file}: '{parts['magnitude'].name}' is DoRA's, and {adapter.file} has no use_dora")
    if "bias" in parts and not adapter.config.get("lora_bias"):
        raise CheckpointError(f"{some.file}: '{parts['bias'].name}' is there, and {adapter.file} has no lora_bias")
    a, b = parts["A"], parts["B"]
    for info in (a, b):
        if len(info.shape) < 2 or not info.numel:
            raise CheckpointError(
                f"{info.file}: '{info.name}' has the shape {list(info.shape)}: no factor of a LoRA",
                hint="were the shards of DeepSpeed or FSDP gathered before it was saved?",
            )
    rank = int(adapter.value_of("rank", name))
    if a.shape[0] != rank or b.shape[1] != rank or math.prod(b.shape[2:]) != 1:
        raise CheckpointError(
            f"{a.file}: '{a.name}' {list(a.shape)} and '{b.name}' {list(b.shape)} are not of rank {rank}, "
            f"which {adapter.file.name} says"
        )


def scale_of(adapter: Adapter, module: str, rank: int) -> float:
    """A module's factor s: alpha over the rank, or over its root."""
    return adapter.value_of("alpha", module) / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)


def _shapes(parts: Mapping[str, TensorInfo]) -> tuple[tuple[int, ...], ...]:
    """The shapes that the changed weight may have."""
    a, b = parts["A"], parts["B"]
    if _is_embedding(parts):
        return ((a.shape[1], b.shape[0]),)
    straight = (b.shape[0], *a.shape[1:])
    return (straight, straight[::-1]) if len(straight) == 2 else (straight,)


def _is_embedding(parts: Mapping[str, TensorInfo]) -> bool:
    return parts["A"].name.endswith("lora_embedding_A")


def _refuse_stacked(modules: Mapping[str, Mapping[str, TensorInfo]], base: Mapping[str, TensorInfo]) -> None:
    """Refuse `nn.MultiheadAttention`: peft (0.21) adds the change to its output projection twice, running and merging.

    An adapter that was trained so is right only so, and one of another version need not be.
    """
    joint = {name.split(".")[-2] for name in base if name.endswith(".in_proj_weight")}
    for name, parts in modules.items():
        if name.rpartition(".")[2] in joint:
            why = "is an nn.MultiheadAttention, whose LoRA cannot be merged here"
            raise unmergeable(f"{parts['A'].file}: '{name}' {why}")


def stores_conv1d(base: Mapping[str, TensorInfo]) -> bool | None:
    """Whether the base stores GPT-2's layers as [in, out], by a bias that tells; None where nothing tells."""
    for name, info in base.items():
        module, _, end = name.rpartition(".")
        bias = base.get(f"{module}.bias")
        if end == "weight" and module.rpartition(".")[2] in CONV1D and bias and len(info.shape) == 2:
            m, n = info.shape
            if m != n and bias.shape in ((m,), (n,)):
                return bias.shape == (n,)
    return None


def _changes(
    adapter: Adapter,
    module: str,
    parts: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    place: str,
    conv1d: bool | None,
) -> dict[str, TensorInfo]:
    """A module's LoRA as changes to the base's tensor at `place` and to its bias."""
    changes = {place: _change(adapter, module, parts, base[place], conv1d)}
    if "bias" in parts:
        bias = f"{place.removesuffix('weight')}bias"
        if bias not in base or base[bias].shape != parts["bias"].shape:
            raise PlanError(f"{parts['bias'].file}: '{parts['bias'].name}' has no bias in the base to be added to")
        changes[bias] = replace(
            parts["bias"], name=bias, change=Change(scale=scale_of(adapter, module, parts["A"].shape[0]))
        )
    return changes


def _change(
    adapter: Adapter, module: str, parts: Mapping[str, TensorInfo], target: TensorInfo, conv1d: bool | None
) -> TensorInfo:
    """A module's LoRA as a change to the base's tensor."""
    a, b = parts["A"], parts["B"]
    shapes = _shapes(parts)
    if target.shape not in shapes:
        raise PlanError(
            f"{a.file}: '{b.name}' times '{a.name}' makes {list(shapes[0])}, "
            f"but the base's '{target.name}' is {list(target.shape)}",
            hint="is this an adapter of this base? Convolutions in groups cannot be merged, by peft neither",
        )
    transposed = _is_embedding(parts) or target.shape != shapes[0]
    if not transposed and len(shapes) == 2 and shapes[0] == shapes[1]:  # square: the shape does not tell
        from_bias = conv1d if module.rpartition(".")[2] in CONV1D else None
        transposed = bool(adapter.config.get("fan_in_fan_out")) if from_bias is None else from_bias
    left, right = (a, b) if transposed else (b, a)
    origin, magnitude = parts.get("origin"), parts.get("magnitude")
    if origin is not None and origin.shape != target.shape:
        raise PlanError(
            f"{origin.file}: '{origin.name}' is {list(origin.shape)}, but the base's '{target.name}' is "
            f"{list(target.shape)}",
            hint="was the vocabulary changed in training? " + MERGE_FIRST,
        )
    if magnitude is not None and magnitude.numel != target.shape[1 if transposed else 0]:
        raise PlanError(f"{a.file}: '{magnitude.name}' does not fit the base's '{target.name}' {list(target.shape)}")
    change = Change(scale_of(adapter, module, a.shape[0]), (left, right), transposed, origin, magnitude)
    nbytes = sum(part.nbytes for name, part in parts.items() if name != "bias")
    return TensorInfo(target.name, a.dtype, target.shape, a.file, a.start, nbytes, change=change)
