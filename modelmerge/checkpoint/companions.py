"""What lies beside a model's weights and goes with them: config, tokenizer, processor, code, licence."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from modelmerge.checkpoint.components import CLASS, MODEL_CONFIG, MODULES, folder_of
from modelmerge.checkpoint.config_file import Values, dtype_values, token_values, with_values
from modelmerge.checkpoint.configs import text_parts
from modelmerge.checkpoint.documents import read_entries
from modelmerge.checkpoint.portable import leads_out
from modelmerge.checkpoint.reader import MANIFEST, Checkpoint
from modelmerge.checkpoint.reference import Reference
from modelmerge.errors import PlanError, UsageError, named, suggestion

BASE = "base"  # whose files go with the weights, if no expert's
# What lies beside weights and is wanted with them. Weights, their indices and what training left are not.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm", "*.vocab", "*.bpe",
               "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja")  # fmt: skip
_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_NOT_COMPANIONS = (MANIFEST, "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
TOKENIZER, TEMPLATE, GENERATION = "tokenizer", "chat template", "generation config"
GENERATION_CONFIG, _TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
_KINDS = {
    TOKENIZER: ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "*vocab*.txt",
                "merges.txt", "normalizer.json", "*.model", "*.tiktoken", "*.spm", "*.vocab", "*.bpe"),
    TEMPLATE: ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    GENERATION: (GENERATION_CONFIG,),
}  # fmt: skip


def companions(model: Checkpoint) -> dict[str, Path]:
    """What lies beside a model's weights and goes with them, by its place there: in the folders it consists of, too."""
    if model.directory is None or model.reference.repository is not None:  # an outline is made of links
        return _beside(model)
    return {place: file for place, file in _beside(model).items() if not leads_out(file, model.directory)}


def _beside(model: Checkpoint) -> dict[str, Path]:
    if model.directory is None:
        return {}
    files: dict[str, Path] = {}
    for folder in ("", *model.folders):
        inside = model.directory / folder
        some = {file for pattern in _COMPANIONS for file in inside.glob(pattern) if file.is_file()}
        files |= {file.relative_to(model.directory).as_posix(): file for file in sorted(some)}
    return {place: file for place, file in files.items() if is_companion(place, model.folders)}


def companion_bytes(model: Checkpoint) -> int:
    """Bytes of a model's companions, whether they are here or on the Hub."""
    remote = model.reference.repository
    if model.directory is None or remote is None:
        return sum(file.stat().st_size for file in companions(model).values())
    below = remote.below.items()
    return sum(remote.files[place].size for name, place in below if is_companion(name, model.folders))


def is_companion(place: str, folders: Sequence[str] = ()) -> bool:
    """Whether a file of that place beside a base's weights, or in one of its folders, goes with them."""
    path = PurePosixPath(place)
    if path.name.startswith(".") or path.name.endswith(_NOT_COMPANIONS) or _INDEX.search(path.name):
        return False
    folder = folder_of(place, folders)
    return _matches(path.relative_to(folder), _COMPANIONS)


def kind_of(place: str) -> str | None:
    """What a companion belongs to that an expert's can replace: tokenizer, chat template or generation config."""
    if not is_companion(place):
        return None
    return next((kind for kind, patterns in _KINDS.items() if _matches(PurePosixPath(place), patterns)), None)


def companions_of_output(
    base: Checkpoint, giver: Checkpoint, values: Values, dtype: str | None
) -> dict[str, bytes | Path]:
    """What goes beside merged weights: the content, or the file to copy.

    Args:
        base: The base, whose config, code and licence they are.
        giver: Whose tokenizer, chat template and generation config they are.
        values: What the config must say otherwise.
        dtype: What the weights are stored as, where that is not as before; the configs of all components say it.
    """
    files: dict[str, bytes | Path] = dict(companions(base))
    if giver is not base:
        theirs = {place: file for place, file in companions(giver).items() if kind_of(place)}
        replaced = _replaced(theirs)
        files = {**{place: file for place, file in files.items() if kind_of(place) not in replaced}, **theirs}
    for folder in {"", *base.components}:
        component = base.components.get(folder)
        entries = dtype_values(component.config if component is not None else base.config, dtype)
        entries |= values if not folder else {}
        place = f"{folder}/{MODEL_CONFIG}".lstrip("/")
        if entries and base.directory is not None and place in files:
            files[place] = with_values((base.directory / place).read_bytes(), entries)
    return files


