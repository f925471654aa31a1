"""Manifests and reports as others may see them: without paths of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.manifest_file import inputs_of
from modelmerge.record.command import THEN, flag, steps_of

_FOLDERS = re.compile(r"(?:^|(?<=[=' ])|(?<=(?<!hf|ps|tp):))(?:/|~/|\.{1,2}/)[^,:=]*/")  # in front of a file's name
_QUOTED = re.compile(r"'(?:/|~/|[A-Za-z]:\\)[^'\n]*[/\\]([^'/\\\n]+)'")


def published(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest as others may see it: models that lie on this machine go by their names, without their paths."""
    local, data = local_models(manifest), _local_data(manifest)
    copy: dict[str, Any] = renamed(dict(manifest), local | data)
    for model in inputs_of(copy):
        if model["path"] in local.values():
            model |= {"reference": model["name"], "path": None}
    if "searched" in copy:
        copy["searched"]["on"] = placeless(copy["searched"]["on"])
    if "workers" in copy:
        copy["workers"] = [{**worker, "host": None} for worker in copy["workers"]]
    if "command" in copy:
        # modelmerge merge METHOD BASE EXPERT... OPTIONS -o DIR: see `command_of`
        made, steps = [*manifest.get("stages", {}).values(), manifest], steps_of(manifest["command"])
        # A command that repeats a recipe is one, whatever the number of its stages.
        pairs = zip(steps, made[-len(steps) :], strict=True)
        steps = [_published_step(renamed(step, data), each, local) for step, each in pairs]
        copy["command"] = f" {THEN} ".join(map(shlex.join, steps))
    return copy | {key: [*map(unquoted, copy[key])] for key in ("notes", "remarks") if key in copy}


def _published_step(words: list[str], manifest: Mapping[str, Any], local: Mapping[str, str]) -> list[str]:
    models = (manifest["inputs"]["base"], *manifest["inputs"]["experts"])
    for place, model in enumerate(models if words[2] != flag("recipe") else (), start=3):
        words[place] = model["name"] if model["path"] in local else words[place]
    return [*words[:-1], Path(words[-1]).name]


def published_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of `evaluate` as others may see it."""
    copy: dict[str, Any] = placeless(dict(report))
    for row in (row for key in ("models", "experts", "base") for row in _rows(copy.get(key))):
        row["files"] = {placeless(name): entry for name, entry in row["files"].items()}
    return copy


def _rows(models: Any) -> list[dict[str, Any]]:
    rows = models if isinstance(models, list) else [models]
    return [row for row in rows if isinstance(row, dict) and "files" in row]


def unquoted(sentences: str) -> str:
    """Sentences in which paths are given by the last of their parts."""
    return _QUOTED.sub(r"'\1'", sentences)


def placeless(content: Any) -> Any:
    """JSON in which files of this machine are named without the folders they lie in."""
    if isinstance(content, dict):
        return {key: placeless(value) for key, value in content.items()}
    if isinstance(content, list):
        return [placeless(value) for value in content]
    if isinstance(content, str):
        return Path(content).name if content.startswith("/") else _FOLDERS.sub("", content)
    return content


def local_models(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The names of a manifest's models that lie on this machine, by their paths."""
    models = list(inputs_of(manifest))
    parts = {part: part_name(part) for model in models for part in model.get("parts", ()) if part.startswith("/")}
    return parts | {model["path"]: model["name"] for model in models if Path(model["path"]).is_absolute()}


def part_name(location: str) -> str:
    """What a model or an adapter that is a part of an input goes by, where its path is not to be shown."""
    return Path(location).name


def _local_data(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The names of a recipe's data and of a tokenizer's model that lie on this machine, by their paths."""
    recipe = manifest.get("recipe", {})
    data = recipe.get("unlabelled", {})
    places = [each.partition("=")[2] or each for key in ("data", "classes") for each in data.get(key, ())]
    places += [data["heads"]] if "heads" in data else []
    places += [data["script"].rpartition(":")[0]] if "script" in data else []
    tables = [each.get("tables") or {} for each in (recipe, *recipe.get("stages", {}).values())]
    places += [each["tokenizer"]["reference"] for each in tables if "tokenizer" in each]
    return {place: Path(place).name for place in places if place.startswith(("/", "./", "../", "~"))}


def renamed(content: Any, names: Mapping[str, str]) -> Any:
    """JSON with names in the place of whole paths, and of the beginnings of others, in keys and values alike."""
    if isinstance(content, dict):
        return {renamed(key, names): renamed(value, names) for key, value in content.items()}
    if isinstance(content, list):
        return [renamed(value, names) for value in content]
    if isinstance(content, str):
        for path in sorted(names, key=len, reverse=True):
            if path in content:
                whole = rf"(?<![\w.~]){re.escape(path)}(?![\w\-])"
                content = names[path].join(re.split(whole, content))
    return content
