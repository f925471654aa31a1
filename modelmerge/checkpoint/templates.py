"""Chat templates: a model's own, those that mergekit has names for, and the one that an output is to have."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.documents import parse_json, read_entries
from modelmerge.checkpoint.new_tokens import written_json
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.tokens import CONFIG

AUTO = "auto"
NAMES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
FILE, _KEY = "chat_template.jinja", "chat_template"
_SHORTEST = 20  # letters of a template


def is_choice(text: str) -> bool:
    """Whether a text is a Jinja template, or names one, or is `auto`."""
    return text in (AUTO, *NAMES) or _is_template(text)


def _is_template(text: str) -> bool:
    """Whether a text is a Jinja template, as mergekit tells."""
    return len(text) >= _SHORTEST and "{" in text


def template_of(choice: str | None, base: Checkpoint, experts: Sequence[Checkpoint]) -> str | None:
    """The Jinja template that is asked for by name, as it is, or as `auto`; None for what the tokenizer brings.

    `auto` is the most common template among the models, and of equals the first. An adapter has its base's.
    """
    if choice is None or _is_template(choice):
        return choice
    if choice != AUTO:
        return (Path(__file__).parent / "chat_templates" / f"{choice}.jinja").read_text("utf-8")
    others = [e for e in experts if e.adapter is not None or e.reference.text != base.reference.text]
    texts = [_own(base if model.adapter is not None else model) for model in (base, *others)]
    common = Counter(text.strip() for text in texts if text).most_common(1)
    return common[0][0] if common else None


def with_template(files: Mapping[str, bytes | Path], template: str) -> dict[str, bytes | Path]:
    """Files that lie beside weights, with another chat template: in a file of its own, and where they had it before."""
    changed = {**files, FILE: template.encode()}
    config, content = files.get(CONFIG), None
    with contextlib.suppress(ValueError):  # whoever reads it says so
        content = config and parse_json(config.read_bytes() if isinstance(config, Path) else config)
    if isinstance(content, dict) and _KEY in content:
        changed[CONFIG] = written_json({**content, _KEY: template})
    changed.pop("chat_template.json", None)
    return changed


def _own(model: Checkpoint) -> str | None:
    """A model's chat template, the default one of several, as transformers finds it."""
    if model.directory is None:
        return None
    remote = model.reference.repository
    for name in (FILE, CONFIG):
        file = model.directory / name
        if remote is not None and not file.exists() and remote.place(file) in remote.files:
            remote.bring(remote.place(file))
        if name == FILE and file.is_file():
            return file.read_text("utf-8")
    own: Any = read_entries(model.directory / CONFIG).get(_KEY)
    if isinstance(own, list):
        own = next(
            (each.get("template") for each in own if isinstance(each, dict) and each.get("name") == "default"), None
        )
    return own if isinstance(own, str) else None