def origins(base: Checkpoint, giver: Checkpoint) -> dict[str, Checkpoint | None]:
    """Whose tokenizer, chat template and generation config the output has, by these words; None where nobody's."""
    replaced = _replaced([place for place in places_beside(giver) if kind_of(place)]) if giver is not base else set()
    sources = {kind: giver if kind in replaced else base for kind in _KINDS}
    return {
        kind: model
        if (_has_template(model) if kind == TEMPLATE else kind in map(kind_of, places_beside(model)))
        else None
        for kind, model in sources.items()
    }


def giver_of(name: str, base: Checkpoint, experts: Sequence[Checkpoint]) -> Checkpoint:
    """The model whose tokenizer, chat template and generation config the output gets: `base`, or an expert's name.

    Raises:
        UsageError: There is no such expert.
        PlanError: It has no such files.
    """
    if name == BASE:
        return base
    names = [expert.name for expert in experts]
    if name not in names:
        hint = suggestion(name, [BASE, *names], f"there are: {', '.join([BASE, *names])}")
        raise UsageError(f"names '{name}', which is no expert", option="files_from", hint=hint)
    giver = experts[names.index(name)]
    if not any(map(kind_of, places_beside(giver))):
        where = f"'{name}' has none beside its weights, {giver.reference.text}"
        raise PlanError(
            f"{named('files_from')} takes a tokenizer, a chat template or a generation config, and {where}",
            hint="name an expert by the directory that holds them",
        )
    return giver


def open_companions(reference: Reference) -> Checkpoint:
    """A model of which tokenizer, chat template and configs are read, and no weights.

    Raises:
        HubError: The Hub refuses, or cannot be reached.
    """
    if (remote := reference.repository) is not None:
        for place in [there for name, there in remote.below.items() if kind_of(name) or name == MODEL_CONFIG]:
            remote.bring(place)
    model = Checkpoint(reference, {}, {}, reference.path if reference.path.is_dir() else None, {})
    return replace(model, config=_read(model, MODEL_CONFIG))


def library_of(base: Checkpoint) -> str | None:
    """The library that loads a model by what lies beside its weights, as the Hub calls it; None where nothing does."""
    if MODULES in companions(base):
        return "sentence-transformers"
    if any(CLASS in component.config for component in base.components.values()):
        return "diffusers"
    return "transformers" if base.config else None


def token_ids(base: Checkpoint, giver: Checkpoint) -> dict[tuple[str, ...], Any]:
    """What the base's config must say of special tokens where the tokenizer is the giver's."""
    return token_values(base.config, _says_tokens(giver)) if giver is not base and base.config else {}


def remarks_on_files(
    base: Checkpoint, experts: Sequence[Checkpoint], giver: Checkpoint, *, template: bool
) -> list[str]:
    """Sentences on what comes from the giver, or on what experts have and the output does not get.

    `template`: the output gets a chat template of its own.
    """
    if giver is not base:
        return [*_remarks_on_giver(base, giver), *remarks_on_origin(base), *_remarks_on_links(giver, tuple(_KINDS))]
    option, remarks = named("files_from"), remarks_on_origin(base)
    templated = [expert.name for expert in experts if _has_template(expert)]
    if templated and not template and not _has_template(base):
        remarks.append(
            f"{_list(templated)} a chat template, and the base, whose files go along, has none: {option} "
            f"{templated[0]} takes it over."
        )
    ends, more = _ends(base), []
    for expert in experts:
        theirs = _ends(expert)
        if ends and theirs and theirs != ends:
            token, other = (" or ".join(map(str, sorted(each))) for each in (theirs, ends))
            remarks.append(
                f"The texts of '{expert.name}' end with token {token} (eos_token_id), the base's with {other}: "
                f"{option} {expert.name} takes it over."
            )
        elif GENERATION_CONFIG in places_beside(expert):
            more.append(expert.name)
    if more and GENERATION_CONFIG not in places_beside(base):
        remarks.append(f"{_list(more)} a {GENERATION_CONFIG}, and the base has none: {option} {more[0]} takes it over.")
    return remarks


