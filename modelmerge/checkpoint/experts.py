"""Mixtures of experts: a layer's experts one by one, or stacked in one tensor, made into the base's layout.

One by one: `experts.3.gate_proj.weight` [I, H], `up_proj` [I, H] and `down_proj` [H, I]; Mixtral's w1, w3 and w2 are
the same. Stacked: `experts.gate_up_proj` [E, 2 I, H] and `experts.down_proj` [E, H, I]; some families store both with
their last two axes exchanged. Families with no gate have up and down alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from modelmerge.checkpoint.header import TensorInfo, joined, matrix, rows, transposed

Tensors = dict[str, TensorInfo]
# What an expert's matrices are called one by one: gate, up, down. A test compares them with transformers' own mapping.
STYLES = (
    ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    ("w1.weight", "w3.weight", "w2.weight"),
    ("fc1.weight", "fc3.weight", "fc2.weight"),
)
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"  # what the stacks are called
_SINGLE = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+\.weight)")
_MIXTRAL = re.compile(r"\bblock_sparse_moe\.(?=experts\.\d|gate\.)")
_STACK = re.compile(rf"(.*\bexperts)\.({GATE_UP}|{UP}|{DOWN})(\.weight)?")


def in_memory(name: str) -> str:
    """What the stack of an expert's matrix is called in memory, for Mixtral's names too; else the name itself."""
    name = _MIXTRAL.sub("mlp.", name)
    match = _SINGLE.fullmatch(name)
    place = next((style.index(match[3]) for style in STYLES if match[3] in style), None) if match else None
    return name if match is None or place is None else f"{match[1]}.{(GATE_UP, GATE_UP, DOWN)[place]}"


def in_layout_of(ours: Mapping[str, TensorInfo], theirs: Mapping[str, TensorInfo]) -> tuple[Tensors, list[str]]:
    """A model's tensors with its experts stacked as another's are, and a remark where that changed anything."""
    tensors = dict(theirs)
    ours, theirs = ({name: info for name, info in side.items() if "experts." in name} for side in (ours, theirs))
    single, stacked = _singles(ours), _stacks(ours)
    their_single, their_stacked = _singles(theirs), _stacks(theirs)
    count = 0
    if stacked and their_single:
        tensors, origins = stack_all(tensors, _end(stacked))
        count = len(origins)
    elif single and their_stacked:
        style = _style(single)
        for front, stacks in their_stacked.items():
            for info in stacks.values():
                del tensors[info.name]
                count += 1
            tensors |= _singles_of(front, stacks, style)
    elif stacked and their_stacked:
        turned = _is_turned(next(iter(stacked.values())))
        for stacks in their_stacked.values():
            if turned is not None and _is_turned(stacks) is (not turned):
                for info in stacks.values():
                    tensors[info.name] = transposed(info)
                    count += 1
    elif single and their_single and _style(single) != _style(their_single):
        words = dict(zip(_style(their_single), _style(single), strict=True))
        for front, experts in their_single.items():
            for number, matrices in experts.items():
                for word, info in matrices.items():
                    if word in words:
                        name = f"{front}.{number}.{words[word]}"
                        tensors[name] = replace(tensors.pop(info.name), name=name)
                        count += 1
    return tensors, [f"{count} weights of its experts are laid out as the base's are"] if count else []


def _singles(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[int, Tensors]]:
    """By what stands in front and by the expert's number, its matrices."""
    experts: dict[str, dict[int, Tensors]] = defaultdict(lambda: defaultdict(dict))
    for name, info in tensors.items():
        match = _SINGLE.fullmatch(name)
        if match and len(info.shape) == 2:
            experts[match[1]][int(match[2])][match[3]] = info
    return experts


def _stacks(tensors: Mapping[str, TensorInfo]) -> dict[str, Tensors]:
    """By what stands in front, the stacks of a layer's experts."""
    stacks: dict[str, Tensors] = defaultdict(dict)
    for name, info in tensors.items():
        match = _STACK.fullmatch(name)
        if match and len(info.shape) == 3:
            stacks[match[1]][match[2]] = info
    return stacks


