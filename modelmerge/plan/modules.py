"""Modules of models, with a list of layers each: which tensors are in one, and which lie after its layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

from modelmerge.checkpoint.configs import Config
from modelmerge.checkpoint.layer_config import COUNTS
from modelmerge.checkpoint.matching import is_head
from modelmerge.errors import PlanError
from modelmerge.plan.overrides import layer_of, layers

# Words of lists of layers that are no language model's; a `vocab_projector` is a head.
TOWERS = re.compile(r"vision|visual|audio|image|speech|(?<!b_)projector|connector|merger|resampler|abstractor|\bmtp\b")
# What comes after the layers, but for heads: final norms, and what classifies; heads of several weights, too.
_AFTER = re.compile(
    r"(^|\.)(((final_?|output_|out_|post_|embedding_)?(layer_?)?norm(_f|_out|_post)?|ln_f|ln_out|score|qa_outputs"
    r"|project_out|out_proj|multi_choice_classifier|summary)\.[^.]+$|((lm_)?head|pooler|cls|(pre_)?classifier|vocab_\w+"
    r"|output_layer|(gener|discrimin)ator_\w+|vision_adapter)\.)|^decoder\.[^.]+$"
)
_BEFORE = re.compile(r"emb(?!edding_norm\.)|wte|wpe|pre_?la?y|merger")
# Modules by mergekit's names, of the architectures that it has tables of, and of all with an encoder and a decoder.
_NAMES = {
    "text_decoder": r"^(?!.*(vision|visual|multi_modal_projector))",
    "multi_modal_projector": r"multi_modal_projector|(^|\.)visual\.(merger|deepstack_merger)",
    **dict.fromkeys(("vision_tower", "vision_model"), r"vision_(tower|model)|(^|\.)visual\.(?!(deepstack_)?merger)"),
    **{module: rf"^(model\.)?{module}\." for module in ("encoder", "decoder")},
    "shared": r"^(shared|lm_head)\.",
}


def holds(module: str, tensors: Collection[str]) -> Callable[[str], bool]:
    """Whether a tensor is in a module of a model that has these tensors, by its name.

    A module has mergekit's name, or goes by what the names of its tensors begin with; `default` is what lies outside
    layers where there are several lists of them, and all else.

    Raises:
        PlanError: None of the tensors is.
    """
    lists = layers(tensors)
    if module == "default":
        return lambda tensor: len(lists) < 2 or layer_of(tensor) is None
    # What is `model.language_model.` in memory may be `language_model.model.` in files.
    stored = [module.removeprefix("model."), re.sub(r"^model\.(language_model)", r"\1.model", module)]
    for front in [_NAMES[module]] if module in _NAMES else [rf"^{re.escape(name)}\." for name in (module, *stored)]:
        inside = re.compile(front).search
        if any(map(inside, tensors)):
            return lambda tensor: inside(tensor) is not None
    raise PlanError(f"no tensor of the models is in a module '{module}'",
                    hint=f"name one of: default, {', '.join(lists)}; or {', '.join(_NAMES)}")  # fmt: skip


def list_of_layers(names: Iterable[str], config: Config, where: str, total: int | None = None) -> str:
    """What stands before the numbers of a model's layers, as `model.layers`; of several lists, the language model's.

    Nothing where there are no numbered layers.

    Args:
        names: The names of its tensors, or of those of a module.
        config: Its config, where that is to say which list it is.
        where: What the model is called.
        total: The number of layers, where that is to say it.

    Raises:
        PlanError: There is no one such list.
    """
    count = layers(names)
    lists = {prefix: n for prefix, n in count.items() if not TOWERS.search(prefix)} or count
    two = any("encoder" in prefix for prefix in lists) and any("decoder" in prefix for prefix in lists)
    said = [part.get(key) for part in (config, *config.values()) if isinstance(part, dict) for key in COUNTS]
    fitting = {prefix: n for prefix, n in lists.items() if n in (*said, total)}
    if len(lists) > 1 and not two and len(fitting) == 1:
        lists = fitting
    if len(lists) > 1:
        some = ", ".join(f"{prefix} ({n})" for prefix, n in count.items())
        raise PlanError(
            f"{where} has several lists of layers: {some}",
            hint="name the module whose layers they are, such as 'encoder: 0-3'",
        )
    return next(iter(lists), "")


def is_after(name: str, prefix: str) -> bool:
    """Whether a tensor comes after the layers whose names begin with the prefix, by its own name."""
    if TOWERS.search(name) and not TOWERS.search(prefix):  # a tower has an end of its own, and comes as a whole
        return False
    return is_head(name) or (_AFTER.search(name) is not None and not _BEFORE.search(name))
