"""Manifests as others may see them: without paths of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FOLDERS = re.compile(r"(?:^|(?<=[:=' ]))[/~][^,:=]*/")  # in front of a file's name


def published(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest as others may see it: models that lie on this machine go by their names, without their paths."""
    inputs, local, data = manifest["inputs"], local_models(manifest), _local_data(manifest)
    told: dict[str, Any] = renamed(dict(manifest), local | data)
    for model in (m for each in told["inputs"].values() for m in (each if isinstance(each, list) else [each])):
        if model["path"] in local.values():
            model |= {"reference": model["name"], "path": None}
    if "searched" in told:
        told["searched"]["on"] = placeless(told["searched"]["on"])
    if "command" in told:
        # modelmerge merge METHOD BASE EXPERT... OPTIONS -o DIR: see `command_of`
        words = renamed(shlex.split(manifest["command"]), data)
        for place, model in enumerate((inputs["base"], *inputs["experts"]), start=3):
            words[place] = model["name"] if model["path"] in local else words[place]
        told["command"] = shlex.join([*words[:-1], Path(words[-1]).name])
    return told


def placeless(told: Any) -> Any:
    """JSON in which files of this machine are named without the folders they lie in."""
    if isinstance(told, dict):
        return {key: placeless(value) for key, value in told.items()}
    if isinstance(told, list):
        return [placeless(value) for value in told]
    return _FOLDERS.sub("", told) if isinstance(told, str) else told


def local_models(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The names of a manifest's models that lie on this machine, by their paths."""
    inputs = manifest["inputs"].values()
    models = [model for told in inputs for model in (told if isinstance(told, list) else [told])]
    return {model["path"]: model["name"] for model in models if Path(model["path"]).is_absolute()}


def _local_data(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The names of a recipe's data that lie on this machine, by their paths."""
    told = manifest.get("recipe", {}).get("unlabelled", {})
    places = [each.partition("=")[2] or each for key in ("data", "classes") for each in told.get(key, ())]
    places += [told["heads"]] if "heads" in told else []
    places += [told["script"].rpartition(":")[0]] if "script" in told else []
    return {place: Path(place).name for place in places if Path(place).is_absolute()}


def renamed(told: Any, names: Mapping[str, str]) -> Any:
    """JSON with names in the place of paths, in keys and values alike."""
    if isinstance(told, dict):
        return {renamed(key, names): renamed(value, names) for key, value in told.items()}
    if isinstance(told, list):
        return [renamed(value, names) for value in told]
    if isinstance(told, str):
        for path in sorted(names, key=len, reverse=True):
            told = told.replace(path, names[path])
    return told
