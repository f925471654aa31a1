"""From stored bytes to task vectors, a piece at a time, on several threads."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from modelmerge import devices
from modelmerge.checkpoint.changes import TORCH_DTYPES, Changes, as_bytes
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.engine.job import Source
from modelmerge.engine.pieces import Piece, item_bytes
from modelmerge.engine.rounding import Rounding, squared
from modelmerge.errors import CheckpointError, named
from modelmerge.plan.tensors import Plan, TensorPlan

_OTHER_DTYPES = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Loader:
    """A thread's buffers, and the way from stored bytes to task vectors.

    Args:
        source: Where they come from.
        elements: Capacity: elements of the largest piece that will be loaded.
        stored: Capacity: bytes of the largest piece as any model stores it.
        device: Where `theta_0` and the task vectors shall be.
    """

    def __init__(self, source: Source, elements: int, stored: int, device: torch.device) -> None:
        self._source = source
        self._models = source.plan.models
        self._changes = Changes(device, source.block, source.norms)
        self._device = device
        self._raw = devices.host_buffer(-(-stored // 8) * 8, device)
        # The same memory as each dtype, and as bytes: to make these anew for every piece takes longer than to read it.
        self._views = {name: self._raw.view(dtype) for name, dtype in TORCH_DTYPES.items()}
        self._bytes = as_bytes(self._raw)
        self._theta_0 = torch.empty(elements, dtype=torch.float32, device=device)
        self._taus = torch.empty(len(source.plan.experts) * elements, dtype=torch.float32, device=device)

    def load(self, piece: Piece, *, check: bool) -> tuple[Tensor, Tensor]:
        """`theta_0` [*shape], float32 or float64, and the task vectors [T, *shape], float32.

        Both lie in buffers that the next call writes over; a whole tensor's `theta_0` is its own.

        Raises:
            CheckpointError: With `check`, a weight is NaN or Inf.
        """
        experts, size = self._source.plan.experts_of(piece.tensor), piece.stop - piece.start
        taus = self._taus[: len(experts) * size].view(len(experts), size)
        theta_0 = self._widened(self._models[0], piece)
        for tau, expert in zip(taus, experts, strict=True):
            self._load_one(expert, piece, theta_0, tau)
        # One sum finds any NaN or Inf of base and experts, for both stay in a difference and in a sum. A sum that is
        # not finite may also be an overflow of finite numbers: look again, one model at a time.
        if check and not bool((taus if len(taus) else theta_0).sum().isfinite()):
            self.refuse_nonfinite(piece)
        if piece.whole:
            return theta_0.view(piece.tensor.shape), taus.view(len(experts), *piece.tensor.shape)
        return theta_0, taus

    def each(self, tensor: TensorPlan, *, check: bool) -> Iterator[Tensor]:
        """A whole tensor's task vectors [*shape], one after the other; the next is written over the last.

        Raises:
            CheckpointError: With `check`, a weight is NaN or Inf.
        """
        piece = Piece(tensor, 0, tensor.numel, whole=True)
        theta_0, tau = self._widened(self._models[0], piece), self._taus[: tensor.numel]
        for expert in self._source.plan.experts_of(tensor):
            self._load_one(expert, piece, theta_0, tau)
            if check and not bool(tau.sum().isfinite()):
                self.refuse_nonfinite(piece)
            yield tau.view(tensor.shape)

    def _load_one(self, expert: Checkpoint, piece: Piece, theta_0: Tensor, tau: Tensor) -> None:
        """An expert's task vector, flat, into `tau`."""
        common = piece.tensor.common - piece.start
        if common < tau.numel():  # beyond the rows that all models have nothing changes
            tau.zero_()
            if common > 0:
                part = replace(piece, stop=piece.start + common, whole=False)
                self._load_one(expert, part, theta_0[:common], tau[:common])
            return
        info = expert.tensors.get(piece.tensor.name)
        if info is None:  # a task vector or an adapter that leaves out what did not change
            tau.zero_()
        elif info.change is None:
            stored = self.stored(expert, piece)
            if torch.float64 in (stored.dtype, theta_0.dtype):
                tau.copy_(stored.double() - theta_0.double())
            else:
                tau.copy_(stored).sub_(theta_0)
        elif info.change.factors is None and not info.change.runs:
            tau.copy_(self.stored(expert, piece)).mul_(info.change.scale)
        else:
            base = self._models[0]
            self._changes.load(expert, info, base, base.tensors[piece.tensor.name], piece.start, theta_0, tau)

    def copy(self, piece: Piece) -> Tensor:
        """The base's own elements, flat, in the output's dtype (raw bytes where it stays the same)."""
        nbytes = self._read(self._models[0], piece)
        stored = self._views[piece.tensor.dtype][: piece.stop - piece.start] if piece.tensor.checked else None
        if stored is not None and not bool(stored.float().sum().isfinite()):
            self.refuse_nonfinite(piece, self._models[:1])
        if piece.tensor.out_dtype == piece.tensor.dtype:
            return self._raw[:nbytes]
        return rounded(piece, self._widened(self._models[0], piece), check=piece.tensor.checked)

    def refuse_nonfinite(self, piece: Piece, models: Sequence[Checkpoint] | None = None) -> None:
        """Name the weight of a piece that is NaN or Inf, if there is one.

        Raises:
            CheckpointError: There is.
        """
        for model in models or self._models:
            info = model.tensors.get(piece.tensor.name)
            if model is not self._models[0]:
                piece = replace(piece, stop=min(piece.stop, piece.tensor.common))
            if info is None or piece.start >= piece.stop:
                continue
            parts = info.change.parts if info.change is not None else ()
            for part in parts or (info,):
                values = self._changes.elements(model, part, 0, part.numel) if parts else self.stored(model, piece)
                if not bool(values.isfinite().all()):
                    kind = "NaN" if bool(values.isnan().any()) else "Inf"
                    raise CheckpointError(
                        f"{info.file}: tensor '{part.name}' of '{model.name}' holds {kind}",
                        hint=f"{named('exclude')} '{piece.tensor.stored_name}' copies it from the base unchecked, "
                        "if that is meant",
                    )
            for row, run in (info.change.runs or ((0, info),)) if info.change is not None else ():
                if run.change is None or run.change.magnitude is None:
                    continue
                base, target = self._models[0], self._models[0].tensors[piece.tensor.name]
                factors = self._changes.rescaling(model, run.change, base, target, row, 0, run.shape[0])
                if not bool(factors.isfinite().all()):
                    raise CheckpointError(
                        f"{info.file}: '{run.change.magnitude.name}' rescales weights that are all zero in the base",
                        hint=f"{named('exclude')} '{piece.tensor.stored_name}' copies them from the base",
                    )

    def _widened(self, model: Checkpoint, piece: Piece) -> Tensor:
        """A model's elements, flat, in float32, or float64 where they are stored so; in a buffer."""
        stored = self.stored(model, piece)
        if stored.dtype == torch.float64:
            return stored.clone()
        # What becomes of a whole tensor may still be on its way to the file when the next one is read.
        if piece.whole:
            return stored.to(torch.float32, copy=True)
        return self._theta_0[: len(stored)].copy_(stored)

    def stored(self, model: Checkpoint, piece: Piece) -> Tensor:
        """A model's elements, flat, as stored, on the device; in a buffer that the next call writes over."""
        self._read(model, piece)
        values = self._views[model.tensors[piece.tensor.name].dtype][: piece.stop - piece.start]
        return values.to(self._device) if self._device.type != "cpu" else values

    def _read(self, model: Checkpoint, piece: Piece) -> int:
        """Read a model's elements into the buffer; the bytes read."""
        info = model.tensors[piece.tensor.name]
        size = item_bytes(info.dtype)
        nbytes = (piece.stop - piece.start) * size
        model.read_into(info, piece.start * size, self._bytes[:nbytes], follow=not piece.sampled)
        return nbytes


