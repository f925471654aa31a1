r"""Strangers' text, shown as text: names of tensors, tasks and directories may hold anything.

What steers a terminal or turns a line around is shown by its number: ESC as `\x1b`, a right-to-left override as
`\u202e`, a byte of a file's name that is no UTF-8 as `\xff`. What comes out is always valid Unicode.
"""

from __future__ import annotations

import re
import unicodedata

_STEERS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of control and format, halves of pairs, ends of lines
_HARMLESS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # letters of some scripts, and emoji, are joined by them
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str) -> str:
    """The text on one line, with what steers and does not show by its number."""
    return text if text.isprintable() else "".join(map(_shown, text))


def visible_lines(text: str) -> str:
    """`visible` of each line; tabs stay, too."""
    return "".join(part if part in "\n\t" else visible(part) for part in re.split(r"([\n\t])", text))


def _shown(letter: str) -> str:
    if unicodedata.category(letter) not in _STEERS or letter in _HARMLESS:
        return letter
    code = ord(letter)
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # how Python holds a byte that it cannot decode
    return _SHORT.get(letter) or (
        f"\\x{byte:02x}" if byte < 256 else f"\\u{byte:04x}" if byte < 65536 else f"\\U{byte:08x}"
    )


def duration(seconds: float) -> str:
    """A time that is only about right: 4 s, 12 min, 3.5 h, 2.1 days."""
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{max(seconds, 1.0):.0f} s"