def _style(experts: Mapping[str, Mapping[int, Tensors]]) -> tuple[str, str, str]:
    matrices = next(iter(next(iter(experts.values())).values()))
    return max(STYLES, key=lambda style: sum(word in matrices for word in style))


def _end(stacks: Mapping[str, Tensors]) -> str:
    """What the stacks' names end in: some have a `.weight`."""
    name = next(iter(next(iter(stacks.values())).values())).name
    return ".weight" if name.endswith(".weight") else ""


def _stack_of(front: str, experts: Mapping[int, Tensors], style: tuple[str, str, str], end: str) -> Tensors:
    """The stacks of a layer's experts; none where they are not all there, or not alike."""
    gate, up, down = style
    if sorted(experts) != list(range(len(experts))):
        return {}
    stacks: Tensors = {}
    halves = [gate, up] if all(gate in each for each in experts.values()) else [up]
    for word, parts in ((GATE_UP if len(halves) == 2 else UP, halves), (DOWN, [down])):
        each = [[experts[number].get(part) for part in parts] for number in range(len(experts))]
        blocks = [part for matrices in each for part in matrices if part is not None]
        if len(blocks) < len(parts) * len(experts) or len({(block.shape, block.dtype) for block in blocks}) > 1:
            return {}
        m, n = blocks[0].shape
        name = f"{front}.{word}{end}"
        stacks[name] = joined(name, (len(experts), len(parts) * m, n), blocks)
    return stacks


def _singles_of(front: str, stacks: Tensors, style: tuple[str, str, str]) -> Tensors:
    """The matrices of a layer's stacks one by one."""
    gate, up, down = style
    tensors: Tensors = {}
    turned = _is_turned(stacks)
    for word, stack in stacks.items():
        for number in range(stack.shape[0]):
            whole = matrix(stack, number)
            whole = transposed(whole) if turned else whole
            half = whole.shape[0] // 2
            parts = ((gate, rows(whole, 0, half)), (up, rows(whole, half, 2 * half)))
            for part, info in parts if word == GATE_UP else ((up if word == UP else down, whole),):
                name = f"{front}.{number}.{part}"
                tensors[name] = replace(info, name=name)
    return tensors


def _is_turned(stacks: Tensors) -> bool | None:
    """Whether a layer's stacks are stored with their last two axes exchanged; None where the shapes do not tell."""
    if GATE_UP not in stacks or DOWN not in stacks:
        return None
    (_, a, b), (_, c, d) = stacks[GATE_UP].shape, stacks[DOWN].shape
    straight, turned = (a, b) == (2 * d, c), (b, a) == (2 * c, d)
    return None if straight == turned else turned


def stack_all(
    tensors: Mapping[str, TensorInfo], end: str = ""
) -> tuple[Tensors, dict[str, list[tuple[str, int, int, int]]]]:
    """A model's tensors with its experts stacked, and by stack what it was made of.

    That is, of each part: its name, the expert's number, and its first and last row in the expert's matrix. The names
    of the stacks have `end` at their end. What else experts have, such as biases, stays.
    """
    view = dict(tensors)
    origins: dict[str, list[tuple[str, int, int, int]]] = {}
    single = _singles(tensors)
    for front, experts in single.items():
        style = _style(single)
        stacks = _stack_of(front, experts, style, end)
        for name, stack in stacks.items():
            words = {GATE_UP: style[:2], UP: style[1:2], DOWN: style[2:]}[name.removesuffix(end).rpartition(".")[2]]
            height = stack.shape[1] // len(words)
            origins[name] = [
                (experts[number][word].name, number, place * height, (place + 1) * height)
                for number in sorted(experts)
                for place, word in enumerate(words)
            ]
        for part in (origin[0] for name in stacks for origin in origins[name]):
            del view[part]
        view |= stacks
    return view, origins
