"""What a mergekit configuration says of tokenizers and chat templates, as settings of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from modelmerge.checkpoint.documents import shown
from modelmerge.checkpoint.reference import Named
from modelmerge.checkpoint.templates import AUTO, NAMES, is_choice
from modelmerge.errors import suggestion
from modelmerge.plan.mergekit_models import check_keys
from modelmerge.plan.mergekit_parameters import Complain, read_as
from modelmerge.plan.overrides import BASE
from modelmerge.plan.recipe import STORED, Tables, TokenRow
from modelmerge.plan.vocabulary import UNION

# Of a reference and its place in the file: base or an expert's name, or the name of a model that is not merged, and
# then its reference.
Who = Callable[[Any, str], Named]


class Tokens(NamedTuple):
    """The settings of a recipe."""

    vocab: str | None
    tables: Tables
    chat_template: str | None


def read_tokens(
    config: Mapping[str, Any], who: Who, lacking: Literal["base", "mean"], complain: Complain,
    remark: Callable[[str], None],
) -> Tokens:  # fmt: skip
    """Whose tokens the tables have, how they are put together, and the chat template.

    Args:
        config: The configuration.
        who: Finds models.
        lacking: What a model has in place of a row that it lacks and others have, see `Tables`.
        complain: Takes what cannot be honoured, with its place.
        remark: Takes what has no effect.
    """
    source, tokenizer = config.get("tokenizer_source"), config.get("tokenizer")
    template = _template(config.get("chat_template"), complain)
    if source is not None and tokenizer is not None:
        complain("tokenizer_source and tokenizer", "mergekit takes one of them")
    if source is None and tokenizer is None:
        return Tokens(None, STORED, template)
    place = "tokenizer_source" if tokenizer is None else "tokenizer.source"
    tables: Tables = {"rows": "filled", "lacking": lacking}
    if tokenizer is not None:
        if not isinstance(tokenizer, dict):
            complain("tokenizer", "is no mapping")
            return Tokens(None, tables, template)
        keys = ("source", "tokens", "pad_to_multiple_of")
        check_keys(tokenizer, keys, "tokenizer.", complain, remark)
        source = tokenizer.get("source", UNION)
        tokens = tokenizer.get("tokens") or {}
        if not isinstance(tokens, dict):
            complain("tokenizer.tokens", "is no mapping")
        elif tokens:
            tables["tokens"] = {
                str(t): _row(entry, f"tokenizer.tokens.{t}", who, complain) for t, entry in tokens.items()
            }
        multiple = _as(int, tokenizer.get("pad_to_multiple_of") or 0, "tokenizer.pad_to_multiple_of", complain)
        if multiple < 0:
            complain("tokenizer.pad_to_multiple_of", f"must be above 0, not {multiple}")
        elif multiple:
            tables["multiple"] = multiple
    if source in (BASE, UNION):
        return Tokens(source, tables, template)
    model = who(source, place)
    tables["apart"] = model.name == BASE
    if model.reference:
        tables["tokenizer"] = {"name": model.name, "reference": model.reference}
    return Tokens(model.name, tables, template)


def _row(entry: Any, place: str, who: Who, complain: Complain) -> TokenRow:
    """Where a token's row comes from."""
    row: TokenRow = {}
    if not isinstance(entry, dict) or not set(entry) <= {"source", "force"}:
        complain(place, "has a 'source' and a 'force' and nothing else")
        return row
    source = entry.get("source")
    if _as(bool, entry.get("force", False), f"{place}.force", complain):
        row["force"] = True
        if source is None:
            complain(place, "is forced, and has no source")
    if not isinstance(source, dict) or "kind" not in source:
        if source is not None:
            row["model"] = who(source, f"{place}.source").name
        return row
    token, number = source.get("token"), source.get("token_id")
    if source == {"kind": "zero"}:
        row["zero"] = True
        return row
    known = source["kind"] == "model_token" and set(source) <= {"kind", "model", "token", "token_id"}
    if known and isinstance(token, str) and number is None:
        row |= {"model": who(source.get("model"), f"{place}.source.model").name, "token": token}
    elif known and number is not None and token is None:
        at = _as(int, number, f"{place}.source.token_id", complain)
        row |= {"model": who(source.get("model"), f"{place}.source.model").name, "id": at}
    else:
        complain(f"{place}.source", "is a model, {kind: zero}, or {kind: model_token, model, token or token_id}")
    return row


def _as(kind: type, value: Any, place: str, complain: Complain) -> Any:
    """A value as that kind; one of its zeros where it is none, which was complained of."""
    try:
        return read_as(kind, value)
    except ValueError as error:
        complain(place, str(error))
        return kind()


def _template(choice: Any, complain: Complain) -> str | None:
    if choice is None or choice == "":
        return None
    if isinstance(choice, str) and is_choice(choice):
        return choice
    hint = suggestion(str(choice), [AUTO, *NAMES], f"there are: {', '.join([AUTO, *NAMES])}")
    complain("chat_template", f"{shown(choice)} is no template, and no name of one; {hint}")
    return None
