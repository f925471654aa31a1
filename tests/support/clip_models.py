"""A small real CLIP, and images for it: coloured squares on noise, which it learns to tell apart in seconds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLOURS = {
    "red": (220, 30, 30), "green_leaf": (30, 200, 40), "blue": (40, 60, 230), "yellow": (230, 220, 40),
    "violet": (170, 40, 200), "white": (235, 235, 235),
}  # fmt: skip
SIDE = 16
STEPS, BATCH = 60, 48


def image(colour: str, generator: torch.Generator) -> Any:
    """A square of the colour somewhere on a dark, noisy ground: a PIL image, larger than the model takes."""
    from PIL import Image

    pixels = torch.randint(0, 90, (24, 24, 3), generator=generator, dtype=torch.uint8)
    top, left = torch.randint(0, 12, (2,), generator=generator).tolist()
    pixels[top : top + 12, left : left + 12] = torch.tensor(COLOURS[colour], dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def tokenizer() -> Any:
    """CLIP's tokenizer, with bytes for a vocabulary."""
    from transformers import CLIPTokenizer

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def processor() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def untrained(seed: int = 0, longest: int = 40) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    text = {"hidden_size": 24, "intermediate_size": 48, "vocab_size": 514, "max_position_embeddings": longest, **layers}
    text |= {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {"hidden_size": 32, "intermediate_size": 64, "image_size": SIDE, "patch_size": 4, **layers}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


@functools.cache
def trained() -> Any:
    """A CLIP that tells the colours apart; one for all, not to be changed."""
    model, generator = untrained(), torch.Generator().manual_seed(1)
    names = list(COLOURS)
    prompts = tokenizer()([f"a photo of a {n.replace('_', ' ')}." for n in names], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixels = make_pixels(names * 40, generator)
    labels = torch.arange(len(names)).repeat(40)
    for _ in range(STEPS):
        drawn = torch.randint(0, len(labels), (BATCH,), generator=generator)
        logits = model(**prompts, pixel_values=pixels[drawn]).logits_per_image
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels[drawn]).backward()
        optimizer.step()
    return model.eval()


def make_pixels(names: list[str], generator: torch.Generator) -> Tensor:
    return processor()([image(name, generator) for name in names], return_tensors="pt")["pixel_values"]


def save(model: Any, directory: Path) -> Path:
    """As a CLIP on the Hub lies."""
    for part in (model, tokenizer(), processor()):
        part.save_pretrained(directory)
    return directory


def save_vision(model: Any, directory: Path, *, prefixed: bool = True) -> Path:
    """The vision tower alone, its tensors named as older or as newer versions of transformers do."""
    from safetensors.torch import save_file

    state = {
        name if prefixed else name.removeprefix("vision_model."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith("vision_model.")
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.vision_config.save_pretrained(directory)
    return directory


def folder(root: Path, *, each: int = 8, seed: int = 2, leave_out: tuple[str, ...] = ()) -> Path:
    """Images in folders of their classes' names, as PNG."""
    generator = torch.Generator().manual_seed(seed)
    for name in COLOURS:
        if name not in leave_out:
            (root / name).mkdir(parents=True)
            for i in range(each):
                image(name, generator).save(root / name / f"{i}.png")
    return root
