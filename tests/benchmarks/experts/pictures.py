"""Tasks on pictures of 16 x 16 pixels in colour, from what scikit-learn and matplotlib carry and from formulas.

A task draws pictures [n, 3, 16, 16] and labels [n]. `strain`, from 0 to 1, is how far pictures are turned, moved,
blurred by noise and oddly lit. Photographs, elevations and handwritten digits have parts of their own for training,
validation and the test; all else is drawn anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SIZE = 16
_DRAWN = 32  # pixels a side of a glyph before it is turned and made smaller
Draw = Callable[[torch.Generator, int, str, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """How pictures of a task are drawn: (order, how many, part, strain) -> pictures and labels."""

    labels: int
    draw: Draw


def _uniform(order: torch.Generator, n: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=order)


def _labels(order: torch.Generator, n: int, labels: int) -> Tensor:
    return torch.randint(labels, (n,), generator=order)


def _moved(ink: Tensor, order: torch.Generator, strain: float, turn: float = 0.35) -> Tensor:
    """Pictures [n, s, s] -> [n, 16, 16], turned by up to `turn` radians, moved and resized."""
    n = len(ink)
    angle = _uniform(order, n, -turn, turn) * strain
    zoom = 1.15 + _uniform(order, n, -0.1, 0.6) * strain
    shift = _uniform(order, 2 * n, -0.3, 0.3).view(n, 2) * strain
    sine, cosine = angle.sin() * zoom, angle.cos() * zoom
    turned = torch.stack([torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(turned, [n, 1, SIZE, SIZE], align_corners=False)
    return functional.grid_sample(ink[:, None], grid, align_corners=False)[:, 0]


def _lit(ink: Tensor, order: torch.Generator, strain: float, noise: float) -> Tensor:
    """Ink [n, 16, 16] on a ground, both of a random colour, under noise -> pictures [n, 3, 16, 16]."""
    n = len(ink)
    ground = 0.4 * torch.rand(n, 3, 1, 1, generator=order)
    colour = ground + 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=order)
    return _noisy(ground + ink[:, None] * (colour - ground), order, strain * noise)


def _noisy(pictures: Tensor, order: torch.Generator, noise: float) -> Tensor:
    return pictures + noise * torch.randn(pictures.shape, generator=order)


# --- glyphs ----------------------------------------------------------------------------------------------------------

_FACES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
_CUTS = {"DejaVuSerif": ("", "-Bold", "-Italic")}


@functools.cache
def _glyphs(characters: str) -> Tensor:
    """[characters, faces and cuts, 32, 32]: ink from 0 to 1, each glyph as large as its box allows."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn = []
    for face in _FACES:
        for cut in _CUTS.get(face, ("", "-Bold", "-Oblique")):
            font = ImageFont.truetype(str(folder / f"{face}{cut}.ttf"), 26)
            for character in characters:
                picture = Image.new("L", (_DRAWN, _DRAWN))
                ImageDraw.Draw(picture).text((_DRAWN / 2, _DRAWN / 2), character, 255, font, anchor="mm")
                drawn.append(np.asarray(picture, dtype=np.float32) / 255)
    return torch.tensor(np.stack(drawn)).view(-1, len(characters), _DRAWN, _DRAWN).transpose(0, 1)


def _letters(characters: str, noise: float) -> Task:
    """Which of the characters, in whatever face."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        glyphs = _glyphs(characters)
        labels = _labels(order, n, len(characters))
        ink = glyphs[labels, _labels(order, n, glyphs.shape[1])]
        return _lit(_moved(ink, order, strain), order, strain, noise), labels

    return Task(len(characters), draw)


def _styles(characters: str, noise: float) -> Task:
    """Which of nine faces and cuts, in whatever character."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        glyphs = _glyphs(characters)
        labels = _labels(order, n, glyphs.shape[1])
        ink = glyphs[_labels(order, n, len(characters)), labels]
        return _lit(_moved(ink, order, strain, 0.1), order, strain, noise), labels

    return Task(9, draw)


