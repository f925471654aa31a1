"""Random draws that depend on nothing but what is drawn for: seed, tensor, expert, element.

A counter-based generator: the draw of an element is a hash of its place in the tensor, keyed by the rest. No state, so
blocks, shards, workers and devices draw the same. Each 64-bit word gives the draws of four neighbouring elements, 16
bits each.

The hash is simple tabulation (Zobrist, 1970; Patrascu and Thorup, The power of simple tabulation hashing, JACM 2012):
a word's place has two digits, each with a table of random words, and the hash is their exclusive or; any three words
are independent of one another. Four whose places make a rectangle are not, so a product and a fold come after it, which
are one to one. The tables are SplitMix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA
2014), started from the key. That takes four passes over the words where SplitMix64 itself would take ten.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch

from modelmerge.methods.contract import Context, Tensor

LEVELS = 1 << 16  # of a draw
LANES = 1 << 10  # words that share the first digit of their place
_ALL = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Of good spectral quality (Steele, Vigna: Computationally easy, spectrally good multipliers, 2021).
_FACTOR = 0xD1342543DE82EF95
_ROWS = 0x6A09E667F3BCC908  # sets the keys of the two tables apart: the fraction of the square root of two


def draws(context: Context, expert: int, count: int, device: torch.device) -> Tensor:
    """Draws for `count` elements from `context.start` on: int16 [count], uniform from -2^15 to 2^15 - 1."""
    key = _key(context.seed, context.tensor, context.experts[expert])
    first, last = context.start // 4, -(-(context.start + count) // 4)
    return hashed(first, last - first, key, device).view(torch.int16)[context.start % 4 :][:count]


def share(density: float) -> float:
    """The share that `keep` keeps: the nearest multiple of 2^-16, but not nothing."""
    return max(round(density * LEVELS), 1) / LEVELS


def keep(context: Context, expert: int, density: float, out: Tensor) -> Tensor:
    """`out`, float32 of a block's shape, with 1.0 for each element that is kept and 0.0 for the others.

    An element is kept with probability `share(density)`.
    """
    if share(density) == 1.0:
        return out.fill_(1.0)
    drawn = draws(context, expert, out.numel(), out.device)
    limit = round(share(density) * LEVELS) - LEVELS // 2
    # On a CPU numpy compares ten times faster than torch.
    below = torch.from_numpy(drawn.numpy() < limit) if out.device.type == "cpu" else drawn < limit
    return out.copy_(below.view(torch.uint8).view(out.shape))


def uniform(context: Context, expert: int, out: Tensor) -> Tensor:
    """`out`, float32 of a block's shape, with each element's draw, from 0 to 2^16 - 1."""
    drawn = draws(context, expert, out.numel(), out.device)
    return out.copy_(drawn.view(out.shape)).add_(LEVELS // 2)


def hashed(first: int, count: int, key: int, device: torch.device) -> Tensor:
    """The words number `first`, `first + 1`, ... of the sequence that the key starts: int64 [count]."""
    top, stop = first // LANES, -(-(first + count) // LANES)
    rows, lanes = split_mix(top, stop - top, key ^ _ROWS), _lanes(key)
    if device.type != "cpu":
        words = folded(rows.to(device), lanes.to(device))
    else:
        # numpy knows unsigned integers, and so needs fewer steps than `folded`.
        x: Any = rows.numpy().view("uint64")[:, None] ^ lanes.numpy().view("uint64")
        x *= _FACTOR
        x ^= x >> 32
        words = torch.from_numpy(x.view("int64"))
    return words.view(-1)[first - top * LANES :][:count]


def folded(rows: Tensor, lanes: Tensor) -> Tensor:
    """What `hashed` computes of the two tables, [m] and [n], in signed arithmetic: int64 [m, n]."""
    words = (rows[:, None] ^ lanes).mul_(_signed(_FACTOR))
    return words.bitwise_xor_((words >> 32).bitwise_and_((1 << 32) - 1))


@functools.lru_cache(maxsize=256)
def _lanes(key: int) -> Tensor:
    """The table of the second digit, 8 KiB, which all blocks of a tensor need: int64 [LANES]."""
    return split_mix(0, LANES, key)


def split_mix(first: int, count: int, key: int) -> Tensor:
    """The words number `first`, `first + 1`, ... of SplitMix64 started from the key: int64 [count], on the host."""
    words = torch.arange(count, dtype=torch.int64)
    x: Any = words.numpy().view("uint64")
    x *= _STEP
    x += (key + (first + 1) * _STEP) & _ALL
    x ^= x >> 30
    x *= _FIRST
    x ^= x >> 27
    x *= _SECOND
    x ^= x >> 31
    return words


def _signed(word: int) -> int:
    """The int64 that has the lowest 64 bits of `word`."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def _key(seed: int, tensor: str, expert: str) -> int:
    named = "\0".join((str(seed), tensor, expert)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")
