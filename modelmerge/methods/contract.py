"""The contract that a method file fulfils, and how methods are found.

A method is one file in `methods/merge/`: `task_arithmetic.py` is `task-arithmetic`. The file holds a docstring whose
first line is the method's help line; a frozen dataclass `Options`, each field made by `option`; a function `apply`;
and `METHOD = Method(...)`. Nothing else has to be edited for it to show up in help, completion, the README's table
and the tests that are asked of every method.

Shapes: T experts; a task vector has the shape of its tensor; `taus` stacks them, [T, *shape], float32.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from modelmerge.methods.work import NOTHING, Work

if TYPE_CHECKING:
    import torch
    from torch import Tensor as Tensor
else:  # methods import it from here: importing torch takes seconds, and help needs none of it
    Tensor = Any

Kind = TypeVar("Kind")


class Apart(Exception):
    """The matrices of a batch are not alike: each has to be merged for itself."""


def alike(kinds: Iterable[Kind]) -> Kind:
    """What all matrices of a batch are.

    Raises:
        Apart: They are not the same.
    """
    first, *others = kinds
    if any(other != first for other in others):
        raise Apart
    return first


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything that `apply` receives besides the task vectors.

    `weights` are the experts' weights (`--weight`) and `experts` their names, in the order of the task vectors.
    `measured` is what the method's survey concluded, or the tensor's moments. `base` is `theta_0` [*shape], for methods
    that want it; it must not be written to. `factors` are, for each expert whose task vector [m, n] is known to be a
    product, the two of it, [m, r] and [r, n] with r = 0 for no change, and None for the others; None at all where no
    expert's is, or where the task vectors are cut or have been changed since. `seed` is that of random draws, and
    `start` the place in its tensor of the first element of a block. `leave_out(expert, reason)` records that an expert
    (by position) had to be left out of this tensor; it is reported to the user and in the manifest. `tell(figures)`
    puts figures about this tensor there, such as the steps a solver took. `varied` has the values of the options that
    differ between the experts here.

    Of a batch of B matrices, base and factors have B as their first dimension, a figure is a list of B numbers (None
    where it has none), and who is left out is left out of all.
    """

    tensor: str
    weights: tuple[float, ...]
    experts: tuple[str, ...] = ()
    measured: Tensor | None = None
    base: Tensor | None = None
    factors: tuple[tuple[Tensor, Tensor] | None, ...] | None = None
    seed: int = 0
    start: int = 0
    leave_out: Callable[[int, str], None] = lambda expert, reason: None
    tell: Callable[[Mapping[str, Any]], None] = lambda figures: None
    varied: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def each(self, option: str, value: float) -> tuple[float, ...]:
        """An option's value for each expert, in their order; `value` where nothing else was said."""
        return self.varied.get(option, (value,) * len(self.weights))


@dataclass(frozen=True, slots=True)
class Vectors:
    """Task vectors [T, *shape] that a device has no room for at once: each is made anew whenever it is asked for.

    A stand-in for the tensor of them, as far as methods with `one_by_one` use that.

    Args:
        make: Makes the i-th, [*shape], on the device.
        shape: T and that of each.
        device: Where they are wanted.
        dtype: That of each.
    """

    make: Callable[[int], Tensor]
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        """How many dimensions they have together."""
        return len(self.shape)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Any:
        """One of them, or some of them as such a stand-in."""
        if isinstance(which, int):
            return self.make(which)
        places = range(len(self))[which] if isinstance(which, slice) else which
        return replace(self, make=lambda i: self.make(places[i]), shape=(len(places), *self.shape[1:]))

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.make, range(len(self)))

    def __mul__(self, factors: Tensor) -> Vectors:
        """Each times its own factor, [T, 1, ...]."""
        return replace(self, make=lambda i: self.make(i) * factors[i])

    @property
    def mT(self) -> Vectors:
        """Each transposed."""
        *before, m, n = self.shape
        return replace(self, make=lambda i: self.make(i).mT, shape=(*before, n, m))


@dataclass(frozen=True, slots=True)
class Pass:
    """One trip over task vectors: `measure([T, n], total)` adds what it finds in a block to the int64 total, in place.

    Integers, so that the sum has no rounding and no order over blocks, shards and workers; `total` has the shape
    [T, counters]. With a `share` of N only a regular sample of one N-th of the entries is read. With `room` for so
    many, `measure` hands over int64 numbers [k] besides: what is sent is the total and all of these, in any order, or
    none where there were more.
    """

    measure: Callable[[Tensor, Tensor], Tensor | None]
    counters: int
    share: int = 1
    room: int = 0