def _scripts(scripts: Sequence[str], noise: float) -> Task:
    """Which of the scripts."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, len(scripts))
        glyphs = torch.stack([_glyphs(script)[:12, :1].flatten(0, 1) for script in scripts])
        ink = glyphs[labels, _labels(order, n, glyphs.shape[1])]
        return _lit(_moved(ink, order, strain), order, strain, noise), labels

    return Task(len(scripts), draw)


# --- handwritten digits, photographs, elevations ---------------------------------------------------------------------


@functools.cache
def _handwriting() -> dict[str, tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    place = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = zip(("train", "validation", "test"), place.split([997, 300, 500]), strict=True)
    return {part: (images[chosen], labels[chosen]) for part, chosen in parts}


def _digits(noise: float, mirrored: bool = False) -> Task:
    """Which digit a hand wrote."""

    def draw(order: torch.Generator, n: int, part: str, strain: float) -> tuple[Tensor, Tensor]:
        images, labels = _handwriting()[part]
        chosen = _labels(order, n, len(labels))
        ink = images[chosen].flip(2) if mirrored else images[chosen]
        return _lit(_moved(ink, order, strain), order, strain, noise), labels[chosen]

    return Task(10, draw)


def _photographs() -> list[Tensor]:
    """Three photographs, [3, height, width]."""
    import matplotlib
    from PIL import Image
    from sklearn.datasets import load_sample_image

    hopper = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    photographs = [load_sample_image("china.jpg"), load_sample_image("flower.jpg"), np.asarray(hopper)]
    return [torch.tensor(np.array(photograph)).permute(2, 0, 1).float() / 255 for photograph in photographs]


@functools.cache
def _tiles() -> dict[str, list[Tensor]]:
    """By part, of each photograph the squares of 40 pixels with something in them: apart, so that no two overlap."""
    found: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for photograph in _photographs():
        tiles = photograph.unfold(1, 40, 40).unfold(2, 40, 40).permute(1, 2, 0, 3, 4).flatten(0, 1)
        tiles = tiles[tiles.flatten(1).std(1) > 0.02 * photograph.std()]
        place = torch.arange(len(tiles)) % 5
        for part, chosen in {"train": place < 3, "validation": place == 3, "test": place == 4}.items():
            found[part].append(tiles[chosen])
    return found


def _cut(sources: Tensor, order: torch.Generator, part: str, strain: float) -> Tensor:
    """Of each source [n] a square from anywhere, made smaller -> [n, 3, 16, 16]."""
    n, tiles = len(sources), _tiles()[part]
    chosen, corners = torch.rand(n, generator=order), torch.randint(9, (n, 2), generator=order)
    squares = torch.stack([
        tiles[source][int(place * len(tiles[source])), :, top : top + 32, left : left + 32]
        for source, place, (top, left) in zip(sources.tolist(), chosen.tolist(), corners.tolist(), strict=True)
    ])  # fmt: skip
    return (
        functional.avg_pool2d(squares, 2) * _uniform(order, n, 1 - 0.5 * strain, 1 + 0.5 * strain)[:, None, None, None]
    )


def _sources(noise: float) -> Task:
    """From which photograph a square is cut."""

    def draw(order: torch.Generator, n: int, part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, 3)
        return _noisy(_cut(labels, order, part, strain), order, strain * noise), labels

    return Task(3, draw)


def _filters(noise: float) -> Task:
    """What was done to a square of a photograph, of eight things."""

    def draw(order: torch.Generator, n: int, part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, 8)
        plain = _cut(_labels(order, n, 3), order, part, strain)
        blurred = functional.avg_pool2d(plain, 5, 1, 2, count_include_pad=False)
        coarse = functional.avg_pool2d(plain, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        every = torch.stack([
            plain, 1 - plain, plain.mean(1, keepdim=True).expand_as(plain), blurred, 0.5 + 2 * (plain - blurred),
            coarse, plain.flip(1), (3 * plain).round() / 3,
        ])  # fmt: skip
        return _noisy(every[labels, torch.arange(n)], order, strain * noise), labels

    return Task(8, draw)


# --- what formulas draw ----------------------------------------------------------------------------------------------


def _plane(order: torch.Generator, n: int, strain: float, turn: float) -> tuple[Tensor, Tensor]:
    """Coordinates x and y [n, 16, 16] of pixels, from -1 to 1, turned and moved."""
    line = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle = (_uniform(order, n, -turn, turn) * strain)[:, None, None]
    right, down = ((_uniform(order, n, -0.25, 0.25) * strain)[:, None, None] for _ in range(2))
    zoom = (1.3 + _uniform(order, n, -0.2, 0.6) * strain)[:, None, None]
    x, y = (x - right) * zoom, (y - down) * zoom
    return x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()


def _edge(distance: Tensor) -> Tensor:
    """Ink where a signed distance is below zero, with a soft edge."""
    return torch.sigmoid(-distance * 12)


def _polygon(x: Tensor, y: Tensor, corners: int) -> Tensor:
    angle = torch.atan2(y, x) + math.pi / 2
    sector = 2 * math.pi / corners
    return torch.hypot(x, y) * (angle.remainder(sector) - sector / 2).cos() - 0.65


_SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.hypot(x, y) - 0.7,
    lambda x, y: (torch.hypot(x, y) - 0.65).abs() - 0.18,
    lambda x, y: _polygon(x, y, 3),
    lambda x, y: _polygon(x, y, 4),
    lambda x, y: _polygon(x, y, 6),
    lambda x, y: torch.minimum(x.abs(), y.abs()).maximum(torch.maximum(x.abs(), y.abs()) - 0.75) - 0.2,
    lambda x, y: torch.hypot(x, y) - 0.45 - 0.25 * (5 * torch.atan2(y, x)).cos(),
    lambda x, y: torch.maximum(torch.hypot(x, y) - 0.75, 0.65 - torch.hypot(x - 0.35, y)),
)


def _shapes(noise: float) -> Task:
    """Which shape."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, len(_SHAPES))
        x, y = _plane(order, n, strain, 0.5)
        every = torch.stack([shape(x, y) for shape in _SHAPES])
        return _lit(_edge(every[labels, torch.arange(n)]), order, strain, noise), labels

    return Task(len(_SHAPES), draw)


