"""Where in a base the modules of a LoRA file lie, whichever layout either of them has.

A LoRA of a model of images speaks of one of its two layouts, and so do the files of the model itself. A module may be
rows of the base's tensor, as `to_q` is of `qkv`, or rows of several of them, the other way round.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from modelmerge.checkpoint.diffusion import networks
from modelmerge.checkpoint.lora_keys import Module
from modelmerge.checkpoint.reader import Checkpoint

DENOISER, TEXT, ANY = "denoiser", "text", ""  # a component's folder, or one of these where that is not known
# What stands before a module's name, and the component that it means.
_FRONTS = {
    "lora_unet_": DENOISER, "lora_transformer_": DENOISER, "unet.": DENOISER, "transformer.": DENOISER,
    "diffusion_model.": DENOISER, "model.diffusion_model.": DENOISER, "transformer_2.": "transformer_2",
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2", "text_encoder_2.": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "text_encoder_3.": "text_encoder_3",
    "cond_stage_model.transformer.": "text_encoder", "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder", "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2", "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2", "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "lycoris_": ANY,
}  # fmt: skip
# Where else to look for what is not in a component: T5 is FLUX's second text encoder, and SD3's third.
_NEXT = {"text_encoder_3": ("text_encoder_2", TEXT), "text_encoder_2": (TEXT,), "text_encoder": (TEXT,)}
_TEXTS = ("clip", "t5")


@dataclass(frozen=True, slots=True)
class Spot:
    """Where rows of a tensor that a LoRA speaks of lie in the base.

    Args:
        name: The base's tensor.
        first: The first row there.
        begin: The first row of what the LoRA speaks of.
        rows: So many; None for all.
        transposed: The base's tensor is the transpose.
    """

    name: str
    first: int = 0
    begin: int = 0
    rows: int | None = None
    transposed: bool = False


Ends = dict[str, list[Spot]]  # a module's weight and bias


class Places:
    """The base's tensors by the names that modules of LoRA files have in any of their formats."""

    def __init__(self, base: Checkpoint) -> None:
        # By component and name without dots, the modules of that name by their own: mostly one.
        self._modules: dict[tuple[str, str], dict[str, Ends]] = {}
        known = networks(base.tensors)
        self.of_images = bool(known) or any("_class_name" in part.config for part in base.components.values())
        covered: set[str] = set()
        for network in known:
            component = _component(network.folder, network.kind)
            for name, pieces in network.pieces.items():
                covered.add(name)
                self._add(component, name.removeprefix(network.prefix), Spot(name))
                for piece in pieces:
                    if network.single:
                        other = piece.diffusers.partition("/")[2]
                        spot = Spot(name, piece.single_first, piece.diffusers_first, piece.rows, piece.transposed)
                    else:
                        other = _without_front(piece.single)[1]
                        spot = Spot(name, piece.diffusers_first, piece.single_first, piece.rows, piece.transposed)
                    if other != name.removeprefix(network.prefix):
                        self._add(component, other, spot)
        for name in base.tensors.keys() - covered:
            folder, slash, inner = name.rpartition("/")
            if slash:
                self._add(_component(folder, ""), inner, Spot(name))
            else:
                component, inner = _without_front(name)
                self._add(component, inner, Spot(name))

    def find(self, module: Module) -> Ends | None:
        """Where a module's weight and bias lie; None where the base has no such module."""
        for name in (module.name, *module.aliases):
            for component, inner in _meanings(name):
                modules = self._modules.get((component, _flat(inner)), {})
                if len(modules) == 1:
                    return next(iter(modules.values()))
                if inner in modules:
                    return modules[inner]
        return None

    def near(self, module: Module) -> str | None:
        """A tensor of the base with a name like the module's."""
        flat = {name: ends for (_, name), modules in self._modules.items() for ends in modules.values()}
        _, inner = _without_front(module.name)
        names = difflib.get_close_matches(_flat(inner), flat, n=1, cutoff=0.5)
        return next(iter(flat[names[0]].values()))[0].name if names else None

    def _add(self, component: str, name: str, spot: Spot) -> None:
        module, _, end = name.rpartition(".")
        if end not in ("weight", "bias"):
            module, end = name, "weight"
        modules = self._modules.setdefault((component, _flat(module)), {})
        modules.setdefault(module, {}).setdefault(end, []).append(spot)


def known_front(name: str) -> str:
    """What stands before a module's name, such as `lora_te1_`; empty where nothing is known to."""
    return max((front for front in _FRONTS if name.startswith(front)), key=len, default="")


def _component(folder: str, kind: str) -> str:
    if folder in ("unet", "transformer"):
        return DENOISER
    return folder or (TEXT if kind in _TEXTS else "vae" if "vae" in kind else DENOISER)


def _without_front(name: str) -> tuple[str, str]:
    """The component that a name's first words mean, and the rest of it."""
    front = known_front(name)
    return _FRONTS.get(front, ANY), name[len(front) :]


def _meanings(name: str) -> Iterator[tuple[str, str]]:
    """The components that a name may mean, the likeliest first, with the name in each."""
    component, inner = _without_front(name)
    for each in (component, *_NEXT.get(component, ()), ANY):
        yield each, inner
    if component == ANY or inner != name:
        yield from ((each, text) for text in dict.fromkeys((inner, name)) for each in (DENOISER, "text_encoder", TEXT))


def _flat(name: str) -> str:
    # CLIP's text encoders have a `text_model` around all of their names, or none.
    return name.replace(".", "_").removeprefix("text_model_")
