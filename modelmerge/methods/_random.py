"""Random draws that depend on nothing but what is drawn for: seed, tensor, expert, element.

A counter-based generator: the draw of an element is a hash of its place in the tensor, keyed by the rest. No state, so
blocks, shards, workers and devices draw the same. The hash is SplitMix64 (Steele, Lea, Flood: Fast splittable
pseudorandom number generators, OOPSLA 2014), started from the key; each of its 64-bit words gives the draws of four
neighbouring elements, 16 bits each.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from modelmerge.method import Context

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 1 << 16  # of a draw
_ALL = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def draws(context: Context, expert: int, count: int, device: torch.device) -> Tensor:
    """Draws for `count` elements from `context.start` on: int16 [count], uniform from -2^15 to 2^15 - 1."""
    key = _key(context.seed, context.tensor, context.experts[expert])
    first, last = context.start // 4, -(-(context.start + count) // 4)
    return hashed(first, last - first, key, device).view(torch.int16)[context.start % 4 :][:count]


def share(density: float) -> float:
    """The share that `kept` keeps: the nearest multiple of 2^-16, but not nothing."""
    return max(round(density * LEVELS), 1) / LEVELS


def kept(context: Context, expert: int, count: int, density: float, device: torch.device) -> Tensor:
    """1.0 for each element that is kept, with probability `share(density)`, and 0.0 for the others: float32 [count]."""
    if share(density) == 1.0:
        return torch.ones(count, device=device)
    drawn, limit = draws(context, expert, count, device), round(share(density) * LEVELS) - LEVELS // 2
    # On a CPU numpy compares ten times faster than torch.
    below = torch.from_numpy(drawn.numpy() < limit) if device.type == "cpu" else drawn < limit
    return below.view(torch.uint8).float()


def hashed(first: int, count: int, key: int, device: torch.device) -> Tensor:
    """The words number `first`, `first + 1`, ... of the sequence that starts at `key`: int64 [count]."""
    words = torch.arange(count, dtype=torch.int64, device=device)
    if device.type != "cpu":
        return mixed(words, first, key)
    # numpy knows unsigned integers, and so needs fewer steps than `mixed`.
    x: Any = words.numpy().view("uint64")
    x *= _STEP
    x += (key + (first + 1) * _STEP) & _ALL
    x ^= x >> 30
    x *= _FIRST
    x ^= x >> 27
    x *= _SECOND
    x ^= x >> 31
    return words


def mixed(words: Tensor, first: int, key: int) -> Tensor:
    """What `hashed` computes, from 0, 1, ... [n], in place, in signed arithmetic."""
    words.mul_(_signed(_STEP)).add_(_signed(key + (first + 1) * _STEP))
    _shift_in(words, 30).mul_(_signed(_FIRST))
    _shift_in(words, 27).mul_(_signed(_SECOND))
    return _shift_in(words, 31)


def _shift_in(words: Tensor, bits: int) -> Tensor:
    """`words ^ (words >> bits)` as if unsigned, in place."""
    return words.bitwise_xor_((words >> bits).bitwise_and_(_ALL >> bits))


def _signed(word: int) -> int:
    """The int64 that has the lowest 64 bits of `word`."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def _key(seed: int, tensor: str, expert: str) -> int:
    named = "\0".join((str(seed), tensor, expert)).encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")
