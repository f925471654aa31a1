"""A merge as a PEFT adapter: which tensors become factors, which are kept whole, and the files that peft reads.

Weights of linear layers become LoRA factors; their biases go along whole (`bias: lora_only`), and so do modules of any
other kind that changed: norms, convolutions, tables (`modules_to_save`). peft has no place for parameters that are no
module's weight or bias, nor for an embedding that is stored once and used under several names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modelmerge.checkpoint.adapter import CONV1D, stores_conv1d
from modelmerge.checkpoint.adapter_config import PREFIX, WEIGHTS
from modelmerge.checkpoint.components import Component
from modelmerge.checkpoint.header import TensorInfo, is_buffer
from modelmerge.checkpoint.layout import Entry, Layout, lay_out
from modelmerge.checkpoint.matching import doubled_tables
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.tables import HEADS, has_head, is_tied, tied_table
from modelmerge.errors import OutputError, UsageError, named

Kind = Literal["low rank", "bias", "whole", "no place"]
# What a model with such a class is trained for, in peft's words.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
# Heads that peft keeps whole with such a task, whatever the config says.
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """How small the factors shall be: a rank, or the share of the squared norm that they keep."""

    rank: int | None = None
    energy: float | None = None


def parse_size(text: float | str) -> Size:
    """What `as_lora` says: an integer is a rank, a number below 1 a share.

    Raises:
        UsageError: It is neither.
    """
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if 0 < number < 1:
        return Size(energy=number)
    if number >= 1 and number == int(number):
        return Size(rank=int(number))
    rule = f"must be a rank (1, 2, ...) or a share of the squared norm between 0 and 1, not '{text}'"
    raise UsageError(rule, option="as_lora", hint="write it like 16 or 0.95")


@dataclass(frozen=True, slots=True)
class Role:
    """What becomes of a tensor if the merge changes it.

    `module` is what peft adapts or saves; `transposed`: a weight that is stored as [in, out]; `always`: kept anyway.
    """

    kind: Kind
    module: str
    transposed: bool = False
    always: bool = False


def roles(base: Checkpoint) -> dict[str, Role]:
    """What becomes of each of the base's tensors."""
    tensors = base.tensors
    heads = _HEADS_OF_TASKS.get(_task(base) or "", ())
    linear = {name.rpartition(".")[0] for name in tensors if _is_linear(name, tensors[name])}
    conv1d = bool(stores_conv1d(tensors))
    shared = _shared_tables(base)
    table = {}
    for name in tensors:
        module, _, end = name.rpartition(".")
        last = module.rpartition(".")[2]
        head = next((path for path in _paths(module) if heads and path.endswith(heads)), None)
        if head is not None:
            table[name] = Role("whole", head, always=True)
            continue
        kind: Kind = "whole"
        if not module or name in shared or (end not in ("weight", "bias") and not is_buffer(tensors[name])):
            kind = "no place"
        elif module in linear:
            kind = "low rank" if end == "weight" else "bias"
        table[name] = Role(kind, module, kind == "low rank" and conv1d and last in CONV1D)
    return table


def _task(base: Checkpoint) -> str | None:
    architecture = str((base.config.get("architectures") or [""])[0])
    return next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)


def _paths(module: str) -> list[str]:
    """A module and those it lies in, from the outermost on."""
    words = module.split(".")
    return [".".join(words[: i + 1]) for i in range(len(words))]


def _is_linear(name: str, info: TensorInfo) -> bool:
    words = name.lower().split(".")
    if len(info.shape) != 2 or not info.numel or words[-1] != "weight" or len(words) < 2:
        return False
    # Tables by the names the field gives them. An output head is a linear layer, even one called embed_out.
    table = re.search(r"embed|wte|wpe|shared|relative_attention_bias|position_encoding|token_type", words[-2])
    return words[-2] in HEADS or not table


def _shared_tables(base: Checkpoint) -> set[str]:
    """Embeddings that the model uses under several names, whether the base stores one or both."""
    tied = tied_table(base.tensors)
    shared = {name for name in base.tensors if name.split(".")[-2:] == ["shared", "weight"]} | doubled_tables(base)
    if tied is not None and is_tied(base.config) and has_head(base.config):
        shared.add(tied)
    return shared


