"""What a report comes to, in a sentence or two, and which gates are not passed, in the units of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelmerge.evaluation.report import Report
from modelmerge.evaluation.scores import compared, in_shares, mean, ranked, score_text

_CHANCE = 0.05  # a lead that is as likely by chance is said to be no clear one
_ALIKE = 0.02  # shares and cosines that are this close are called alike


def conclusion(report: Report) -> list[str]:
    """Sentences, the first of them the most important; empty where there is nothing to conclude."""
    return _of_weights(report) if report["suite"] == "weights" else _of_scores(report)


def verdicts(report: Report) -> list[str]:
    """A sentence for each gate that a model does not pass, in the units of the table of scores."""
    failures = report["gate"]["failures"] if "gate" in report else []
    return [_verdict(failure, in_shares(report)) for failure in failures]


def _verdict(failure: Mapping[str, Any], share: bool) -> str:
    what, _, least = failure["gate"].rpartition("=")
    share = share or what == "normalized"
    word = {"avg": "on average", "normalized": "of the experts' scores"}.get(what, f"at {what}")
    unit = " %" if share else ""
    value = score_text(failure["value"], share=share) + (unit if failure["value"] is not None else "")
    bound = f"{100 * float(least):.4g}" if share else f"{float(least):.4g}"
    if share and failure["value"] is not None and value == f"{float(bound):.1f}{unit}":
        value = f"{100 * failure['value']:.4g}{unit}"  # less, though not in the digits of the table
    hint = f"; {float(least):g} % is {what}={float(least):g}%" if share and float(least) > 1 else ""
    return f"'{failure['model']}' has {value} {word}, and is asked for {bound}{unit} ({failure['gate']}{hint})"


def _of_scores(report: Report) -> list[str]:
    models, share, tasks = ranked(report), in_shares(report), report["tasks"]
    best = models[0]
    lower = len(tasks) == 1 and bool(best["scores"][tasks[0]].get("lower"))
    value, error = best["average"], best["average_stderr"]
    if lower:
        value, error = best["scores"][tasks[0]]["score"], best["scores"][tasks[0]]["stderr"]
    if value is None:
        return []
    unit = " %" if share else ""
    rising = [task for task in tasks if not best["scores"][task].get("lower")]
    where = f" on average over {len(rising)} tasks" if len(rising) > 1 else f" at {tasks[0]}" if len(tasks) == 1 else ""
    rank = f" is the best of {len(models)}" if len(models) > 1 else ""
    more = [] if best["normalised"] is None else [f"{100 * best['normalised']:.1f} % of the experts"]
    base = next((model for model in report["models"] if model["role"] == "base"), None)
    if base is not None and base["average"] is not None:
        more.append(f"the base has {score_text(base['average'], share=share)}{unit}")
    text = f"{best['name']} {score_text(value, error, share=share)}{unit}{rank}{where}"
    sentences = [f"{': '.join([text, ', '.join(more)]) if more else text}."]
    if len(models) > 1 and (second := models[1])["average"] is not None and rising:
        lead = compared(best, second, rising, same_items=True)["average"]
        if lead["p"] is not None and lead["p"] > _CHANCE:
            sentences.append(
                f"{second['name']} ({score_text(second['average'], second['average_stderr'], share=share)}{unit}) "
                f"is as good: the lead may be chance (p = {lead['p']:.2f})."
            )
    return sentences


def _of_weights(report: Report) -> list[str]:
    whole, experts = report["model"], list(report["model"]["experts"]["norms"])
    sentences = [_conflicts(whole, report["layer_types"])] if len(experts) > 1 else []
    kept = {}
    for model, figures in whole["models"].items():
        cosines = {name: each["cosine"] for name, each in figures["experts"].items() if each["cosine"] is not None}
        if not cosines:
            continue
        least, most = min(cosines, key=lambda name: cosines[name]), max(cosines, key=lambda name: cosines[name])
        if len(cosines) == 1:
            sentences.append(f"The cosine of {model} and {most} is {cosines[most]:.3f}.")
        elif cosines[most] - cosines[least] < _ALIKE:
            sentences.append(
                f"{model} kept all experts alike: cosines from {cosines[least]:.3f} to {cosines[most]:.3f}."
            )
        else:
            sentences.append(
                f"{least} lost most in {model}: its cosine is {cosines[least]:.3f}, and {most}, which kept most, has "
                f"{cosines[most]:.3f}."
            )
        kept[model] = mean([*cosines.values()]) or 0.0
    if len(kept) > 1:
        best = max(kept, key=lambda name: kept[name])
        others = ", ".join(f"{name} {value:.3f}" for name, value in kept.items() if name != best)
        sentences.append(f"{best} kept most of all experts: its mean cosine is {kept[best]:.3f} ({others}).")
    return sentences


def _conflicts(whole: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    """Where experts change the same entries in opposite ways."""
    share = whole["experts"]["sign_conflict"]
    if share is None:
        return "No expert changes anything."
    shares = {
        kind: figures["experts"]["sign_conflict"] for kind, figures in kinds.items()
        if figures["experts"]["sign_conflict"] is not None and figures["entries"] >= whole["entries"] / 100
    }  # fmt: skip
    worst = max(shares, key=lambda kind: shares[kind], default="")
    what = "of the entries that experts change have changes of both signs"
    if not worst or shares[worst] - share < _ALIKE:
        return f"The experts conflict alike in all kinds of layers: {100 * share:.3g} % {what}."
    return (
        f"The experts conflict most in {worst}: {100 * shares[worst]:.3g} % {what}, and {100 * share:.3g} % in the "
        "whole model."
    )
