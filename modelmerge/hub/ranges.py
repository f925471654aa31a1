"""What goes over the wire to the Hugging Face Hub: questions with patience, ranges of files, and what errors mean."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelInfo, constants, errors, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from modelmerge import interrupts
from modelmerge._version import __version__
from modelmerge.errors import HubError, ModelMergeError, ReferenceNotFound

Answer = TypeVar("Answer")

LIBRARY: dict[str, Any] = {"library_name": "modelmerge", "library_version": __version__}  # what the Hub learns
_TIMEOUT = 20.0  # seconds without a byte before a connection counts as dead
_TRIES = 5  # attempts without progress before giving up
_PAUSES = (0.5, 1.0, 2.0)  # seconds between questions that the Hub was too busy to answer
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_CHUNK = 8 << 20  # bytes of a stream that are read at a time, where less is asked for
_CHUNKS = 3  # so many are kept of a repository
STREAM_BYTES = (_CHUNKS + 1) * _CHUNK  # memory that the stream of a repository takes
# What the client raises; RuntimeError and ValueError for uploads that fail and answers that make no sense.
_CLIENT_ERRORS = (
    errors.HTTPError, OSError, RuntimeError, ValueError, errors.RevisionResolutionError, errors.XetDownloadError,
    errors.EntryNotFoundError,
)  # fmt: skip
_LOG_IN = "log in: hf auth login, or set HF_TOKEN"


class Chunks:
    """The last few chunks of what is streamed from a repository: workers go through it side by side."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, url: str, index: int, read: Callable[[], bytes]) -> bytes:
        """A chunk of the file at that address, read if it is not among them."""
        with self._lock:
            if (url, index) in self._chunks:
                self._chunks.move_to_end((url, index))
            else:
                self._chunks[url, index] = read()
                if len(self._chunks) > _CHUNKS:
                    self._chunks.popitem(last=False)
            return self._chunks[url, index]


