"""The model card of a merged checkpoint: README.md, with the front matter that the Hub reads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modelmerge.checkpoint.documents import parse_yaml, read_bytes, top_entries
from modelmerge.checkpoint.manifest_file import inputs_of
from modelmerge.checkpoint.output import CARD
from modelmerge.checkpoint.reference import STAGE
from modelmerge.errors import ModelMergeError
from modelmerge.record.command import REPLAY, steps_of
from modelmerge.record.markdown import block, code, shell, table, words
from modelmerge.record.redaction import unquoted
from modelmerge.text import visible

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s", re.DOTALL)
_LICENSE = ("license", "license_name", "license_link")
_WIDTH = 90  # characters of a line of shell that a page shows without scrolling
_USE = re.compile(r"^## Use it\n\n(`{3,})python\n.*?\n\1\n\n", re.DOTALL | re.MULTILINE)
_START, _END = "<!-- evaluation: written by modelmerge -->", "<!-- end of evaluation -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The base or an expert, as the card tells it.

    `repository` and `commit` are those of a model on the Hub; of a model with an adapter on it, `parts` are the
    repositories of both. `weight` is None for the base; `front` is the front matter of the model's own card, empty if
    it has none.
    """

    name: str
    reference: str
    weight: float | None = None
    repository: str | None = None
    commit: str | None = None
    parts: tuple[str, ...] = ()
    front: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A merge before this one: its name and method, its base and experts, and which repositories they are of."""

    name: str
    method: str
    base: str
    experts: Sequence[str]
    repositories: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a method is called, what it does, where it comes from, how to cite it, and its options as typed."""

    name: str
    summary: str
    paper: str
    bibtex: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One number of an evaluation, such as the accuracy on a data set's test split.

    `task` is the Hub's word for it (image-classification, text-generation); `dataset` is what people call the data,
    `dataset_id` what the Hub does, if it has them; `value` is a share, or in the metric's own unit; `detail` is what
    else a reader should know, such as how many examples were looked at.
    """

    task: str
    dataset: str
    metric: str
    value: float
    dataset_id: str | None = None
    split: str | None = None
    detail: str = ""


def front_matter(directory: Path | None) -> tuple[dict[str, str], str | None]:
    """The words in the front matter of the card beside a model, and why it cannot be read, if it cannot.

    A stranger wrote it: it never fails a merge.
    """
    if directory is None or not (directory / CARD).exists():
        return {}, None
    try:
        match = _FRONT.match(read_bytes(directory / CARD).decode())
        return top_entries(match[1]) if match else {}, None
    except OSError as error:
        return {}, error.strerror
    except ValueError as error:
        return {}, str(error)


def read(file: Path) -> str:
    """A card that results are to be put into.

    Raises:
        ModelMergeError: It cannot be read, or its front matter cannot.
    """
    try:
        text = read_bytes(file).decode()
        match = _FRONT.match(text)
        front = parse_yaml(match[1]) if match else {}
    except (OSError, ValueError) as error:
        raise ModelMergeError(f"{file}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if not isinstance(front, dict):
        raise ModelMergeError(f"{file}: its front matter is no mapping")
    return text


def render(
    *, title: str, base: Model, experts: Sequence[Model], methods: Sequence[Source], settings: Mapping[str, Any],
    command: str, notes: Sequence[str], library: str | None, versions: Mapping[str, str], device: str,
    transforms: Sequence[Source] = (), adapter: bool = False, stacked: bool = False, stages: Sequence[Stage] = (),
    code_lines: Sequence[str] = (), beside: str = "", task: str | None = None,
) -> str:  # fmt: skip
    """The card's text.

    Args:
        title: The output's name.
        base: The base.
        experts: The experts, in their order.
        methods: What merged the task vectors: the merge's own method, then those that rules gave some tensors to.
        settings: What every merge can be set to, and was, as typed.
        command: The shell line that repeats the merge.
        notes: What a reader should know, a sentence each.
        library: What can load it by its config, as the Hub calls it; None where there is no config.
        versions: Of the packages that bear on the result.
        device: Where it was computed.
        transforms: What changed the task vectors before, in this order.
        adapter: What lies beside the card is a PEFT adapter, not a whole model.
        stacked: Its layers are not the base's own but come from several places.
        code_lines: Python that loads the output.
        beside: A sentence on where tokenizer and chat template come from.
        task: What the Hub calls the task of such models, where the base's card does not say it.
        stages: The merges before it, in their order.
    """
    models = [base, *experts]
    license, license_said = _license(models)
    # Only what is on the Hub: it refuses a card whose base_model names anything else.
    ours = models[:1] if adapter else models
    named = [name for model in ours for name in (model.repository, *model.parts)]
    on_hub = [*dict.fromkeys(name for stage in stages for name in stage.repositories)]
    on_hub = [*dict.fromkeys(name for name in (*on_hub, *named) if name)]
    tags = ["merge", "modelmerge", *(["lora"] if adapter else []), *(m.name for m in (*methods, *transforms))]
    front = {
        "base_model": on_hub,
        "library_name": "peft" if adapter else library,
        **license,
        "pipeline_tag": (_line(base.front.get("pipeline_tag")) or task) if library else None,
        "tags": list(dict.fromkeys(tags)),
        "base_model_relation": ("adapter" if adapter else "merge") if on_hub else None,
    }
    text = yaml.dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    names = " and ".join(code(method.name) for method in methods) + "".join(
        f" after {code(transform.name)}" for transform in reversed(transforms)
    )
    options = [*(item for method in (*transforms, *methods) for item in method.options.items()), *settings.items()]
    citations = list(dict.fromkeys(method.bibtex for method in (*methods, *transforms) if method.bibtex))
    parts = [
        f"---\n{text}---",
        f"# {words(title)}",
        (
            f"Layers of {_link(base)}" + (f" and {_count(experts)}" if experts else "") + ", put together anew"
            if stacked
            else f"A merge of {_count(experts)} onto {'its' if len(experts) == 1 else 'their'} base {_link(base)}"
        )
        + f", made by {names} with modelmerge {versions['modelmerge']}."
        + (" It is a PEFT adapter: `PeftModel.from_pretrained(base, DIR)` puts it on the base." if adapter else ""),
        f"{_use(code_lines)}## Models",
        _models(base, experts),
        *([words(beside)] if beside else []),
        *([_stages(stages)] if stages else []),
        license_said,
        "## Method",
        *(f"[{code(method.name)}]({method.paper}): {words(method.summary)}" for method in (*transforms, *methods)),
        *([table(("option", "value"), [(code(name), _value(value)) for name, value in options])] if options else []),
        _evaluation("This merge has not been evaluated on test data."),
        "## Repeat it",
        block(_wrapped(command), "sh"),
        "`modelmerge.json` holds the complete recipe with the sha256 of every input and output file; "
        f"`{REPLAY}` replays it. Made with {', '.join(map(' '.join, versions.items()))}; computed on {device}.",
        *(["## Notes", "\n".join(f"- {words(note)}" for note in notes)] if notes else []),
        *(["## Citation", block("\n\n".join(citations), "bibtex")] if citations else []),
    ]
    return "\n\n".join(parts) + "\n"


def titled(name: str) -> str:
    """A card that says nothing but a model's name."""
    return f"# {words(name)}\n"