def loader_of(source: Source, tensors: Sequence[TensorPlan]) -> Loader:
    """A loader of whole tensors, on the host, that has room for each of these.

    One for many tensors: memory that is new costs the system as much time as reading into it.
    """
    stored = max((model.stored_bytes(t.name) for t in tensors for model in source.plan.models), default=0)
    return Loader(source, max((t.numel for t in tensors), default=0), stored, torch.device("cpu"))


def whole(
    source: Source, tensor: TensorPlan, *, check: bool, loader: Loader | None = None
) -> tuple[Piece, Tensor, Tensor]:
    """A whole tensor's piece, `theta_0` and task vectors, on the host; the latter in the loader's buffer, if any."""
    piece = Piece(tensor, 0, tensor.numel, whole=True)
    theta_0, taus = (loader or loader_of(source, [tensor])).load(piece, check=check)
    return piece, theta_0, taus


def wholes(
    source: Source, tensors: Sequence[TensorPlan], *, check: bool, on_host: Container[str] = ()
) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """`whole` for one tensor after the other, on the source's device or on the host, the next being read meanwhile."""
    with ThreadPoolExecutor(1, "read") as reading:
        ahead = reading.submit(whole, source, tensors[0], check=check) if tensors else None
        for i in range(len(tensors)):
            assert ahead is not None
            piece, theta_0, taus = ahead.result()
            ahead = reading.submit(whole, source, tensors[i + 1], check=check) if i + 1 < len(tensors) else None
            place = torch.device("cpu") if piece.tensor.name in on_host else source.device
            yield piece, theta_0.to(place), taus.to(place)


