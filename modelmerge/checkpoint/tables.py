"""Embeddings and output heads by their names, and what ties them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Set
from typing import Any

from modelmerge.checkpoint.header import TensorInfo
from modelmerge.checkpoint.matching import is_vocabulary, twins
from modelmerge.checkpoint.reader import Checkpoint

# Input embeddings, and output heads that often are the same tensor.
TABLES = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output", "proj_out")


def tied_table(base: Mapping[str, TensorInfo]) -> str | None:
    """The input embedding that is the output head as well, where the base stores one tensor for both."""
    modules = {name.rpartition(".")[0].rpartition(".")[2]: name for name in base if name.endswith(".weight")}
    tables = [name for module, name in modules.items() if module in TABLES]
    return tables[0] if len(tables) == 1 and not modules.keys() & set(HEADS) else None


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a model with that config has its embedding as its head, where the weights do not say otherwise."""
    for each in (config, config.get("text_config")):
        answer = each.get("tie_word_embeddings") if isinstance(each, dict) else None
        if isinstance(answer, bool):
            return answer
    return True


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether a model with that config has an output head, by its class; one that names no class may have one."""
    name = str((config.get("architectures") or [""])[0])
    return bool(re.search(r"CausalLM|LMHead|ConditionalGeneration|MaskedLM|PreTraining|^$", name))


def tied_groups(base: Checkpoint, places: Set[str]) -> dict[str, tuple[str, ...]]:
    """Where one of these tensors is tied: by name, the tensors of the base that are tied to one another.

    That is one where the base stores its table once.
    """
    weights = [name for name in base.tensors if is_vocabulary(name) and name.endswith("weight")]
    if not is_tied(base.config) or not places & set(weights):
        return {}
    table = tied_table(base.tensors)
    if table is not None:
        return {table: (table,)}
    root_of, groups = twins(base, ()), defaultdict[str, list[str]](list)
    for name in weights:
        groups[root_of.get(name, name)].append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}
