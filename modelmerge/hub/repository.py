"""The Hugging Face Hub: repositories pinned to a commit, shown as directories, fetched into the cache or streamed.

A repository is shown to the readers as a directory, its outline: small files whole, weight files as sparse copies that
hold their headers and nothing more. A plan needs nothing else, and so costs kilobytes. Before the work, `fetch` puts
the files that the plan needs into the cache that all Hugging Face tools share, and links to them into the outline in
the place of the sparse copies; what it leaves out is read over ranges.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from typing import Any

from huggingface_hub import close_session, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from modelmerge import interrupts
from modelmerge.errors import OUTLINES, HubError, ReferenceNotFound, named
from modelmerge.hub import sparse
from modelmerge.hub.ranges import LIBRARY, Chunks, Client, Ranges, explained
from modelmerge.progress import Reporter

_DOWNLOADS = 4  # files at a time
_LOOK = 0.5  # seconds between looks at whether a signal has come
_REQUESTS = 8  # for headers and the like, at a time
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot")
# Of a checkpoint's files.
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights")
# Where one of these is there, readers open no pickle.
_PLAIN = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
_ADDRESS = re.compile(r"hf://([^/@]+/[^/@]+)@([^/]+)/(.+)")
# By readers, to know what a checkpoint is and what lies beside it.
_LOOKED_INTO = re.compile(
    r"(.*/)?((adapter_|generation_|tokenizer_|router_|scheduler_)?config|modelmerge|modules|model_index|[^/]*\.index(\.[^/]+)?)\.json",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the Hub says of a file."""

    size: int
    sha256: str | None  # None for a file so small that git itself holds it
    blob: str | None = None  # git's digest of such a file, where it is known


