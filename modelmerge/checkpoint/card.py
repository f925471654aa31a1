"""The model card of a merged checkpoint: README.md, with the front matter that the Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData


def render(
    *,
    title: str,
    method: str,
    summary: str,
    paper: str,
    command: str,
    base: str,
    experts: Sequence[tuple[str, str, float]],
    options: dict[str, Any],
    notes: Sequence[str],
    has_config: bool,
    version: str,
) -> str:
    """The card's text.

    Args:
        title: The output's name.
        method: The method's name.
        summary: Its help line.
        paper: Link to its source.
        command: The shell line that repeats the merge.
        base: The base's name.
        experts: Name, reference and weight of each expert.
        options: The method's options.
        notes: What a reader should know, a sentence each.
        has_config: There is a config.json beside the weights, so that transformers can load them.
        version: modelmerge's version.
    """
    data = ModelCardData(
        base_model=[base, *(name for name, _, _ in experts)],
        base_model_relation="merge",
        library_name="transformers" if has_config else None,
        tags=["merge", "modelmerge", method],
    )
    rows = [f"| {name} | `{reference}` | {weight:g} |" for name, reference, weight in experts]
    told = [f"| `{name}` | {'automatic' if value is None else value} |" for name, value in options.items()]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"A merge of {len(experts)} fine-tuned model{'s' * (len(experts) != 1)} onto their base `{base}`, made with "
        f"modelmerge {version}.",
        "## Experts",
        "\n".join(["| expert | reference | weight |", "|---|---|---|", *rows]),
        "## Method",
        f"[`{method}`]({paper}): {summary}",
        *(["\n".join(["| option | value |", "|---|---|", *told])] if told else []),
        "## Repeat it",
        f"```sh\n{command}\n```",
        "`modelmerge.json` holds the complete recipe with the sha256 of every input and output file; "
        "`modelmerge merge --recipe modelmerge.json -o DIR` replays it.",
        *(["## Notes", "\n".join(f"- {note}" for note in notes)] if notes else []),
    ]
    return "\n\n".join(parts) + "\n"
