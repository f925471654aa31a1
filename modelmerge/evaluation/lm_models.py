"""lm-evaluation-harness as a library, its silence, its errors in a line; and language models as it takes them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import CheckpointError, ModelMergeError, ReferenceNotFound, named
from modelmerge.evaluation.bench import require
from modelmerge.evaluation.model import refuse_kernels
from modelmerge.evaluation.scores import listing
from modelmerge.progress import Reporter

SEEDS = (0, 1234, 1234, 1234)  # the harness's own defaults: Python's, numpy's, torch's, of the examples in a prompt
# What the harness says of things that are as they should be here.
_USUAL = (
    "`pretrained` model kwarg", "Passed an already-initialized model", "`max_length` in generation kwargs",
    "Overwriting default num_fewshot", "is defined, but aggregation is not", "is defined, but higher_is_better is not",
    "overrides existing task", "Custom kwargs can be passed", "num_fewshot > 0 but fewshot_split is None",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How tasks are to be run, by the harness's words.

    Args:
        include_path: A directory of tasks in YAML. What its files name as functions is Python code that will run.
        limit: So many items of each task, from the first on; below 1, this share of them.
        num_fewshot: Solved examples in front of each item. A task that says 0 itself keeps it.
        batch_size: A number, or `auto`.
        dtype: `auto`, as the weights are stored, or the name of a torch dtype.
        apply_chat_template: Put items as a conversation, in the model's own format.
        confirm_run_unsafe_code: Run tasks that execute what the model writes.
        metrics: By task, or for all tasks under the empty name, the metric that is the score: `NAME` or `NAME,FILTER`.
        seed: In the place of `SEEDS`, all four.
        held_out: Look at the validation split of a task that reports its test split, and at the training split of one
            that reports its validation split.
    """

    include_path: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: str = "8"
    dtype: str = "auto"
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    metrics: Mapping[str, str]
    seed: int | None = None
    held_out: bool = False


def check_installed() -> None:
    """Refuse to begin without the harness and what it needs for models.

    Raises:
        ModelMergeError: It is not installed.
    """
    with quiet(None):
        require("eval lm", '"lm-eval[hf]>=0.4.12"', "lm_eval", "accelerate", "transformers")


def without_items(name: str) -> ModelMergeError:
    """The error of a task that has no items."""
    return ModelMergeError(f"task '{name}' has no items", hint="is its data set empty, or does a filter leave nothing?")


@contextlib.contextmanager
def naming(task: str, model: str | None = None) -> Iterator[None]:
    """Turn what the harness raises into an error that names the task."""
    try:
        yield
    except ModelMergeError:
        raise
    except Exception as error:
        if isinstance(error, IndexError) and "out of bounds for size 0" in str(error):
            raise without_items(task) from error
        on = f" on '{model}'" if model is not None else " cannot be loaded"
        hint = "is its data set there, and does its YAML name the data set's columns and splits?"
        raise ModelMergeError(f"task '{task}'{on}: {type(error).__name__}: {first_line(error)}", hint=hint) from error


@contextlib.contextmanager
def quiet(progress: Reporter | None) -> Iterator[None]:
    """Keep the harness and its libraries from the terminal; what a person should know becomes a note."""
    harness = logging.getLogger("lm_eval")
    listener = _Notes(progress)
    before = (harness.handlers[:], harness.propagate, harness.level)
    harness.handlers, harness.propagate = [listener], False
    harness.setLevel(logging.WARNING)
    others = [logging.getLogger(name) for name in ("transformers", "datasets", "accelerate", "peft")]
    levels = [other.level for other in others]
    for other in others:
        other.setLevel(logging.ERROR)
    try:
        silent = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        harness.handlers, harness.propagate = before[:2]
        harness.setLevel(before[2])
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)


class _Notes(logging.Handler):
    """What the harness warns of, each thing once."""

    def __init__(self, progress: Reporter | None) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._notes: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if self._progress is None or any(usual in text for usual in _USUAL) or text in self._notes:
            return
        self._notes.add(text)
        self._progress.note(f"lm-evaluation-harness: {text[:300]}")


