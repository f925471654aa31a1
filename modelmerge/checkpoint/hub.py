"""The Hugging Face Hub: repositories pinned to a commit, their headers by range, their files in the cache or streamed.

A repository is shown to the readers as a directory, its outline: small files whole, weight files as sparse files of
their full size that hold the header and nothing more. Planning reads nothing else, so that it costs kilobytes. Before
the work, `fetch` puts the weight files that the plan needs into the cache that all Hugging Face tools share, and into
the outline links to them; what it leaves out is read over ranges, tensor by tensor (`Ranges`).
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # from there: whichever httpx this version of the client is built on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from modelmerge import __version__
from modelmerge.errors import OUTLINES, HubError, ModelMergeError, ReferenceNotFound
from modelmerge.report import Reporter

Answer = TypeVar("Answer")

_TIMEOUT = 20.0  # seconds without a byte before a connection counts as dead
_TRIES = 5  # attempts without progress before giving up
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_DOWNLOADS = 4  # files at a time
_HEADER = 100_000  # bytes of a weight file to ask for first: most headers are shorter
_CHUNK = 4 << 20  # bytes of a stream that are read at a time, where less is asked for
_CHUNKS = 4  # so many are kept of a file: workers go through it side by side
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot")
_TOKENIZER = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens")
_SMALL_JSON = 10_000_000  # bytes: no config and no index is longer


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the Hub says of a file."""

    size: int
    sha256: str | None  # None for a file so small that git itself holds it


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
        root = tempfile.mkdtemp(prefix=OUTLINES)
        weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        self.directory = Path(root).resolve() / f"{name}@{commit[:12]}"
        self.directory.mkdir(parents=True)

    @property
    def text(self) -> str:
        """The reference that leads here and nowhere else."""
        return f"hf://{self.name}/{self.inside}@{self.commit}" if self.inside else f"{self.name}@{self.commit}"

    def place(self, file: Path) -> str:
        """A file of the outline, by its place in the repository."""
        return file.relative_to(self.directory).as_posix()

    def address(self, file: Path) -> str:
        """A file of the outline, as anybody can find it."""
        return f"hf://{self.name}@{self.commit}/{self.place(file)}"

    def sha256(self, file: Path) -> str | None:
        """The digest that the Hub gives for a file, where it gives one."""
        return self.files[self.place(file)].sha256

    def is_outlined(self, file: Path) -> bool:
        """Whether a file of the outline holds its header only."""
        return not file.is_symlink()

    def ranges(self, file: Path) -> Ranges:
        """A file of the outline, to be read where it is."""
        return Ranges(self, self.place(file))

    def outline(self) -> Path:
        """Make the outline; the directory or file in it that the reference means.

        Raises:
            HubError: The Hub refuses, or cannot be reached.
        """
        inside = PurePosixPath(self.inside)
        folder = inside.parent if self.inside in self.files else inside
        beside = [place for place in self.files if PurePosixPath(place).parent == folder]
        small = [place for place in beside if self._is_read_whole(place)]
        weights = [place for place in beside if place.endswith(_WEIGHTS)]
        with _explained(self.name), ThreadPoolExecutor(_DOWNLOADS) as pool:
            list(pool.map(self._bring, small))
            outlined = self._outlined(weights, self.directory / folder)
            list(pool.map(self._outline_one, weights, (place in outlined for place in weights)))
        return self.directory / inside

    def _is_read_whole(self, place: str) -> bool:
        """Whether an opener may want to read the file, to know what the checkpoint is."""
        name = PurePosixPath(place).name
        return name.endswith(".json") and not name.startswith(_TOKENIZER) and self.files[place].size <= _SMALL_JSON

    def _outlined(self, weights: Sequence[str], folder: Path) -> set[str]:
        """The weight files whose headers an opener may want: those of the checkpoint, not its copies in other kinds."""
        if self.inside in weights:
            return {self.inside}
        named = [place for place in weights if PurePosixPath(place).name.startswith(("model", "adapter_model"))]
        tensors = [place for place in named if place.endswith(".safetensors")]
        if (folder / "model.safetensors.index.json").exists():
            listed = (folder / "model.safetensors.index.json").read_text(errors="replace")
            tensors += [p for p in weights if p.endswith(".safetensors") and PurePosixPath(p).name in listed]
        pickles = [place for place in weights if place.endswith(".bin")]
        return set(tensors or pickles)

    def _outline_one(self, place: str, wanted: bool) -> None:
        file, remote = self.directory / place, self.files[place]
        file.parent.mkdir(parents=True, exist_ok=True)
        if _cached(self, place) or (wanted and (remote.sha256 is None or not _has_header(place))):
            self._bring(place)
        else:
            header = self._header(place) if wanted else b""
            with file.open("wb") as stream:
                stream.write(header)
                stream.truncate(remote.size)

    def _header(self, place: str) -> bytes:
        """The start of a safetensors file: the length of its header, and the header."""
        size, source = self.files[place].size, Ranges(self, place)
        start = bytearray(min(_HEADER, size))
        source.fill(memoryview(start), 0)
        length = 8 + int.from_bytes(start[:8], "little")
        if len(start) < length <= min(size, 100_000_000):
            rest = bytearray(length - len(start))
            source.fill(memoryview(rest), len(start))
            start += rest
        return bytes(start[:length])

    def _bring(self, place: str, progress: Any = None) -> None:
        """Have the file in the cache, and a link to it in the outline."""
        with _explained(self.name):
            found = hf_hub_download(
                self.name, place, revision=self.commit, tqdm_class=progress or _silent, library_name="modelmerge",
                library_version=__version__,
            )  # fmt: skip
        file = self.directory / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(Path(found).resolve())


