"""Colours that stay apart for colour-blind eyes, on white paper and on a dark screen."""

from __future__ import annotations

# Okabe and Ito's set (https://jfly.uni-koeln.de/color/) in an order that keeps the first few furthest apart; their
# black, which is the ink's, gives way to a violet.
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#332288")
SERIES_DARK = (*SERIES[:7], "#9c7bff")
INK, PAPER, GREY = "#1b1f26", "#ffffff", "#8a8f98"
INK_DARK, PAPER_DARK, GREY_DARK = "#e6e8eb", "#15181e", "#7d838c"
# From nothing to the far end; orange and blue differ to all eyes.
_POSITIVE = ("#f5f5f3", "#92c5de", "#0a5c9c")
_NEGATIVE = ("#f5f5f3", "#fdb863", "#a04400")
_POSITIVE_DARK = ("#22262e", "#1f5f94", "#8ccbf5")
_NEGATIVE_DARK = ("#22262e", "#94530f", "#fcc27c")
STEPS = 20  # shades on each side of nothing


def step(value: float, limit: float) -> int:
    """Which of the shades a value has, from -STEPS to STEPS; what is beyond the limit has the last."""
    return max(-STEPS, min(STEPS, round(STEPS * value / limit))) if limit else 0


def shade(place: int, *, dark: bool = False) -> str:
    """The colour of a step, as `#rrggbb`."""
    ends = ((_NEGATIVE, _NEGATIVE_DARK) if place < 0 else (_POSITIVE, _POSITIVE_DARK))[dark]
    share = 2 * abs(place) / STEPS
    start, end = ends[:2] if share <= 1 else ends[1:]
    share -= share > 1
    mixture = (round(a + (b - a) * share) for a, b in zip(_parts(start), _parts(end), strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixture)


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, from 1 to 21, as WCAG 2 has it."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (p / 255 for p in _parts(colour))]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
