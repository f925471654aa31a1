"""Merges that are made of other merges: a recipe with stages, each planned before any is run.

A stage is a merge whose result another one takes. It is kept beside the output, in `.DIR.modelmerge-stages`, until no
merge is left that takes it; where an interrupted run is to be taken up, until all is done. Before it is there, the next
one is planned from its outline: config, tokenizer and headers as they will be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmerge import interrupts
from modelmerge.checkpoint.output import check_output, finished
from modelmerge.checkpoint.reference import STAGE
from modelmerge.checkpoint.scratch import hidden_beside, reason
from modelmerge.engine.parallel import threads
from modelmerge.errors import ModelMergeError, OutputError
from modelmerge.plan.downloads import input_paths
from modelmerge.plan.recipe import Recipe
from modelmerge.progress import Reporter
from modelmerge.verbs.output import files_beside
from modelmerge.verbs.prepare import Prepared, digest_of, threads_of_leftovers

if TYPE_CHECKING:
    from modelmerge.hub.upload import Uploader

Make = Callable[[Mapping[str, Path]], Prepared]  # plans a merge, given the places of the stages before it


@dataclass(frozen=True, slots=True)
class Staged:
    """The stages of a merge, in their order, planned from outlines.

    Args:
        makes: What plans each stage, by its name.
        final: What plans the merge itself.
        plans: The stages as they were planned.
        outlines: Where the outlines are.
    """

    makes: Mapping[str, Make]
    final: Make
    plans: Mapping[str, Prepared]
    outlines: tempfile.TemporaryDirectory[str]

    def describe(self) -> list[dict[str, Any]]:
        """The plans of the stages."""
        return [{"name": name, **plan.describe()} for name, plan in self.plans.items()]

    def needed(self, done: int, final: Recipe) -> list[str]:
        """The first `done` stages, less those that neither the `final` merge nor a stage after them is made of."""
        later = [*[plan.recipe for plan in self.plans.values()][done:], dataclasses.replace(final, stages={})]
        text = json.dumps([dataclasses.asdict(recipe) for recipe in later], default=str)
        return [name for name in list(self.plans)[:done] if json.dumps(f"{STAGE}{name}")[1:-1] in text]

    def bytes_kept(self, final: Recipe) -> int:
        """Bytes of the weights that lie beside the output at once, at most, where each goes as soon as it can."""
        sizes = {name: plan.job.plan.bytes_written for name, plan in self.plans.items()}
        lie = [[*self.needed(done, final), name] for done, name in enumerate(sizes)] + [self.needed(len(sizes), final)]
        return max(sum(sizes[name] for name in names) for names in lie)

    def close(self) -> None:
        """Let go of the inputs and the outlines."""
        for plan in self.plans.values():
            plan.close()
        self.outlines.cleanup()


def staged(makes: Mapping[str, Make], final: Make) -> Prepared:
    """Plan a merge and the stages before it; nothing is written.

    Raises:
        ModelMergeError: Whatever can be known to be wrong before a tensor is read, with the stage's name in front.
    """
    if not makes:
        return final({})
    outlines = tempfile.TemporaryDirectory(prefix="modelmerge-stages-")
    plans: dict[str, Prepared] = {}
    places: dict[str, Path] = {}
    try:
        for name, make in makes.items():
            plans[name] = _made(name, make, places)
            places[name] = Path(outlines.name) / name
            try:
                _draw(plans[name], places[name])
            except OSError as error:
                raise OutputError(f"cannot plan with {places[name]}: {reason(error)}") from error
        last = final(places)
    except BaseException:
        Staged(makes, final, plans, outlines).close()
        raise
    return _with_recipes(dataclasses.replace(last, staged=Staged(makes, final, plans, outlines)), plans)


def _made(name: str, make: Make, places: Mapping[str, Path]) -> Prepared:
    try:
        return make(places)
    except ModelMergeError as error:
        raise type(error)(f"in '{name}': {error.template}", hint=error.hint_template) from error


def _with_recipes(prepared: Prepared, plans: Mapping[str, Prepared]) -> Prepared:
    recipes = {name: plan.recipe for name, plan in plans.items()}
    return dataclasses.replace(prepared, recipe=dataclasses.replace(prepared.recipe, stages=recipes))


def _draw(prepared: Prepared, folder: Path) -> None:
    """Draw the outline of what a merge will write: sparse files that hold their headers.

    No two tensors begin alike but those that are tied, for readers look at that.
    """
    plan = prepared.job.plan
    for name, content in {**files_beside(prepared), **plan.layout.indices}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    numbers = {name: number for number, name in enumerate(plan.tensors, 1)}
    for shard in plan.layout.shards:
        (folder / shard.filename).parent.mkdir(parents=True, exist_ok=True)
        with (folder / shard.filename).open("wb") as stream:
            stream.write(shard.header)
            for name, start in shard.tensors.items():
                tensor = plan.tensors[name]
                stream.seek(start)
                stream.write(numbers[tensor.twin or name].to_bytes(8, "little")[: tensor.out_bytes])
            stream.truncate(shard.file_bytes)


def run(
    prepared: Prepared, out: Path, execute: Callable[..., dict[str, Any]], *, force: bool, resume: bool,
    cluster: str | None, ready: Callable[[], object] | None, uploader: Uploader | None, progress: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Run the stages of a merge and the merge itself, by `execute`; its manifest. The stages are removed then.

    Where a run with `resume`, or with others of a `cluster`, is interrupted, they stay and are taken up by the next.

    Raises:
        ModelMergeError: As for `merge`.
    """
    staged, recorded = prepared.staged, prepared.recorded
    assert staged is not None, "it has stages"
    work = hidden_beside(out.resolve(), "modelmerge-stages")
    with contextlib.ExitStack() as stack:
        if recorded is not None and recorded.threads is not None:
            stack.enter_context(threads(recorded.threads))
        before = _digests(staged.plans)
        same = dataclasses.replace(prepared, staged=None, before=before)
        if resume:
            stack.enter_context(threads_of_leftovers(out, digest_of(same)))
        keep, how = resume or cluster is not None, {"resume": resume, "cluster": cluster, "progress": progress}
        if keep and finished(out, digest_of(same), hashed=resume):
            _clear(work)
            return execute(same, out, force=force, ready=ready, **how)
        try:
            for plan in (*staged.plans.values(), prepared):
                paths = [path for path in input_paths(plan.job.plan) if not _is_in(path, staged)]
                check_output(out, paths, force=force)
        except OutputError:
            if cluster is None or not finished(
                out, digest_of(same), hashed=False
            ):  # by others, since it was looked for
                raise
            return execute(same, out, force=force, **how)
        if ready is not None:
            ready()
        try:
            _make_room(work, 0 if keep else staged.bytes_kept(prepared.recipe) + prepared.job.plan.bytes_written)
            places: dict[str, Path] = {}
            results: dict[str, dict[str, Any]] = {}
            for i, (name, make) in enumerate(staged.makes.items()):
                part = dataclasses.replace(_made(name, make, places), before=before[:i])
                places[name] = work / name
                progress.note(f"'{name}' is merged first, {i + 1} of {len(staged.makes)}")
                results[name] = execute(part, places[name], force=True, **how)
                for idle in () if keep else results.keys() - staged.needed(i + 1, prepared.recipe):
                    shutil.rmtree(places[idle], ignore_errors=True)
            last = _with_recipes(staged.final(places), staged.plans)
            last = dataclasses.replace(last, before=before, results=results)
            manifest = execute(last, out, force=force, uploader=uploader, **how)
        except BaseException as error:
            if cluster is not None and isinstance(error, Exception) and finished(out, digest_of(same), hashed=False):
                return execute(same, out, force=force, **how)  # others have finished it and removed the stages
            if not keep:
                _clear(work)
            raise
        _clear(work)
        return manifest


def _digests(plans: Mapping[str, Prepared]) -> tuple[str, ...]:
    """The digest of all that determines each stage, those before it included."""
    digests: tuple[str, ...] = ()
    for plan in plans.values():
        # Without the number of threads, which a run that is taken up is given.
        digests += (digest_of(dataclasses.replace(plan, before=digests)).split()[0],)
    return digests


def _is_in(path: Path, staged: Staged) -> bool:
    return Path(staged.outlines.name) in path.parents


def _clear(work: Path) -> None:
    with interrupts.held():
        shutil.rmtree(work, ignore_errors=True)


def _make_room(work: Path, nbytes: int) -> None:
    """Make the folder of the stages, where so many bytes will go.

    Raises:
        OutputError: It cannot be made, or there is less room.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(work).free
    except OSError as error:
        raise OutputError(f"cannot make {work}: {reason(error)}", hint="name another place for the output") from error
    if nbytes > free:
        raise OutputError(
            f"the output and the merges before it need {nbytes:,} bytes, and {work.parent} has {free:,} free",
            hint="free some space or name another place",
        )