def find(name: str, revision: str | None, inside: str = "") -> Repository:
    """The repository of that name, pinned to the commit that a branch, tag, pull request or hash names.

    Without a connection, and with HF_HUB_OFFLINE, what the cache holds is taken.

    Raises:
        ReferenceNotFound: There is no such repository, revision, folder or file.
        HubError: The Hub refuses, or cannot be reached.
    """
    api = _api()
    with _explained(name, revision, finding=True):
        commit = api.resolve_revision(name, revision=revision, local_files_only=constants.is_offline_mode()).resolved
        files = _listed(api, name, commit)
    if inside and inside not in files and not any(place.startswith(f"{inside}/") for place in files):
        folders = sorted({place.partition("/")[0] for place in files})
        raise ReferenceNotFound(
            f"{name} has no '{inside}' on the Hub, at commit {commit[:12]}", hint=f"it holds: {', '.join(folders[:8])}"
        )
    return Repository(name, commit, files, inside)


def fetch(wanted: Sequence[tuple[Repository, Sequence[str]]], reporter: Reporter) -> None:
    """Have the files of each repository in the shared cache, linked to from its outline.

    Raises:
        HubError: The disk is too small, the Hub refuses, or cannot be reached.
    """
    missing = [(repository, place) for repository, places in wanted for place in places]
    total = sum(download_bytes(repository, places) for repository, places in wanted)
    room = free_bytes()
    if total > room:
        raise HubError(
            f"{total:,} bytes have to be downloaded, and {constants.HF_HUB_CACHE} has {room:,} free",
            hint="free some space, point HF_HOME to another disk, or read without storing: --stream",
        )
    if total:
        reporter.stage("downloading", total)
    stop = threading.Event()
    pool = ThreadPoolExecutor(_DOWNLOADS, "download")
    try:
        made = [pool.submit(r._bring, place, _progress(reporter, place, stop)) for r, place in missing]
        for future in made:
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def download_bytes(repository: Repository, places: Sequence[str]) -> int:
    """Bytes that `fetch` would have to download for these files."""
    return sum(repository.files[place].size for place in places if not _cached(repository, place))


def free_bytes() -> int:
    """Bytes that the disk of the shared cache has left."""
    place = cache_directory()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def cache_directory() -> Path:
    """The cache that all Hugging Face tools share."""
    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