@dataclass(frozen=True, slots=True)
class Survey:
    """A whole-model quantity, found by streaming over all task vectors before anything is merged.

    Args:
        find: Given the number of entries of a task vector, a generator that yields passes, is sent the total of each,
            and returns what `apply` sees as `context.measured`.
        reads: Given the same, how many times the task vectors are read in all, as a rule.
    """

    find: Callable[[int], Generator[Pass, Any, Tensor]]
    reads: Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Look:
    """One trip over a tensor: what `measure(taus [T, n], base [n])` tells of its blocks, added up in their order.

    Tensors add up, and lists are joined. With `sampled` it sees runs of the tensor's entries, all of one length.
    """

    measure: Callable[[Tensor, Tensor], Any]
    sampled: bool = False


# Measures one tensor, given its number of entries and whether they come as one block: yields looks, is sent what each
# tells, and returns what `apply` sees as `context.measured`.
Moments = Callable[[int, bool], Generator[Look, Any, Tensor]]


class Gathered:
    """What blocks hand over, from any thread, in whatever order, in memory of its own [*shape, n].

    Left where a thread has made it, it would keep blocks of memory that are used again and again from being joined.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._used, self._mutex = memory, 0, threading.Lock()

    def add(self, values: Tensor) -> int:
        """Keep these, if there is room; their place in it."""
        with self._mutex:
            first, self._used = self._used, self._used + values.shape[-1]
            if self._used <= self._memory.shape[-1]:
                self._memory[..., first : self._used] = values
            return first

    @property
    def values(self) -> Tensor | None:
        """All of them; None if there was no room."""
        return self._memory[..., : self._used] if self._used <= self._memory.shape[-1] else None


def summed(measure: Callable[[Tensor, Tensor], Tensor]) -> Moments:
    """The sums of what `(taus [T, n], base [n]) -> [k]` tells of the blocks."""

    def find(numel: int, at_once: bool) -> Generator[Look, Any, Tensor]:
        total: Tensor = yield Look(measure)
        return total

    return find


def measured_at_once(moments: Moments, taus: Tensor, base: Tensor) -> Tensor:
    """What the moments tell of task vectors [T, n] and a base [n] that are here as a whole."""
    search = moments(taus.shape[1], True)
    look = next(search)
    while True:
        try:
            look = search.send(look.measure(taus, base))
        except StopIteration as end:
            measured: Tensor = end.value
            return measured


@dataclass(frozen=True, slots=True)
class Citation:
    """A paper: its title, the authors as BibTeX has them ("First Last and others"), where and when ("ICML 2025")."""

    title: str
    authors: str
    published: str

    def bibtex(self, url: str) -> str:
        """The entry for a bibliography."""
        surname, year = self.authors.partition(" and ")[0].split()[-1].lower(), self.published.split()[-1]
        fields = {
            "title": f"{{{self.title}}}", "author": self.authors, "howpublished": self.published, "year": year,
            "url": url,
        }  # fmt: skip
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{surname}{year},\n{lines}\n}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How task vectors become one.

    Args:
        options: The method's frozen dataclass of options.
        apply: `(taus [T, *shape], options, context) -> [*shape]`: the merged task vector. Must not write to `taus`.
        paper: Link to the source.
        citation: The paper, where there is one.
        matrices: It takes the weights of linear layers only; what happens to the rest is `--rest`.
        rest: Given the options, what happens to the rest where `--rest` does not say: base, average, task-arithmetic.
        most_experts: The most experts it takes, where that is part of its definition.
        normalises: Given the options, whether it divides by the sum of the weights, which then must not be zero.
        linear: Given the options, whether it adds the task vectors up by numbers that depend on nothing in them.
        wants_base: It looks at `context.base`.
        on_weights: Given the options, whether it merges the models' weights, so that the result is the same wherever
            their task vectors are seen from.
        checked_after: What it makes is not finite wherever a task vector is not, so that no check comes before it.
        blockwise: Given the options, whether `apply` is element-wise, so that a tensor may be cut anywhere and comes
            as blocks [T, n]. Otherwise a tensor comes whole.
        by_rows: Given the options, whether `apply` works row by row, so that a tensor that may not be cut anywhere may
            be cut between rows: as blocks [T, rows, n]. A vector is one row.
        survey: Given the options and, by option, the experts' values where they differ, the whole-model quantity that
            `apply` needs, if any.
        moments: Given the same of a tensor, what it has to be measured by first, if by anything.
        workspace: Given the options and T, how many float32 copies of a tensor `apply` needs at once beside `taus`.
        work: Given the options, m, n and T, what `apply` does on [T, m, n] beside adding up. Plans tell the time from
            it, progress goes by it, and whoever shares work out has the dearest done first.
        work_of_products: Given the options, m, n, T and k, the same where the task vectors are products of k directions
            in all, as those of adapters; None where that makes no difference.
        squares: Given the options, m, n and T, how many float64 numbers the matrices have that it needs besides, square
            ones of a side: they are large where m << n.
        batches: Given the options, whether `apply` takes batches on a device: B matrices of one shape as [T, B, m, n],
            each merged for itself, into [B, m, n]. Where they are not alike, it raises `Apart`.
        one_by_one: Given the options, m, n and T, how many float32 numbers `apply` holds at once, task vectors among
            them, if these come as `Vectors`; None if it wants them together.
        behind: Given the options, the name of the method that it calls first, if any; cards cite both.
        on_data: Its weights are found on unlabelled data before anything is merged: its options are those of
            `modelmerge.methods.coefficients`.
    """

    options: type
    apply: Callable[[Tensor, Any, Context], Tensor]
    paper: str
    citation: Citation | None = None
    matrices: bool = False
    rest: Callable[[Any], str] = lambda options: "base"
    most_experts: int | None = None
    normalises: Callable[[Any], bool] = lambda options: False
    linear: Callable[[Any], bool] = lambda options: False
    wants_base: bool = False
    on_weights: Callable[[Any], bool] = lambda options: False
    checked_after: bool = False
    blockwise: Callable[[Any], bool] = lambda options: True
    by_rows: Callable[[Any], bool] = lambda options: False
    survey: Callable[[Any, Mapping[str, tuple[float, ...]]], Survey | None] = lambda options, each: None
    moments: Callable[[Any, Mapping[str, tuple[float, ...]]], Moments | None] = lambda options, each: None
    workspace: Callable[[Any, int], float] = lambda options, tasks: 3.0
    work: Callable[[Any, int, int, int], Work] = lambda options, m, n, tasks: NOTHING
    work_of_products: Callable[[Any, int, int, int, int], Work] | None = None
    squares: Callable[[Any, int, int, int], float] = lambda options, m, n, tasks: 0.0
    batches: Callable[[Any], bool] = lambda options: False
    one_by_one: Callable[[Any, int, int, int], float | None] = lambda options, m, n, tasks: None
    behind: Callable[[Any], str | None] = lambda options: None
    on_data: bool = False