def remarks_on_origin(base: Checkpoint) -> list[str]:
    """Sentences on files beside the base's weights that need a look: code that goes along, and links that do not."""
    code = sorted(place for place in places_beside(base) if place.endswith(".py") and is_companion(place, base.folders))
    along = f"Code of '{base.name}' goes along, which runs only with trust_remote_code: {', '.join(code)}."
    return [*([along] if code else []), *_remarks_on_links(base)]


def _remarks_on_links(model: Checkpoint, kinds: Sequence[str] | None = None) -> list[str]:
    beside = _beside(model)
    links = [place for place in beside.keys() - companions(model).keys() if not kinds or kind_of(place) in kinds]
    what = (
        f"Of '{model.name}', these are links out of its directory, which are not followed: {', '.join(sorted(links))}."
    )
    return [what] if links else []


def _remarks_on_giver(base: Checkpoint, giver: Checkpoint) -> list[str]:
    theirs = sorted(place for place in places_beside(giver) if kind_of(place))
    remarks = [f"From '{giver.name}', not from the base: {', '.join(theirs)}."]
    if stay := [kind for kind in _KINDS if kind not in _replaced(theirs) and kind in map(kind_of, places_beside(base))]:
        remarks.append(f"'{giver.name}' has no {' and no '.join(stay)}: the base's stays.")
    if values := token_ids(base, giver):
        entries = ", ".join(f"{'.'.join(place)} {json.dumps(value)}" for place, value in values.items())
        remarks.append(f"{MODEL_CONFIG} says of tokens what '{giver.name}' says: {entries}.")
    if not _says_tokens(giver):
        remarks.append(f"'{giver.name}' has no config that says which tokens begin and end texts: the base's do.")
    return remarks


def _says_tokens(giver: Checkpoint) -> dict[str, Any]:
    """The config that says which tokens are special; an adapter's directory may have that of generation alone."""
    return _read(giver, MODEL_CONFIG) or _read(giver, GENERATION_CONFIG)


def _replaced(theirs: Sequence[str] | dict[str, Path]) -> set[str | None]:
    """Which kinds of the base's files give way: a template belongs to its tokenizer, where one comes."""
    kinds = set(map(kind_of, theirs))
    return kinds | ({TEMPLATE} if TOKENIZER in kinds else set())


def places_beside(model: Checkpoint) -> list[str]:
    """What lies beside a model's weights, by its places there; of what is on the Hub, all files."""
    remote = model.reference.repository
    return list(companions(model) if model.directory is None or remote is None else remote.below)


def _has_template(model: Checkpoint) -> bool:
    inline = _read(model, _TOKENIZER_CONFIG).get("chat_template")
    return bool(inline) or any(kind_of(place) == TEMPLATE for place in places_beside(model))


def _ends(model: Checkpoint) -> set[int]:
    """The ids of the tokens that end a text; empty where neither config says it."""
    configs = [_read(model, GENERATION_CONFIG), *text_parts(model.config).values()]
    ids: Any = next((config["eos_token_id"] for config in configs if config.get("eos_token_id") is not None), [])
    return {each for each in (ids if isinstance(ids, list) else [ids]) if isinstance(each, int)}


def _read(model: Checkpoint, name: str) -> dict[str, Any]:
    return read_entries(model.directory / name) if model.directory is not None else {}


def _list(names: Sequence[str]) -> str:
    return " and ".join(f"'{name}'" for name in names) + (" has" if len(names) == 1 else " have")


def _matches(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    # By the parts: a star does not reach into folders.
    split = [PurePosixPath(pattern).parts for pattern in patterns]
    return any(len(parts) == len(path.parts) and all(map(fnmatch.fnmatchcase, path.parts, parts)) for parts in split)