def first_line(error: object) -> str:
    """The first line of an error's text."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else "without a word")[:300]


def open_model(model: Checkpoint, base: Checkpoint | None, settings: Settings, device: str, progress: Reporter) -> Any:
    """A model as the harness takes it: a checkpoint directory, or a PEFT adapter on its base.

    Args:
        model: The model, its weights and what lies beside them on this machine.
        base: Its base, for an adapter; its tokenizer serves a model that has none.
        settings: The batch size and the dtype count.
        device: As torch calls it.
        progress: Receives what the harness warns of.

    Raises:
        ReferenceNotFound: It is no language model, or lacks its config or tokenizer.
        CheckpointError: Its weights are not those that its config asks for.
    """
    check_installed()
    whole = base if model.adapter is not None else model
    if whole is None or whole.vector is not None or whole.directory is None:
        raise ReferenceNotFound(
            f"'{model.reference.text}' is no directory with a config and weights, which eval lm needs",
            hint=f"a task vector becomes a model by: modelmerge merge task-arithmetic BASE VECTOR {named('scale')} 1",
        )
    if whole.sum is not None:
        model_text, _, adapter_text = whole.reference.text.rpartition("+")
        raise ReferenceNotFound(
            f"'{whole.reference.text}' is a model with an adapter on it, and eval lm needs a directory",
            hint=f"make it one: modelmerge merge task-arithmetic {model_text} {adapter_text} {named('scale')} 1",
        )
    with quiet(progress):
        from lm_eval.models.huggingface import HFLM

        network = _load(whole, _automodel(whole), settings.dtype)
        tokenizer = _tokenizer(whole, base)
        rows = network.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise CheckpointError(
                f"{whole.directory}: its tokenizer has {len(tokenizer):,} words, and its embedding {rows:,} rows",
                hint="is it another model's tokenizer?",
            )
        if model.adapter is not None:
            network = _with_adapter(network, model)
        network = network.to(device).eval()
        network.register_forward_hook(_refuse_nan(model.name), with_kwargs=False)
        size = settings.batch_size if settings.batch_size == "auto" else int(settings.batch_size)
        return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=size)


def _automodel(model: Checkpoint) -> Any:
    """The transformers class that loads it: with an encoder, or without.

    Raises:
        CheckpointError: Its config names code to run.
        ReferenceNotFound: It is no language model.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kinds = {
        "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    refuse_kernels(model.config, model.directory)
    kind, architectures = model.config.get("model_type"), model.config.get("architectures") or []
    for name, classes in kinds.items():
        if kind in classes:
            fitting = classes[kind] if isinstance(classes[kind], tuple | list) else (classes[kind],)
            if not architectures or set(architectures) & set(fitting):
                return getattr(transformers, name)
    what = f"{'/'.join(map(str, architectures)) or 'of no architecture'}, model_type '{kind}'"
    raise ReferenceNotFound(
        f"'{model.reference.text}' is no language model that transformers knows: its config.json says {what}",
        hint="eval lm takes causal and encoder-decoder language models",
    )


def _load(model: Checkpoint, automodel: Any, dtype: str) -> Any:
    assert model.directory is not None
    try:
        network, keys = automodel.from_pretrained(
            str(model.directory), dtype=dtype, output_loading_info=True, trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise CheckpointError(f"{model.directory}: transformers cannot load it: {first_line(error)}") from error
    hint, random = "does its config.json belong to these weights?", "would run on random weights: the checkpoint"
    verbs = {"missing_keys": f"{random} lacks", "mismatched_keys": f"{random} has another shape for",
             "unexpected_keys": "has no place for"}  # fmt: skip
    for what, verb in verbs.items():
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys.get(what) or ())
        if names:
            raise CheckpointError(f"{model.directory}: {type(network).__name__} {verb} {listing(names, 3)}", hint=hint)
    return network


def _tokenizer(model: Checkpoint, base: Checkpoint | None) -> Any:
    from transformers import AutoTokenizer

    failure: Exception | None = None
    for place in (model.directory, base.directory if base is not None else None):
        if place is not None:
            try:
                return AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
            except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
                failure = failure or error
    raise ReferenceNotFound(
        f"{model.directory} holds no tokenizer that transformers can read: {first_line(failure)}",
        hint=f"copy the base's tokenizer files beside it, or name the base: {named('base')} REF",
    )


def _with_adapter(network: Any, model: Checkpoint) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            adapter = PeftModel.from_pretrained(network, str(model.directory))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{model.directory}: peft cannot load it: {first_line(error)}") from error
    for warning in messages:
        if "missing adapter keys" in str(warning.message):
            raise CheckpointError(f"{model.directory}: {first_line(warning.message)}", hint="copy the adapter again")
    return adapter


def _refuse_nan(name: str) -> Any:
    """A hook that stops a model whose predictions are not numbers; the harness would take the first choice."""

    def check(module: Any, words: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        # Whatever went wrong before it, the last position has seen it.
        if logits is not None and bool(logits[:, -1].isnan().any()):
            hint = f"float16 overflows where float32 and bfloat16 do not: {named('dtype')} float32"
            raise CheckpointError(f"'{name}' gives NaN for an item: no score can be made of that", hint=hint)

    return check