# A method for the weights of linear layers: they come whole, and the rest is averaged.
matrix_method = functools.partial(
    Method, matrices=True, rest=lambda options: "average", blockwise=lambda options: False
)

Watch = Callable[[float], None]  # hears a solver's loss as it goes


@dataclass(frozen=True, slots=True)
class Solution:
    """A vector for each of G groups, as a combination of its task vectors: `delta = sum_k coefficients_k tau_k`.

    `coefficients` and `active` are [G, T]; an expert that is not active in a group keeps its task vector there.
    `losses` [steps + 1] are summed over the groups.
    """

    coefficients: Tensor
    active: Tensor
    losses: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedVector:
    """One vector is subtracted from all task vectors, in each group; it is a combination of them.

    The options have `granularity`: row, tensor or model is a group.

    Args:
        measure: `[T, G, n] -> [G, T, T]`: the Gram matrices, which add up over the parts of a group.
        solve: `([G, T, T], options, watch) -> Solution`; `watch(loss)`, if any, is called at each step with the mean
            over the groups.
    """

    measure: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor, Any, Watch | None], Solution]


@dataclass(frozen=True, slots=True)
class Corrected:
    """The correction of one weight: matrices of its shape, and some numbers for each expert.

    `matrices` are [C, m, n], float32; `numbers` [T, k] is all else that `Correction.correct` needs. `losses` are those
    before and after.
    """

    matrices: Tensor
    numbers: tuple[tuple[float, ...], ...]
    losses: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Matrices are found weight by weight, and correct the task vectors entry by entry.

    The matrices wait in a file, so that no model is held in memory and nothing is solved twice.

    Args:
        find: `(taus [T, m, n], options, context) -> Corrected`, on a whole weight. Must not write to `taus`.
        correct: `(taus [T, n], matrices [C, n], numbers)`: changes a run of a weight's entries in place.
        matrices: `(options, T)`: how many matrices there are for each weight, C.
        survey: Given the options, the whole-model quantity that `find` needs, if any; of task vectors as they are.
        workspace: `(options, T)`: how many float32 copies of a weight `find` needs at once beside `taus`.
        work: `(options, m, n, T)`: what `find` does on [T, m, n].
    """

    find: Callable[[Tensor, Any, Context], Corrected]
    correct: Callable[[Tensor, Tensor, tuple[tuple[float, ...], ...]], None]
    matrices: Callable[[Any, int], int]
    survey: Callable[[Any], Survey | None]
    workspace: Callable[[Any, int], float]
    work: Callable[[Any, int, int, int], Work]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformSpec:
    """How T task vectors become T others that are easier to merge.

    Args:
        options: The transform's frozen dataclass of options.
        by: Its mathematics; the engine has one way to fit and apply each kind.
        paper: Link to the source.
        citation: The paper.
    """

    options: type
    by: SharedVector | Correction
    paper: str
    citation: Citation