def with_results(text: str, results: Sequence[Result], *, name: str, picture: str | None = None) -> str:
    """The card with an evaluation's results, in place of those it had: a table, and `model-index` for the Hub.

    Args:
        text: A card.
        results: What was measured.
        name: The model's name.
        picture: A file beside the card that shows them.
    """
    from huggingface_hub import EvalResult, ModelCard  # here: most cards are written without results

    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    data.model_name = visible(name)
    data.eval_results = [
        EvalResult(
            task_type=visible(result.task), dataset_type=visible(result.dataset_id or result.dataset),
            dataset_name=visible(result.dataset), dataset_split=result.split and visible(result.split),
            metric_type=visible(result.metric), metric_value=result.value,
        )
        for result in results
    ]  # fmt: skip
    body = re.sub(rf"{re.escape(_START)}.*?{re.escape(_END)}\n+", "", card.text, flags=re.DOTALL)
    rows = [
        [*map(words, (result.dataset, result.split or "", result.metric, f"{result.value:.4g}", result.detail))]
        for result in results
    ]
    scores = table(("data", "split", "metric", "value", ""), rows, right=(3,))
    section = _evaluation(
        *([f"![Scores of the base, the experts and this model]({picture})"] if picture else []), scores
    )
    before, repeat, after = body.partition("## Repeat it\n")
    body = f"{before}{section}\n\n{repeat}{after}" if repeat else f"{body.rstrip()}\n\n{section}\n"
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _evaluation(*parts: str) -> str:
    """The section on what was measured, between marks by which it is found again."""
    return "\n\n".join([f"{_START}\n## Evaluation", *parts, _END])


