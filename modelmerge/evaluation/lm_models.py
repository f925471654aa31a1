"""Language models as lm-evaluation-harness takes them: a checkpoint directory, or a PEFT adapter on its base."""

from __future__ import annotations

import warnings
from typing import Any

from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import CheckpointError, ReferenceNotFound
from modelmerge.evaluation.lm_harness import check_installed, first_line, quiet
from modelmerge.evaluation.lm_tasks import Settings
from modelmerge.evaluation.scores import listing
from modelmerge.progress import Reporter


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
            hint="a task vector becomes a model by: modelmerge merge task-arithmetic BASE VECTOR --scale 1",
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
        size = settings.batch_size
        return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=size if size == "auto" else int(size))


def _automodel(model: Checkpoint) -> Any:
    """The transformers class that loads it: with an encoder, or without.

    Raises:
        ReferenceNotFound: It is no language model.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kinds = {
        "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
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
    for what, verb in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys.get(what) or ())
        if names:
            raise CheckpointError(
                f"{model.directory}: {type(network).__name__} would run on random weights: the checkpoint {verb} "
                f"{listing(names, 3)}",
                hint="does its config.json belong to these weights?",
            )
    extra = sorted(map(str, keys.get("unexpected_keys") or ()))
    if extra:
        raise CheckpointError(
            f"{model.directory}: {type(network).__name__} has no place for {listing(extra, 3)}",
            hint="does its config.json belong to these weights?",
        )
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
        hint="copy the base's tokenizer files beside it, or name the base: --base REF",
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
            raise CheckpointError(
                f"'{name}' gives NaN for an item: no score can be made of that",
                hint="float16 overflows where float32 and bfloat16 do not: --dtype float32",
            )

    return check
