"""An output: the last checks before the work, and its place once it is complete."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmerge import interrupts
from modelmerge.checkpoint.companions import companion_bytes, companions_of_output, token_ids
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.output import CARD, check_output, finished
from modelmerge.checkpoint.portable import portable
from modelmerge.checkpoint.publication import Publication
from modelmerge.checkpoint.staging import Staging, clear_remains
from modelmerge.checkpoint.templates import template_of, with_template
from modelmerge.engine.adapter import Adapted
from modelmerge.engine.job import Findings
from modelmerge.engine.parallel import prepare_process
from modelmerge.plan.downloads import input_paths
from modelmerge.plan.tensors import Plan
from modelmerge.plan.vocabulary import config_values, with_vocabulary
from modelmerge.progress import Reporter
from modelmerge.record.manifest import as_file, manifest_of, notes_of, record_of_stages, refuse_changed, write_card
from modelmerge.record.recorded import other_bits
from modelmerge.verbs import adapted
from modelmerge.verbs.prepare import Prepared

_RECORD = 512  # bytes of a tensor in a manifest, as a rule


class Output:
    """An output that may be written: `complete` is its manifest, where a resumed run finds it complete already."""

    def __init__(
        self, plan: Plan, out: Path, digest: str, complete: dict[str, Any] | None, force: bool, resume: bool,
        progress: Reporter, hand_on: Callable[[str, Path], object] | None = None,
    ) -> None:  # fmt: skip
        self.complete = complete
        self._hand_on = hand_on
        self._progress = progress
        self._plan, self._out, self._digest, self._force, self._resume = plan, out, digest, force, resume
        self._started = time.monotonic()
        self._stack = contextlib.ExitStack()

    def stage(
        self, layout: Layout | None = None, *, digest: str | None = None, resume: bool = True, companions: int = 0
    ) -> Staging:
        """Begin to write, into files of that layout.

        Args:
            layout: The weight files, where they are known already; else `Staging.lay_out` makes them.
            digest: Of all that determines their bytes, where that has become known since.
            resume: Take up shards of an interrupted run, where that was asked for.
            companions: How many times companions go beside the weights.
        """
        staging = Staging(
            self._out, layout or Layout((), {}, {}), force=self._force, resume=self._resume and resume,
            fingerprint=digest or self._digest, beside=beside_bytes(self._plan, companions), hand_on=self._hand_on,
        )  # fmt: skip
        self._stack.push(lambda kind, error, trace: self._say_what_is_left(staging, error))
        with interrupts.held():  # once it is made, it is known to be cleared
            self.staging = self._stack.enter_context(staging)
        interrupts.check()
        return self.staging

    def _say_what_is_left(self, staging: Staging, error: BaseException | None) -> None:
        if error is not None and (staging.kept or (self._resume and staging.noted)):
            files = f"{staging.kept} of {len(self._plan.layout.shards)} weight files are finished and kept"
            scores = f"the scores of {len(staging.noted)} candidates are kept"
            self._progress.note(f"{files if staging.kept else scores}: the same command takes them up")
        elif isinstance(error, KeyboardInterrupt):
            self._progress.note(f"nothing is left of this run, and {self._out} is as it was")

    @property
    def seconds(self) -> float:
        """How long the work has taken so far."""
        return round(time.monotonic() - self._started, 3)

    def publish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Put the output in place; its manifest, with the time it took and its files."""
        whole = {**manifest, "seconds": self.seconds, "files": self.staging.listing()}
        self.staging.publish(as_file(whole))
        return whole


def beside_bytes(plan: Plan, companions: int) -> int:
    """About how many bytes go beside the weights: card and manifests, and the companions so many times."""
    models = {id(model): model for model in (plan.base, plan.giver)}.values()
    records = _RECORD * (1 + len(plan.experts)) * (100 + len(plan.tensors))
    return records + companions * sum(map(companion_bytes, models))


@contextlib.contextmanager
def output_of(
    plan: Plan,
    out: Path,
    digest: str,
    *,
    force: bool,
    resume: bool,
    ready: Callable[[], object] | None,
    progress: Reporter,
    hand_on: Callable[[str, Path], object] | None = None,
) -> Iterator[Output]:
    """Make the last checks before the work, and leave nothing half-written behind.

    Args:
        plan: The models, none of which the output may damage.
        out: Where the output goes.
        digest: Of all that determines it.
        force: Replace what is there.
        resume: Take up what an interrupted run has finished.
        ready: Called once all else is known to be well.
        progress: Shows the progress.
        hand_on: As for `Staging`.

    Raises:
        OutputError: The output would damage something.
    """
    complete = finished(out, digest) if resume else None
    check_output(out, input_paths(plan), force=force or complete is not None)
    if ready is not None:
        ready()
    if complete is not None:
        clear_remains(out)
        progress.note(f"{out} is complete already")
    prepare_process(sum(len(model.files) for model in plan.models) + len(plan.layout.shards))
    output = Output(plan, out, digest, complete, force, resume, progress, hand_on)
    with output._stack:
        yield output


def complete(
    prepared: Prepared,
    out: Path,
    staging: Publication,
    findings: Findings,
    small: Adapted | None,
    seconds: float,
    determined_by: str,
    digests: Sequence[Mapping[Path, str]],
) -> dict[str, Any]:
    """Write what goes beside the weights that a merge has written, but for the manifest, which is returned.

    `determined_by` is the digest of all that determines them, `digests` are those of each model's files.

    Raises:
        RecipeError: An input is not what the recipe was made with, or the result is not what it records.
        CheckpointError: An input has changed since it was opened.
        OutputError: A file cannot be written.
    """
    job, recorded = prepared.job, prepared.recorded
    if recorded is not None:
        refuse_changed(recorded.inputs, job.plan.models, digests)
    if small is None:
        for name, content in files_beside(prepared).items():
            staging.write_file(name, content)
    staging.write_indices()
    notes = [*prepared.remarks, *notes_of(job, findings, digests), *([adapted.note(small)] if small else [])]
    notes += other_bits(recorded, staging, job.source.device) if recorded is not None else []
    card = write_card(prepared.recipe, job, out, notes, staging.place_of(""), prepared.results)
    staging.write_file(CARD, card)
    manifest = manifest_of(prepared.recipe, job, prepared.adaptation, out, digests, findings, notes, staging, seconds)
    manifest["fingerprint"] = determined_by
    if small is not None:
        manifest["adapter"] = adapted.report(small)
    if prepared.results:
        manifest |= record_of_stages(manifest, prepared.results)
    return manifest


def files_beside(prepared: Prepared) -> dict[str, bytes | Path]:
    """What goes beside the weights of a merge, by its place: the content, or the file to copy."""
    base, giver, vocabulary = (getattr(prepared.job.plan, name) for name in ("base", "giver", "vocabulary"))
    values = config_values(vocabulary, base, giver) if vocabulary is not None else {}
    values |= {**token_ids(base, giver), **prepared.job.plan.config}
    files = companions_of_output(base, giver, values, prepared.recipe.dtype)
    if vocabulary is not None:
        files = with_vocabulary(files, vocabulary, base)
    if template := template_of(prepared.recipe.chat_template, base, prepared.job.plan.experts):
        files = with_template(files, template)
    return {name: portable(name, content) for name, content in files.items()}