def _license(models: Sequence[Model]) -> tuple[dict[str, str], str]:
    """The licence for the front matter, and a sentence about it: inherited where all models have the same."""
    licenses = [{key: _line(model.front.get(key)) for key in _LICENSE} for model in models]
    if licenses[0]["license"] and all(license == licenses[0] for license in licenses):
        entries = {key: value for key, value in licenses[0].items() if value}
        name = entries.get("license_name") or entries["license"]
        return entries, f"License: {words(name)}, which is that of the base and of every expert."
    base, *experts = (license["license_name"] or license["license"] for license in licenses)
    names: dict[str | None, list[str]] = {}
    for model, license in zip(models[1:], experts, strict=True):
        names.setdefault(license, []).append(code(model.name))
    parts = [f"{words(base or 'not stated')} for the base"]
    for license, which in names.items():
        parts.append(f"{words(license or 'not stated')} for {'every expert' if len(names) == 1 else ', '.join(which)}")
    if not base and names.keys() == {None}:
        return {}, "License: none of the models states one here. It is for you to choose, within what theirs allow."
    return {}, f"License: {'; '.join(parts)}. It is for you to choose, within what these allow."


def published(text: str, before: Mapping[str, Any], after: Mapping[str, Any], code_lines: Sequence[str]) -> str:
    """The card as others may see it: models go by the names that `after` has for what `before`, the manifest, has.

    `code_lines` load the model from where it is published.
    """
    text = text.replace(_wrapped(before["command"]), _wrapped(after["command"]))
    models = [[*inputs_of(manifest)] for manifest in (before, after)]
    for ours, theirs in zip(*models, strict=True):
        text = text.replace(code(ours["reference"]), code(theirs["reference"]))
    return unquoted(_USE.sub(lambda _: _use(code_lines), text))


def _use(code_lines: Sequence[str]) -> str:
    """The section on how the output is loaded."""
    return "## Use it\n\n" + block("\n".join(code_lines), "python") + "\n\n" if code_lines else ""


def _models(base: Model, experts: Sequence[Model]) -> str:
    """A table of the models, with the columns that say something."""
    models = (base, *experts)
    columns: list[tuple[str, list[str]]] = [
        ("", ["base", *(code(expert.name) for expert in experts)]),
        ("model", [_link(model) for model in models]),
    ]
    if any(model.commit for model in models):
        columns.append(("commit", [_commit(model) for model in models]))
    if {expert.weight for expert in experts} - {1.0}:
        columns.append(("weight", ["" if model.weight is None else f"{model.weight:g}" for model in models]))
    return table([name for name, _ in columns], list(zip(*(cells for _, cells in columns), strict=True)))


def _count(experts: Sequence[Model]) -> str:
    return f"{len(experts)} fine-tuned model{'s' * (len(experts) != 1)}"


def _stages(stages: Sequence[Stage]) -> str:
    """A table of the merges before."""
    rows = [(code(f"{STAGE}{s.name}"), code(s.method), code(s.base), ", ".join(map(code, s.experts))) for s in stages]
    return "Merged before, and gone since:\n\n" + table(("", "method", "base", "experts"), rows)


def _link(model: Model) -> str:
    if model.repository is None:
        return code(model.reference)
    return f"[{model.repository}](https://huggingface.co/{model.repository})"


def _commit(model: Model) -> str:
    if model.commit is None:
        return ""
    return f"[{code(model.commit[:12])}](https://huggingface.co/{model.repository}/tree/{model.commit})"


def _wrapped(command: str) -> str:
    """A shell line, broken where it is long: between arguments, and not between an option and its value."""
    return "\n".join(map(_wrapped_step, steps_of(command)))


def _wrapped_step(tokens: list[str]) -> str:
    groups = [tokens[:3]]
    for before, token in itertools.pairwise(tokens[2:]):
        if before.startswith("-"):
            groups[-1].append(token)
        else:
            groups.append([token])
    lines = [shell(groups[0])]
    for group in groups[1:]:
        more = shell(group)
        if len(lines[-1]) + len(more) < _WIDTH:
            lines[-1] += f" {more}"
        else:
            lines.append(f"  {more}")
    return " \\\n".join(lines)


def _value(value: Any) -> str:
    if value is None:
        return "automatic"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ", ".join(code(str(each)) for each in value)
    return words(str(value))


def _line(text: str | None) -> str | None:
    """A word of somebody's front matter, on one line; None for an empty one."""
    return visible(text) if text else None