class Repository:
    """A model repository at one commit, and the directory that shows it.

    Args:
        name: As in `org/name`.
        commit: The hash that everything is read at.
        files: All files of that commit by their place.
        inside: The folder or file in it that is meant; empty for the whole.
    """

    def __init__(self, name: str, commit: str, files: Mapping[str, RemoteFile], inside: str = "") -> None:
        self.name, self.commit, self.files, self.inside = name, commit, files, inside
        self._chunks = Chunks()
        root = tempfile.mkdtemp(prefix=OUTLINES)
        weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        self.directory = Path(root).resolve() / f"{name}@{commit[:12]}"
        self.directory.mkdir(parents=True)

    @property
    def text(self) -> str:
        """The reference that leads here and nowhere else."""
        return f"hf://{self.name}/{self.inside}@{self.commit}" if self.inside else f"{self.name}@{self.commit}"

    @property
    def below(self) -> dict[str, str]:
        """The places of all files in the folder that is meant, by their places there."""
        front = f"{self.inside}/" if self.inside else ""
        return {place.removeprefix(front): place for place in self.files if place.startswith(front)}

    def place(self, file: Path) -> str:
        """A file of the outline, by its place in the repository."""
        return file.relative_to(self.directory).as_posix()

    def address(self, file: Path) -> str:
        """A file of the outline, by the name that it has for everybody."""
        return f"hf://{self.name}@{self.commit}/{self.place(file)}"

    def sha256(self, file: Path) -> str | None:
        """The digest that the Hub gives for a file, where it gives one."""
        return self.files[self.place(file)].sha256

    def is_here(self, file: Path) -> bool:
        """Whether a file of the outline is whole, and not a sparse copy."""
        return file.is_symlink()

    def ranges(self, file: Path) -> Ranges:
        """A file of the outline, to be read where it is."""
        remote = self.files[self.place(file)]
        return Ranges(self.name, self.commit, self.place(file), remote.size, remote.sha256 or "", self._chunks)

    def outline(self, named_folders: Callable[[Path], Sequence[str]]) -> Path:
        """Make the outline; the directory or file in it that the reference means.

        Args:
            named_folders: The folders in a directory of the outline that the files there name as a model's.

        Raises:
            HubError: The Hub refuses, or cannot be reached.
        """
        inside = PurePosixPath(self.inside)
        whole = self.inside not in self.files
        waiting = [inside if whole else inside.parent]
        for folder in waiting:  # which grows on the way
            beside = [place for place in self.files if PurePosixPath(place).parent == folder]
            weights = [place for place in beside if place.endswith(_WEIGHTS)]
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(_REQUESTS) as pool:
                list(pool.map(self.bring, filter(_LOOKED_INTO.fullmatch, beside)))
                readable = self._readable(weights, self.directory / folder)
                list(pool.map(self._draw, weights, (place in readable for place in weights)))
            below = [folder / name for name in named_folders(self.directory / folder)] if whole else []
            waiting += [place for place in below if place not in waiting and self._has_files(place)]
        return self.directory / inside

    def _has_files(self, folder: PurePosixPath) -> bool:
        return any(folder in PurePosixPath(place).parents for place in self.files)

    def bring(self, place: str, progress: Any = None) -> None:
        """Have a file in the shared cache, and a link to it in the outline.

        Raises:
            HubError: The Hub refuses, or cannot be reached.
        """
        with explained(self.name):
            cached = hf_hub_download(
                self.name, place, revision=self.commit, tqdm_class=progress or _NoProgress, **LIBRARY
            )
        file = self.directory / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(Path(cached).resolve())

    def is_cached(self, place: str) -> bool:
        """Whether the shared cache has a file."""
        return isinstance(try_to_load_from_cache(self.name, place, revision=self.commit), str)

    def _readable(self, weights: Sequence[str], folder: Path) -> set[str]:
        """Of weight files side by side, those that a reader may open: not the copies of the model in other kinds."""
        if self.inside in weights:
            return {self.inside}
        indices = [*folder.glob("*.index.json"), *folder.glob("*.index.*.json")]
        listed = " ".join(index.read_text(errors="replace") for index in indices)
        kinds = [[place for place in weights if place.endswith(end)] for end in (".safetensors", ".bin")]
        readable: set[str] = set()
        for places in kinds:
            names = {place: PurePosixPath(place).name for place in places}
            readable |= {p for p, name in names.items() if name.startswith(_STEMS) or name in listed or len(names) == 1}
            if any(name in _PLAIN or name in listed for name in names.values()):
                break
        return readable

    def _draw(self, place: str, readable: bool) -> None:
        """Put a weight file into the outline: whole if the cache has it or git holds it, else as a sparse copy."""
        remote, file = self.files[place], self.directory / place
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.is_cached(place) or (readable and remote.sha256 is None):
            self.bring(place)
        elif not readable:
            sparse.blank(file, remote.size)
        elif not sparse.draw(file, self.ranges(file), remote.size):
            self.bring(place)


def find(name: str, revision: str | None, inside: str = "") -> Repository:
    """The repository of that name, pinned to the commit that a branch, tag, pull request or hash names.

    Without a connection, and with HF_HUB_OFFLINE, what the cache holds is taken.

    Raises:
        ReferenceNotFound: There is no such repository, revision, folder or file.
        HubError: The Hub refuses, or cannot be reached.
    """
    api = Client()
    with explained(name, revision, finding=True):
        offline = constants.is_offline_mode()
        commit = api.resolve_revision(name, revision=revision, local_files_only=offline).resolved
        files = _files(api, name, commit)
    if inside and inside not in files and not any(place.startswith(f"{inside}/") for place in files):
        folders = sorted({place.partition("/")[0] for place in files})
        raise ReferenceNotFound(
            f"{name} has no '{inside}' on the Hub, at commit {commit[:12]}", hint=f"it holds: {', '.join(folders[:8])}"
        )
    return Repository(name, commit, files, inside)


def _files(api: Client, name: str, commit: str) -> dict[str, RemoteFile]:
    """The files of a commit; those in the shared cache, where the Hub cannot be reached."""
    failure: Exception | None = None
    if api.answer is None:  # it was not asked for a hash, or could not be
        try:
            api.model_info(name, revision=commit)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            failure = error
    if api.answer is not None:
        files = api.answer.siblings or []
        return {
            file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in files
        }
    try:
        folder = Path(snapshot_download(name, revision=commit, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError as error:
        raise failure or error from None
    cached_files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): RemoteFile(file.stat().st_size, None) for file in cached_files}