def _gaps(directions: int, noise: float) -> Task:
    """Where a ring is open."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, directions)
        angle = (2 * math.pi * (labels + _uniform(order, n, -0.35, 0.35) * strain) / directions)[:, None, None]
        x, y = _plane(order, n, strain, 0.0)
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        ring = (torch.hypot(x, y) - 0.7).abs() - 0.22
        return _lit(_edge(torch.maximum(ring, torch.minimum(along, 0.35 - across.abs()))), order, strain, noise), labels

    return Task(directions, draw)


def _angles(directions: int, noise: float) -> Task:
    """Which way an arrow points."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, directions)
        angle = (2 * math.pi * (labels + _uniform(order, n, -0.35, 0.35) * strain) / directions)[:, None, None]
        x, y = _plane(order, n, strain, 0.0)
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        shaft = torch.maximum(across.abs() - 0.12, along.abs() - 0.8)
        head = torch.maximum(across.abs() - 0.6 * (0.9 - along), 0.2 - along)
        return _lit(_edge(torch.minimum(shaft, head)), order, strain, noise), labels

    return Task(directions, draw)


def _textures(noise: float) -> Task:
    """Which of ten patterns."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, 10)
        phase = _uniform(order, 2 * n, 0, 6.3).view(2, n, 1, 1)
        rate = (5 * (1 + _uniform(order, n, -0.3, 0.3) * strain))[:, None, None]
        x, y = _plane(order, n, 0.0, 0.0)
        bent = (_uniform(order, n, -0.4, 0.4) * strain)[:, None, None]
        x, y = x + bent * y, y - bent * x
        across, down = (rate * x + phase[0]).sin(), (rate * y + phase[1]).sin()
        grain = torch.randn(n, SIZE, SIZE, generator=order)
        cloud = functional.avg_pool2d(grain[:, None], 5, 1, 2, count_include_pad=False)[:, 0] * 4
        every = torch.stack([
            across, down, (rate * 0.7 * (x + y) + phase[0]).sin(), (rate * 0.7 * (x - y) + phase[0]).sin(),
            across * down, torch.maximum(across, down), across.sign() * down.sign(), grain, cloud,
            (rate * 1.4 * torch.hypot(x, y) + phase[0]).sin(),
        ])  # fmt: skip
        return _lit((every[labels, torch.arange(n)] + 1) / 2, order, strain, noise), labels

    return Task(10, draw)


def _gratings(noise: float) -> Task:
    """How fine stripes are, of five, and whether their edges are sharp."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, 10)
        rate = 3.0 * 1.28 ** (labels // 2 + _uniform(order, n, -0.3, 0.3) * strain)
        angle = _uniform(order, n, -1.6, 1.6)[:, None, None] * strain
        x, y = _plane(order, n, 0.0, 0.0)
        wave = (
            rate[:, None, None] * (x * angle.cos() + y * angle.sin()) + _uniform(order, n, 0, 6.3)[:, None, None]
        ).sin()
        wave = torch.where((labels % 2 == 1)[:, None, None], wave.sign(), wave)
        return _lit((wave + 1) / 2, order, strain, noise), labels

    return Task(10, draw)


def _places(noise: float) -> Task:
    """In which of nine cells a ring stands among discs."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, 9)
        line = torch.linspace(-1, 1, 5)
        radius = torch.hypot(*torch.meshgrid(line, line, indexing="ij"))
        disc, ring = _edge(radius - 0.8), _edge((radius - 0.75).abs() - 0.3)
        kinds = functional.one_hot(labels, 9).view(n, 3, 3).float()[:, :, :, None, None]
        strength = _uniform(order, n * 9, 1 - 0.6 * strain, 1).view(n, 3, 3, 1, 1)
        cells = strength * (kinds * ring + (1 - kinds) * disc)
        ink = functional.pad(cells.permute(0, 1, 3, 2, 4).reshape(n, 15, 15), (0, 1, 0, 1))
        return _lit(ink, order, strain, noise), labels

    return Task(9, draw)


def _colours(noise: float) -> Task:
    """Which of eight hues a shape has, under light that is tinted too."""

    def draw(order: torch.Generator, n: int, _part: str, strain: float) -> tuple[Tensor, Tensor]:
        labels = _labels(order, n, 8)
        hue = 2 * math.pi * (labels + _uniform(order, n, -0.3, 0.3) * strain) / 8
        thirds = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3])
        colour = 0.5 + 0.35 * (hue[:, None] - thirds).cos() * _uniform(order, n, 1 - 0.6 * strain, 1)[:, None]
        x, y = _plane(order, n, strain, 0.5)
        every = torch.stack([shape(x, y) for shape in _SHAPES])
        ink = _edge(every[_labels(order, n, len(_SHAPES)), torch.arange(n)])[:, None]
        ground = 0.5 + 0.4 * torch.rand(n, 3, 1, 1, generator=order) - 0.2
        tint = 0.2 * strain * torch.randn(n, 3, 1, 1, generator=order)
        pictures = ground + ink * (colour[:, :, None, None] - ground) + tint
        return _noisy(pictures, order, strain * noise), labels

    return Task(8, draw)


_SCRIPTS = ("ABDEGHKMNPRS", "бгджилфцчшыэ", "αβγδζηλμξπφψ", "ԱԲԳԴԵԶԷԸԹԺԻԼ", "აბგდევზთიკლმ", "012345678923")
FIRST: dict[str, Task] = {
    "digits": _digits(0.25),
    "latin": _letters("ABCDEFGHKMNPRSTX", 0.2),
    "greek": _letters("αβγδεζηθλμξπρσφψ", 0.2),
    "shapes": _shapes(0.3),
    "gaps": _gaps(8, 0.3),
    "textures": _textures(0.4),
    "photographs": _sources(0.1),
    "arrows": _angles(12, 0.3),
}
SECOND: dict[str, Task] = {
    "mirrored": _digits(0.25, mirrored=True),
    "cyrillic": _letters("БГДЖИЛПУФЦЧШЫЭЮЯ", 0.2),
    "styles": _styles("adeghnrt", 0.05),
    "scripts": _scripts(_SCRIPTS, 0.2),
    "colours": _colours(0.3),
    "places": _places(0.2),
    "filters": _filters(0.1),
    "gratings": _gratings(0.4),
}  # fmt: skip