def expert_values(plan: Plan, piece: Piece, device: torch.device) -> Tensor | None:
    """The elements of the only expert, flat, float32 or float64; None where it does not store them as such."""
    tensor = piece.tensor
    expert = plan.experts_of(tensor)[0]
    info = expert.tensors.get(tensor.name)
    if info is None or info.change is not None or tensor.rows is not None or tensor.owners is not None:
        return None
    return Changes(device, 0, {}).elements(expert, info, piece.start, piece.stop)


def read_tensor(model: Checkpoint, name: str) -> Tensor:
    """A tensor as the model stores it, on the host.

    Raises:
        CheckpointError: The file ends before it, or it is of a dtype that torch lacks.
    """
    info = model.tensors[name]
    dtype = (TORCH_DTYPES | _OTHER_DTYPES).get(info.dtype)
    if dtype is None:
        raise CheckpointError(f"{info.file}: tensor '{name}' is {info.dtype}, which torch has no dtype for")
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    model.read_into(info, 0, as_bytes(raw))
    values = raw.view(dtype).view(info.shape)
    return values.to(TORCH_DTYPES.get(model.stored_dtype(info), dtype))  # what is made of a model has more digits


def loaded(source: Source, tensor: TensorPlan) -> Tensor:
    """The base's own tensor, flat, as the output stores it, on the host (raw bytes where its dtype stays the same)."""
    loader = Loader(source, tensor.numel, source.plan.base.stored_bytes(tensor.name), torch.device("cpu"))
    return loader.copy(Piece(tensor, 0, tensor.numel))


def factors_of(
    source: Source, tensor: TensorPlan, device: torch.device
) -> tuple[tuple[Tensor, Tensor] | None, ...] | None:
    """Each expert's task vector [m, n] as factors [m, r] and [r, n], float32 on the device; None for one that has none.

    None at all where no expert has any. An expert that did not change the tensor has factors of rank 0.
    """
    if tensor.rows is not None or tensor.members:  # the task vectors are cut, or the factors are those of many matrices
        return None
    pairs: list[tuple[Tensor, Tensor] | None] = []
    changes = Changes(device, source.block, source.norms)
    for expert in source.plan.experts_of(tensor):
        info = expert.tensors.get(tensor.name)
        if len(tensor.shape) != 2 or (info is not None and (info.change is None or not info.change.low_rank)):
            pairs.append(None)
        elif info is None or info.change is None:
            m, n = tensor.shape
            pairs.append((torch.zeros(m, 0, device=device), torch.zeros(0, n, device=device)))
        else:
            left, right = changes.factors(expert, info.change, 0, tensor.shape[0])
            pairs.append((left.float(), right.float()))
    return tuple(pairs) if any(pair is not None for pair in pairs) else None


def rounded(piece: Piece, values: Tensor, *, check: bool = True, rounding: Rounding | None = None) -> Tensor:
    """The merged values, flat, in the output's dtype, on the host; `rounding` notes what that loses.

    Raises:
        CheckpointError: With `check`, a value does not fit the dtype.
    """
    dtype = TORCH_DTYPES[piece.tensor.out_dtype]
    stored = values.to(dtype)
    # As in loading: a sum first, a closer look only where it is not finite. What is lost is NaN wherever a value is.
    if rounding is not None and dtype != values.dtype:
        error = squared(stored.to(values.dtype).sub_(values))
        rounding.errors.add(error)
        finite = math.isfinite(error)
    else:
        finite = bool((stored if dtype == torch.float64 else stored.float()).sum().isfinite())
    if check and not finite:
        merged = f"tensor '{piece.tensor.name}': the merged values"
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{merged} are not finite", hint="use a smaller scale or step")
        if not bool(stored.isfinite().all()):
            narrow = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{merged} overflow {narrow}", hint=f"store it wider: {named('dtype')} float32")
    return stored.flatten().cpu()