class Ranges:
    """A file of a repository at a commit, read over ranges; what breaks off is asked for again from there.

    Thread-safe. Its digest is the one that the Hub gives, for the bytes do not all pass here once and in order.
    """

    def __init__(self, name: str, commit: str, place: str, size: int, sha256: str, chunks: Chunks) -> None:
        self._address = f"{name}/{place}"
        self._size = size
        self._sha256 = sha256
        self._url = hf_hub_url(name, place, revision=commit)
        self._location = ""  # where the Hub redirects to: asking there at once spares it a request
        self._chunks = chunks

    def read(self, buffer: memoryview, position: int, *, follow: bool) -> int:
        """Fill `buffer` from `position` on as far as the file goes; the bytes read.

        Small reads in a row (`follow`) are served from larger ones.

        Raises:
            HubError: The Hub refuses, or the connection breaks again and again.
        """
        count = max(min(len(buffer), self._size - position), 0)
        if not follow or count >= _CHUNK:
            self._fill(buffer[:count], position)
            return count
        done = 0
        while done < count:
            index, start = divmod(position + done, _CHUNK)
            part = self._chunks.get(self._url, index, partial(self._chunk, index))[start : start + count - done]
            buffer[done : done + len(part)] = part
            done += len(part)
        return count

    def slice(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        buffer = bytearray(stop - start)
        self._fill(memoryview(buffer), start)
        return bytes(buffer)

    def finish(self) -> str:
        """The sha256 that the Hub gives."""
        return self._sha256

    def close(self) -> None:
        """Nothing to let go of: connections are the client's."""

    def _chunk(self, index: int) -> bytes:
        return self.slice(index * _CHUNK, min((index + 1) * _CHUNK, self._size))

    def _fill(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer` with the bytes from `position` on: all of them, or an error."""
        done = failures = 0
        while done < len(buffer):
            before = done
            interrupts.check()
            try:
                done = self._receive(buffer, done, position)
                error: Exception | None = None
            except errors.HTTPError as raised:
                error = raised
            failures = 0 if done > before else failures + 1
            if self._location and isinstance(error, errors.HfHubHTTPError):
                self._location = ""  # such an address lives for an hour or so
            elif error and (failures > _TRIES or isinstance(error, errors.HfHubHTTPError)):
                raise explain(error, self._address) from error
            elif failures > _TRIES:
                raise HubError(f"{self._address}: the Hub sends nothing", hint="try again later")
            if done < len(buffer):
                time.sleep(min(0.1 * 2**failures, 8.0))

    def _receive(self, buffer: memoryview, done: int, position: int) -> int:
        """Fill `buffer` from `done` on with one request, as far as it goes; how far that was.

        Raises:
            HTTPError: Nothing came.
            HubError: Something else came than was asked for.
        """
        first, last = position + done, position + len(buffer) - 1
        headers = {} if self._location else build_hf_headers(**LIBRARY)
        headers |= {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        url, received = self._location or self._url, done
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT, retry_on_exceptions=()) as response:
                hf_raise_for_status(response)
                if response.headers.get("Content-Range") != f"bytes {first}-{last}/{self._size}":
                    raise HubError(
                        f"{self._address}: {response.url.host} does not serve ranges of files",
                        hint="a proxy may be in the way; hf download fetches whole files",
                    )
                if response.history:
                    self._location = str(response.url)
                for part in response.iter_raw():
                    interrupts.check()
                    buffer[received : received + len(part)] = part
                    received += len(part)
        except errors.HTTPError:
            if received == done:
                raise
        return received


class Client(HfApi):
    """The Hub's client, speaking for this package: it asks again where the Hub was busy, but does not wait for ever."""

    def __init__(self) -> None:
        super().__init__(**LIBRARY)
        self.answer: ModelInfo | None = None  # of the last question about a model

    def model_info(self, *words: Any, **named: Any) -> ModelInfo:
        """What the Hub knows of a model, always with its files' sizes."""
        named |= {"timeout": _TIMEOUT, "files_metadata": True}
        self.answer = patiently(lambda: HfApi.model_info(self, *words, **named))
        return self.answer


def patiently(ask: Callable[[], Answer]) -> Answer:
    """What `ask` gives; asked again a few times where the Hub was busy."""
    for pause in _PAUSES:
        try:
            return ask()
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in _TRANSIENT:
                raise
        time.sleep(pause)
    return ask()


@contextlib.contextmanager
def explained(name: str, revision: str | None = None, *, finding: bool = False) -> Iterator[None]:
    """Turn what the client raises about a repository into one line and a hint.

    Args:
        name: The repository.
        revision: As the user named it.
        finding: The name may also have been meant as a path.
    """
    try:
        yield
    except _CLIENT_ERRORS as error:
        raise explain(error, name, revision, finding=finding) from error


def explain(error: Exception, name: str, revision: str | None = None, *, finding: bool = False) -> ModelMergeError:
    """The error of ours that says what an error of the client means; see `explained`."""
    while isinstance(error, (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, RuntimeError)):
        if not isinstance(error.__cause__, Exception):
            break
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{name} is gated: its owner decides who may read it", hint=f"ask at {page}, then {_LOG_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        text = f"'{name}' is neither a path here nor" if finding else f"{name} is not"
        return ReferenceNotFound(
            f"{text} a repository on the Hub that you may see", hint=f"check the spelling; if it is private, {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ReferenceNotFound(f"{name} has no revision '{revision or 'main'}'", hint=_revisions(name))
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{name} has been disabled", hint=f"see {page}")
    if isinstance(error, errors.OfflineModeIsEnabled) and not finding:
        return HubError(f"{name}: HF_HUB_OFFLINE forbids to ask the Hub", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.RevisionResolutionError)):
        what = f"{name}@{revision}" if revision else name
        if finding:
            what = f"'{what}' is not a path here, and"
        return HubError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub",
            hint=f"unset HF_HUB_OFFLINE, or fetch it where there is a connection: hf download {name}",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, name)
    if isinstance(error, errors.HTTPError):
        host = constants.ENDPOINT.partition("://")[2]
        what = f"'{name}' is not a path here, and {host}" if finding else f"{name}: {host}"
        return HubError(
            f"{what} cannot be reached: {str(error) or type(error).__name__}",
            hint="check the connection; what is in the cache already needs none",
        )
    if isinstance(error, OSError) and error.strerror:
        return HubError(f"{name}: {error.strerror}: {error.filename or constants.HF_HUB_CACHE}", hint="free some space")
    text = (str(error) or type(error).__name__).splitlines()[0]
    return HubError(f"{name}: {text}", hint="run the command again")


def _refused(error: errors.HfHubHTTPError, name: str) -> HubError:
    status = error.response.status_code
    if status == 401:
        return HubError(f"{name}: the Hub does not accept your token", hint=f"{_LOG_IN} anew")
    if status == 403:
        return HubError(
            f"{name}: your token may not do this: {error.server_message or 'forbidden'}",
            hint="give it the permission: https://huggingface.co/settings/tokens",
        )
    if status == 429:
        return HubError(f"{name}: the Hub has had too many requests", hint=f"wait some minutes, or {_LOG_IN}")
    return HubError(f"{name}: the Hub answered {status}", hint="try again later; see https://status.huggingface.co")


def _revisions(name: str) -> str:
    """A hint that names a repository's branches and tags, where they can be had."""
    with contextlib.suppress(Exception):
        refs = Client().list_repo_refs(name)
        return f"it has: {', '.join(ref.name for ref in [*refs.branches, *refs.tags][:8])}"
    return f"see {constants.ENDPOINT}/{name}"
