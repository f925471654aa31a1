"""Pushing a finished directory to the Hugging Face Hub: access checked beforehand, one commit, nothing stale left."""

from __future__ import annotations

import glob
import queue
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, constants, get_token, utils
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from modelmerge.errors import HubError, UsageError, named
from modelmerge.hub.ranges import Client, explained, patiently
from modelmerge.progress import Reporter

# What loaders take for a model's weights, or for what says where they are: of an older model, it would win or confuse.
_WEIGHTS = re.compile(
    r"(model|(diffusion_)?pytorch_model|adapter_model|consolidated|tf_model|flax_model)[\w.\-]*"
    r"\.(safetensors|bin|h5|msgpack|index(\.[\w\-]+)?\.json)|adapter_config\.json"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A repository to push to.

    Args:
        name: As in `org/name`.
        revision: The branch or pull request (`refs/pr/7`) to commit to; None for the main branch.
        private: Make it a private one if it is new; refuse one that is public.
        create_pr: Open a pull request instead of committing.
        message: The commit's first line.
    """

    name: str
    revision: str | None = None
    private: bool = False
    create_pr: bool = False
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where it went: the page to look at, and the commit."""

    url: str
    commit: str


def parse_target(text: str, **settings: Any) -> Target:
    """The target that `org/name[@revision]` names.

    Raises:
        UsageError: It names none.
    """
    name, _, revision = text.removeprefix("hf://").partition("@")
    try:
        utils.validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise UsageError(f"'{text}' is no repository to push to", hint="write it like org/name, or org/name@branch")
    if revision and settings.get("create_pr"):
        raise UsageError("opens a pull request against the main branch", option="create_pr", hint=f"push to {name}")
    return Target(name=name, revision=revision or None, **settings)


def check(target: Target, *, create: bool = True) -> dict[str, Any]:
    """Make sure that a push will be allowed, and make the repository if there is none; what there is of it.

    Args:
        target: Where to.
        create: False to leave all as it is, and take a missing repository for one that could be made.

    Raises:
        HubError: It will not, or the Hub cannot be reached.
        ReferenceNotFound: There is no repository to open a pull request in, or no such branch.
    """
    name, api = target.name, Client()
    if get_token() is None:
        raise HubError(f"pushing to {name} needs a token", hint="log in: hf auth login, or set HF_TOKEN")
    with explained(name, target.revision):
        try:
            # Whoever may read a repository may open a pull request.
            patiently(lambda: api.auth_check(name, write=not target.create_pr))
            new = False
        except RepositoryNotFoundError:
            if target.create_pr or target.revision:
                raise
            new = True
            if create:
                api.create_repo(name, private=target.private or None, exist_ok=True)
        private = target.private if new else bool(api.model_info(name, revision=target.revision).private)
    if target.private and not private:
        raise HubError(
            f"{named('private')}, but {name} exists and is public",
            hint=f"push to another name, or make it private first: {constants.ENDPOINT}/{name}/settings",
        )
    return {"repository": name, "new": new, "private": private, "pull_request": target.create_pr}


class Uploader:
    """Uploads the weight files of a push to come while others are being made: one at a time, from a thread of its own.

    The Hub knows them by their digests, so that the commit finds them there. What is not there by then goes with the
    commit, so nothing that fails here is an error.

    Args:
        target: Where to; `check` has allowed it before the first file is added.
        progress: Hears of what failed.
    """

    def __init__(self, target: Target, progress: Reporter) -> None:
        self.target = target
        self.commits = True  # whether the commit is this process's to make; else that of one that shares the merge
        self._progress = progress
        self._waiting: queue.SimpleQueue[tuple[str, Path] | None] = queue.SimpleQueue()
        self._closes = False
        # A process that is told to end does not wait for it.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Uploader:
        self._quiet = utils.are_progress_bars_disabled()
        utils.disable_progress_bars()  # the merge has its own
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()

    def add(self, place: str, file: Path) -> None:
        """Upload a file that will be at that place in the repository, when its turn comes. From any thread."""
        self._waiting.put((place, file))

    def close(self) -> None:
        """Wait for the file that is being uploaded, and leave the others to the commit."""
        self._closes = True
        self._waiting.put(None)
        self._thread.join()
        if not self._quiet:
            utils.enable_progress_bars()

    def _run(self) -> None:
        api = Client()
        while (entry := self._waiting.get()) is not None and not self._closes:
            place, file = entry
            try:
                with explained(self.target.name, self.target.revision):
                    addition = CommitOperationAdd(path_in_repo=place, path_or_fileobj=file)
                    api.preupload_lfs_files(self.target.name, [addition], revision=self.target.revision)
            except Exception as error:  # whatever it is, the commit meets it again
                self._progress.note(f"{place} goes with the commit, for its upload failed: {error}")


def upload(target: Target, directory: Path, instead: Mapping[str, bytes], message: str, *, progress: bool) -> Pushed:
    """Commit a directory's files, and with the same commit delete what an older model has left beside them.

    Args:
        target: Where to.
        directory: Its files.
        instead: Content by place, for files whose copy on the Hub shall be another.
        message: The commit's first line.
        progress: Let the client draw its progress bars.

    Raises:
        HubError: The Hub refuses, or cannot be reached.
    """
    places = {file.relative_to(directory).as_posix(): file for file in directory.rglob("*") if file.is_file()}
    quiet = utils.are_progress_bars_disabled()
    if not progress:
        utils.disable_progress_bars()
    try:
        with explained(target.name, target.revision), tempfile.TemporaryDirectory(prefix="modelmerge-push-") as root:
            for place, file in places.items():
                link = Path(root, place)
                link.parent.mkdir(parents=True, exist_ok=True)
                if place in instead:
                    link.write_bytes(instead[place])
                else:
                    link.symlink_to(file.resolve())
            api = Client()
            there = api.list_repo_files(target.name, revision=target.revision)
            stale = [glob.escape(place) for place in there if _is_stale(place, places)]
            answer = api.upload_folder(
                repo_id=target.name, folder_path=root, commit_message=message, revision=target.revision,
                create_pr=target.create_pr, delete_patterns=stale or None,
            )  # fmt: skip
    finally:
        if not quiet:
            utils.enable_progress_bars()
    page = f"{constants.ENDPOINT}/{target.name}"
    url = answer.pr_url or (f"{page}/tree/{target.revision}" if target.revision else page)
    return Pushed(url, answer.oid)


def _is_stale(place: str, written: Mapping[str, Path]) -> bool:
    """Whether a file of the repository is of the weights that the written ones replace: it lies among them."""
    folders = {PurePosixPath(other).parent for other in written if other.endswith(".safetensors")}
    path = PurePosixPath(place)
    return place not in written and path.parent in folders and _WEIGHTS.fullmatch(path.name) is not None