def refuse_change(tensor: str) -> OutputError:
    """The error for a tensor that changed and has no place in an adapter."""
    return OutputError(
        f"the merge changes '{tensor}', which a PEFT adapter has no place for: it is used under several names, or is "
        "no module's weight or bias",
        hint=f"keep the base's: {named('exclude')} '{tensor}'; or write a whole checkpoint, without {named('as_lora')}",
    )


def kept_whole(changed: Iterable[str], table: Mapping[str, Role]) -> dict[str, list[str]]:
    """The modules that have to be saved because they changed, each with all its tensors.

    peft saves every module whose name ends as one in its list does: those come along, changed or not.

    Raises:
        OutputError: Such another module is a linear layer.
    """
    changed = set(changed)
    ends = tuple({r.module for name, r in table.items() if r.always or (name in changed and r.kind == "whole")})
    modules: dict[str, list[str]] = {}
    for name, role in table.items():
        *around, module = _paths(role.module)
        if ends and any(path.endswith(ends) for path in (*around, module)):
            if role.kind != "whole" or any(path.endswith(ends) for path in around):
                raise OutputError(
                    f"peft saves every module whose name ends like one that changed, and cannot save '{module}'",
                    hint=f"keep the base's norms and biases: {named('exclude')} '{name.rpartition('.')[0]}*'",
                )
            modules.setdefault(module, []).append(name)
    return modules


def key(role: Role, tensor: str, part: str) -> str:
    """The key of a part of a tensor: A or B of a low-rank one, or the whole."""
    if role.kind == "low rank":
        return f"{PREFIX}{role.module}.lora_{part}.weight"
    return f"{PREFIX}{role.module}.base_layer.bias" if role.kind == "bias" else PREFIX + tensor


def lay_out_adapter(entries: Mapping[str, Entry]) -> Layout:
    """The one file that peft reads, whatever its size."""
    return lay_out(entries, None, component=Component(filename=WEIGHTS, alone=True))


def config(
    base: Checkpoint, ranks: Mapping[str, int], saved: Iterable[str], table: Mapping[str, Role], *, biases: bool
) -> bytes:
    """The adapter_config.json of factors with these ranks, by tensor, whose product needs no scaling: alpha = r.

    Args:
        base: The base.
        ranks: Rank by tensor.
        saved: The modules that are saved whole.
        table: What became of each tensor.
        biases: Biases of the adapted layers are there.
    """
    by_module = {table[name].module: rank for name, rank in ranks.items()}
    usual = Counter(by_module.values()).most_common(1)[0][0]
    odd = {_pattern(module, by_module): rank for module, rank in by_module.items() if rank != usual}
    remote = base.reference.repository
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": remote.name if remote is not None else str(base.reference.path),
        "revision": remote.commit if remote is not None else None,
        "task_type": _task(base),
        "inference_mode": True,
        "r": usual, "lora_alpha": usual, "rank_pattern": odd, "alpha_pattern": odd,
        "target_modules": _targets(by_module, {role.module for role in table.values()}),
        "modules_to_save": sorted(saved) or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(table[name].transposed for name in ranks),
        "lora_dropout": 0.0, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    return (json.dumps(content, indent=2) + "\n").encode()


def _pattern(module: str, modules: Iterable[str]) -> str:
    """A pattern for one module's rank: its name, made exact where it would catch another's end."""
    matches = [other for other in modules if re.match(rf"(.*\.)?({module})$", other)]
    return module if len(matches) == 1 else f"^{re.escape(module)}"


def _targets(linear: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The names for peft to look for: last words where all modules that end so are meant, whole names elsewhere."""
    linear = set(linear)
    others = {path.rpartition(".")[2] for module in modules for path in _paths(module) if path not in linear}
    return sorted({last if (last := m.rpartition(".")[2]) not in others | set(HEADS) else m for m in linear})
