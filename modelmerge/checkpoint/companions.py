"""What lies beside a model's weights and goes with them: config, tokenizer, processor, code, licence."""

from __future__ import annotations

import fnmatch
from pathlib import Path, PurePosixPath

from modelmerge.checkpoint.reader import MANIFEST

# What lies beside weights and is wanted with them. Weights, their indices and what training left are not.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm", "*.vocab", "*.bpe",
               "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja", "[0-9]_*/config.json")  # fmt: skip
_NOT_COMPANIONS = (MANIFEST, "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


def companions(directory: Path | None) -> dict[str, Path]:
    """The config, tokenizer, processor, code and licence files beside a base's weights, by their place there."""
    if directory is None:
        return {}
    files = {file for pattern in _COMPANIONS for file in directory.glob(pattern) if file.is_file()}
    by_place = {str(file.relative_to(directory)): file for file in sorted(files)}
    return {place: file for place, file in by_place.items() if is_companion(place)}


def is_companion(place: str) -> bool:
    """Whether a file of that place beside a base's weights goes with them."""
    path = PurePosixPath(place)
    if path.name.startswith(".") or path.name.endswith((*_NOT_COMPANIONS, ".index.json")):
        return False
    # By the parts: a star does not reach into folders.
    patterns = [PurePosixPath(pattern).parts for pattern in _COMPANIONS]
    return any(len(parts) == len(path.parts) and all(map(fnmatch.fnmatchcase, path.parts, parts)) for parts in patterns)