def fetch(downloads: Sequence[tuple[Repository, Sequence[str]]], progress: Reporter) -> None:
    """Have the files of each repository in the shared cache, linked to from its outline.

    Raises:
        HubError: The disk is too small, the Hub refuses, or cannot be reached.
    """
    total, free = (sum(download_bytes(*entry) for entry in downloads), free_bytes()) if downloads else (0, 0)
    if total > free:
        raise HubError(
            f"{total:,} bytes have to be downloaded, and {cache_directory()} has {free:,} free",
            hint=f"free some space, move the cache (HF_HOME), or read without storing: {named('stream')}",
        )
    if total:
        progress.stage("downloading", total)
    stop = threading.Event()
    waiting: SimpleQueue[tuple[Future[None], Callable[[], None]]] = SimpleQueue()
    futures = []
    for repository, place in [(repository, place) for repository, places in downloads for place in places]:
        futures.append(Future[None]())
        waiting.put((futures[-1], partial(repository.bring, place, _progress(progress, place, stop))))
    # Not a pool: the interpreter would wait for its threads, and a download can take hours.
    threads = [threading.Thread(target=_work_off, args=(waiting, stop), daemon=True) for _ in futures[:_DOWNLOADS]]
    try:
        for thread in threads:
            thread.start()
        under_way = set(futures)
        while under_way:
            done, under_way = wait(under_way, _LOOK, FIRST_EXCEPTION)
            for future in done:
                future.result()
            interrupts.check()
    except BaseException:
        stop.set()
        close_session()  # breaks off what is under way
        raise
    finally:
        patience = time.monotonic() + 5.0
        for thread in threads:
            thread.join(max(patience - time.monotonic(), 0.0))


def _work_off(waiting: SimpleQueue[tuple[Future[None], Callable[[], None]]], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            future, work = waiting.get_nowait()
        except Empty:
            return
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)


def download_bytes(repository: Repository, places: Sequence[str]) -> int:
    """Bytes that `fetch` would have to download for these files."""
    return sum(repository.files[place].size for place in places if not repository.is_cached(place))


def free_bytes() -> int:
    """Bytes that the disk of the shared cache has left."""
    place = cache_directory()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def cached(address: str) -> Path | None:
    """The file that a manifest calls `hf://org/name@commit/place`, where the cache has it; no connection is made."""
    match = _ADDRESS.fullmatch(address)
    file = try_to_load_from_cache(match[1], match[3], revision=match[2]) if match else None
    return Path(file) if isinstance(file, str) else None


def cache_directory() -> Path:
    """The cache that all Hugging Face tools share."""
    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


class _Interrupted(Exception):
    """The run stops: a download that is under way shall not go on."""


class _NoProgress:
    """What the client asks of a progress bar, doing nothing.

    It has no `total`, as bars have that the client draws: then the client leaves sums to others.
    """

    def __init__(self, *words: object, **named: object) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, amount: float | None = 1) -> None:
        """So much more of the file is there."""

    def update_transfer(self, amount: float | None = 1) -> None:
        """So much more has come over the network, which may be less than it makes of the file."""

    def set_postfix_str(self, *words: object, **named: object) -> None:
        """The speed, as text."""

    set_transfer_postfix_str = refresh = close = set_postfix_str


def _progress(progress: Reporter, place: str, stop: threading.Event) -> Any:
    """A class that the client takes for its progress bar, and that passes the bytes on to a progress."""

    class Progress(_NoProgress):
        def __init__(self, *words: object, **named: object) -> None:
            if stop.is_set():  # the answer to a request that was still on its way when the run was stopped
                raise _Interrupted

        def update(self, amount: float | None = 1) -> None:
            if stop.is_set():
                raise _Interrupted
            progress.advance(int(amount or 0), place)

    return Progress