class Ranges:
    """A file of a repository, read over ranges; what arrives broken is asked for again from where it broke.

    Thread-safe. Its digest is the one that the Hub gives for the pinned commit: the bytes do not all pass here once,
    and in order.
    """

    def __init__(self, repository: Repository, place: str) -> None:
        self._repository, self._place = repository, place
        self._size = repository.files[place].size
        self._url = hf_hub_url(repository.name, place, revision=repository.commit)
        self._location = ""  # where the Hub redirects to: asking there again spares it a request
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, buffer: memoryview, position: int, *, follow: bool) -> int:
        """Fill `buffer` from `position` on as far as the file goes; the bytes read.

        Small reads in a row (`follow`) are served from larger ones.
        """
        count = max(min(len(buffer), self._size - position), 0)
        buffer = buffer[:count]
        if not follow or count >= _CHUNK:
            self.fill(buffer, position)
            return count
        done = 0
        while done < count:
            index, start = divmod(position + done, _CHUNK)
            part = self._chunk(index)[start : start + count - done]
            buffer[done : done + len(part)] = part
            done += len(part)
        return count

    def _chunk(self, index: int) -> bytes:
        with self._lock:
            if index in self._chunks:
                self._chunks.move_to_end(index)
            else:
                buffer = bytearray(min(_CHUNK, self._size - index * _CHUNK))
                self.fill(memoryview(buffer), index * _CHUNK)
                self._chunks[index] = bytes(buffer)
                if len(self._chunks) > _CHUNKS:
                    self._chunks.popitem(last=False)
            return self._chunks[index]

    def finish(self) -> str:
        """The sha256 that the Hub gives."""
        return self._repository.files[self._place].sha256 or ""

    def close(self) -> None:
        """Let go of what was read."""
        self._chunks.clear()

    def fill(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer` with the bytes from `position` on: all of them, or an error.

        Raises:
            HubError: The Hub refuses, or the connection breaks again and again.
        """
        done, failures = 0, 0
        while done < len(buffer):
            before = done
            try:
                done = self._receive(buffer, done, position)
            except HTTPError as error:
                moved = isinstance(error, HfHubHTTPError)
                if moved and self._location:
                    self._location = ""  # a signed address lives for an hour or so
                elif moved or failures == _TRIES:
                    raise _explain(error, f"{self._repository.name}/{self._place}") from error
            failures = 0 if done > before else failures + 1
            if failures > _TRIES:
                raise HubError(f"{self._repository.name}: the Hub sends nothing of {self._place}", hint="try again")
            if done < len(buffer):
                time.sleep(min(0.1 * 2**failures, 8.0))

    def _receive(self, buffer: memoryview, done: int, position: int) -> int:
        """Fill `buffer` from `done` on with one request, as far as it goes; how far that was."""
        url = self._location or self._url
        headers = {} if self._location else dict(build_hf_headers(library_name="modelmerge"))
        headers |= {"Range": f"bytes={position + done}-{position + len(buffer) - 1}", "Accept-Encoding": "identity"}
        received = done
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT, retry_on_exceptions=()) as response:
                hf_raise_for_status(response)
                told = f"bytes {position + done}-{position + len(buffer) - 1}/{self._size}"
                if response.status_code != 206 or response.headers.get("Content-Range") != told:
                    raise HubError(
                        f"{response.url.host} does not serve ranges of {self._repository.name}/{self._place}",
                        hint="download whole files: leave out --stream",
                    )
                if response.history:
                    self._location = str(response.url)
                for part in response.iter_raw():
                    buffer[received : received + len(part)] = part
                    received += len(part)
        except HTTPError:
            if received == done:
                raise
        return received


def _listed(api: HfApi, name: str, commit: str) -> dict[str, RemoteFile]:
    """The files of a commit; from the cache, where the Hub cannot be reached."""
    try:
        siblings = api.model_info(name, revision=commit, files_metadata=True).siblings or []
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        try:
            folder = Path(snapshot_download(name, revision=commit, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            raise error from None
        found = [file for file in folder.rglob("*") if file.is_file()]
        return {file.relative_to(folder).as_posix(): RemoteFile(file.stat().st_size, None) for file in sorted(found)}
    return {s.rfilename: RemoteFile(s.size or 0, s.lfs.sha256 if s.lfs else None) for s in siblings}


class _Api(HfApi):
    """The client with patience: a time limit to every question, and another try where the Hub was busy."""

    def model_info(self, *words: Any, **named: Any) -> ModelInfo:
        return _patiently(lambda: HfApi.model_info(self, *words, **{**named, "timeout": _TIMEOUT}))


def _api() -> HfApi:
    return _Api(library_name="modelmerge", library_version=__version__)


def _patiently(ask: Callable[[], Answer]) -> Answer:
    for pause in (0.5, 1.0, 2.0):
        try:
            return ask()
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in _TRANSIENT:
                raise
        time.sleep(pause)
    return ask()


def _has_header(place: str) -> bool:
    """Whether a weight file can be planned with from its header alone; adapters and pickles are looked into."""
    return place.endswith(".safetensors") and not PurePosixPath(place).name.startswith("adapter_model")


def _cached(repository: Repository, place: str) -> bool:
    return isinstance(try_to_load_from_cache(repository.name, place, revision=repository.commit), str)


class _Interrupted(Exception):
    """The run stops: a download that is under way shall not go on."""


def _progress(reporter: Reporter, place: str, stop: threading.Event) -> Any:
    """A class that the client can take for tqdm, and that passes the bytes on to a reporter."""

    class Progress(_Silent):
        def update(self, amount: float | None = 1) -> None:
            if stop.is_set():
                raise _Interrupted
            reporter.advance(int(amount or 0), place)

    return Progress


class _Silent:
    """What the client asks of a progress bar, doing nothing."""

    def __init__(self, *words: object, **named: object) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **named: None

    def update(self, amount: float | None = 1) -> None:
        """So much more has come."""


_silent: Any = _Silent


@contextlib.contextmanager
def _explained(name: str, revision: str | None = None, *, finding: bool = False) -> Iterator[None]:
    """Turn what the client raises into one line and a hint."""
    try:
        yield
    except (ModelMergeError, _Interrupted):
        raise
    except (HTTPError, OSError, RevisionResolutionError, XetDownloadError, EntryNotFoundError) as error:
        raise _explain(error, name, revision, finding=finding) from error


def _explain(error: Exception, name: str, revision: str | None = None, *, finding: bool = False) -> ModelMergeError:
    while isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError)) and isinstance(
        error.__cause__, Exception
    ):
        error = error.__cause__
    host = constants.ENDPOINT.partition("://")[2]
    page = f"{constants.ENDPOINT}/{name}"
    log_in = "log in: hf auth login, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return HubError(f"{name} is gated: its owner lets in who asks", hint=f"ask for access at {page}, then {log_in}")
    if isinstance(error, RepositoryNotFoundError):
        return ReferenceNotFound(
            f"'{name}' is neither a path here nor a repository on the Hub that you may see",
            hint=f"check the spelling; if it is private, {log_in}",
        )
    if isinstance(error, RevisionNotFoundError):
        return ReferenceNotFound(f"{name} has no revision '{revision or 'main'}'", hint=_revisions(name))
    if isinstance(error, DisabledRepoError):
        return HubError(f"{name} has been disabled by the Hub or its owner", hint=f"see {page}")
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError)):
        return HubError(
            f"{name}{f'@{revision}' * bool(revision)} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub",
            hint="unset HF_HUB_OFFLINE, or download it first where there is a connection",
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return HubError(f"{name}: the Hub does not accept your token", hint=f"{log_in} anew")
        if status == 403:
            return HubError(
                f"{name}: your token may not do this ({error.server_message or 'forbidden'})",
                hint="give it the permission at https://huggingface.co/settings/tokens",
            )
        if status == 429:
            return HubError(f"{name}: the Hub has had too many requests from here", hint="wait some minutes; log in")
        return HubError(f"{name}: the Hub answered {status}", hint="try again; https://status.huggingface.co")
    if isinstance(error, HTTPError):
        what = f"'{name}' is not a path here, and {host}" if finding else f"{name}: {host}"
        return HubError(
            f"{what} cannot be reached: {str(error) or type(error).__name__}",
            hint="check the connection; what has been downloaded before is found without one",
        )
    if isinstance(error, OSError) and error.strerror:
        return HubError(f"{name}: cannot be stored in {cache_directory()}: {error.strerror}", hint="free some space")
    return HubError(f"{name}: cannot be downloaded: {str(error).splitlines()[0]}", hint="run the command again")


def _revisions(name: str) -> str:
    """A hint that names a repository's branches and tags, if they can be had."""
    with contextlib.suppress(Exception):
        refs = _api().list_repo_refs(name)
        return f"it has: {', '.join(ref.name for ref in [*refs.branches, *refs.tags][:8])}"
    return f"see {constants.ENDPOINT}/{name}"
