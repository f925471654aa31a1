"""Layers from several places: `NAME:FIRST-LAST`, each a run of layers of the output, in order.

A run is one model's layers as they are; or those of several models, or of all (`FIRST-LAST`), merged by the method.
Every model is seen as one that has the output's layers, which are its own tensors by other names; all that follows sees
ordinary models. Where a run does not name the base, the first model of the run stands in the base's place, as one of
those that are merged; `base=NAME:FIRST-LAST` has another model be the base of a run.

What comes before the layers (embeddings) is made as the first run, and what comes after them (final norm, head) as the
last run, from their models alone.

A run may be of a module alone that has layers of its own, `vision_tower: NAME:FIRST-LAST`, or make a module as a
whole, `vision_tower: NAME NAME`. What is in no module that is named is made from all models, unless runs say otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal

from modelmerge.checkpoint.config_file import Values
from modelmerge.checkpoint.configs import Place, compared, text_parts
from modelmerge.checkpoint.header import MERGEABLE_DTYPES, TensorInfo, is_buffer
from modelmerge.checkpoint.layer_config import COUNTS, stacked_values
from modelmerge.checkpoint.leftovers import refuse_lookalikes
from modelmerge.checkpoint.matching import match
from modelmerge.checkpoint.names import matches
from modelmerge.checkpoint.pairing import placed
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError, UsageError
from modelmerge.methods import registry
from modelmerge.plan.disagreements import disagreement
from modelmerge.plan.modules import TOWERS, holds, is_after, list_of_layers
from modelmerge.plan.overrides import BASE, Choice, Setting, layer_of, layers
from modelmerge.plan.runs import FORM, WORD, Run, parse, split
from modelmerge.plan.stacks import restack
from modelmerge.plan.vocabulary import Tokenizers, compare, is_table, row_count

PASSTHROUGH = "passthrough"  # the method that takes one model's weights as they are
Tensors = Mapping[str, TensorInfo]
_PREDICTORS = "num_nextn_predict_layers"  # in configs: how many layers behind the last predict further tokens
_ALONE = "relative_attention_bias"  # what all layers take from the first
_BEFORE, _AFTER = -1, -2  # the numbers of what comes before a module's layers, and after them


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tensor of the output is made from: a run, the experts that its method sees, and what is the base there."""

    run: Run
    experts: tuple[int, ...]
    stand: int

    def refuse(self, choice: Choice | None) -> None:
        """Refuse a method that cannot merge these models.

        Raises:
            UsageError: It needs the base, which the run does not name, or takes fewer.
        """
        if choice is None or self.run.lone:
            return
        if not self.run.based and not choice.method.on_weights(choice.options):
            raise UsageError(
                f"'{self.run.text}': '{choice.name}' merges what models differ in from the base, which is not named",
                option="layers", hint=f"add {BASE}:FIRST-LAST, the layers that they are seen from",
            )  # fmt: skip
        most = choice.method.most_experts
        if most is not None and len(self.experts) > most:
            raise UsageError(
                f"'{self.run.text}': '{choice.name}' takes {most} beside the base, and there are {len(self.experts)}",
                option="layers", hint="name fewer models in a run",
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stack:
    """The models as ones that have the output's layers.

    Args:
        base: The base, with tensors of other models in its place where a run does not name it.
        experts: The experts, each with what is made from it alone.
        origins: By tensor of the output, what it is made from.
        config: What the base's config.json must say otherwise.
        remarks: Sentences on what a reader should know of that.
    """

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    origins: Mapping[str, Origin]
    config: Values
    remarks: tuple[str, ...]

    def method_of(
        self, tensor: str, choice: Choice | None, method: str, reason: str, *, overridden: bool
    ) -> tuple[str, str]:
        """The method of a tensor, and why, where `choice` is what merges tensors of its name.

        An adapter's layers are put on the base's as they are, unless an override names a method.

        Raises:
            UsageError: The method cannot merge these models.
        """
        origin = self.origins[tensor]
        origin.refuse(choice)
        if not origin.run.lone:
            return method, f"{reason}: {origin.run.text}"
        return (method if overridden or not origin.experts else PASSTHROUGH), f"of {self._model_of(tensor)} alone"

    def of_lone(self, info: TensorInfo, method: str) -> tuple[Literal["merge", "copy"], str]:
        """What happens to a tensor that is one model's, and why."""
        weight = info.dtype in MERGEABLE_DTYPES and not is_buffer(info)
        whose = self._model_of(info.name)
        return ("merge", f"of {whose} alone") if method == PASSTHROUGH and weight else ("copy", f"as {whose} has it")

    def _model_of(self, tensor: str) -> str:
        place, _ = self.origins[tensor].run.sources[0]
        return f"'{(self.base, *self.experts)[place].name}'"

    def takers(self, tensor: str) -> list[Checkpoint]:
        """The experts that the tensor's method sees."""
        return [self.experts[i] for i in self.origins[tensor].experts]

    def refuse_tables(self, vocab: str | None, files_from: str) -> None:
        """Refuse tables that another model has in the base's place where its tokens are others than the output's.

        Raises:
            PlanError: There is such a table.
        """
        tables = [info for info in self.base.tensors.values() if is_table(info)]
        for place in sorted({self.origins[info.name].stand for info in tables} - {0}):
            expert = self.experts[place - 1]
            if expert.name == files_from and vocab is None:
                continue
            lines = compare(Tokenizers(self.base, [expert]), [1], min(map(row_count, tables)))[1]
            if lines or vocab is not None:
                why = ":\n  " + "\n  ".join(lines) if lines else ", and rows cannot be aligned to the base's tokens"
                raise PlanError(f"the layers begin or end with '{expert.name}', whose tokens' rows come along{why}",
                                hint=f"name '{expert.name}' as the base, and the base as an expert")  # fmt: skip

    def tied(self) -> list[Checkpoint] | None:
        """The experts that both ends of the output are made from; None where those are not the same."""
        ends = {origin.experts for name, origin in self.origins.items() if layer_of(name) is None}
        return [self.experts[i] for i in ends.pop()] if len(ends) == 1 else None


@dataclass(frozen=True, slots=True)
class _Module:
    """A module: what is in it, what stands before the numbers of its layers, and its runs.

    The prefix is None where the module is made as a whole, as it is where nothing is said of it.
    """

    name: str
    holds: Callable[[str], bool]
    prefix: str | None
    texts: Sequence[tuple[str, Sequence[str]]]


def _modules(base: Checkpoint, texts: Sequence[str]) -> list[_Module]:
    """The modules that the texts speak of, in that order, and last what is in none of them."""
    said: dict[str, list[tuple[str, Sequence[str]]]] = {}
    for text in texts:
        module, words = split(text)
        said.setdefault(module, []).append((text, words))
    inside = {module: holds(module, base.tensors) for module in said if module}
    inside[""] = lambda name: not any(each(name) for module, each in inside.items() if module)
    found = []
    for module, each in inside.items():
        runs = said.get(module, [])
        names = [name for name in base.tensors if each(name)]
        layered = any(WORD.fullmatch(word) for _, words in runs for word in words)
        prefix = list_of_layers(names, base.config, base.reference.text) if layered else None
        found.append(_Module(module, each, prefix, runs))
    return found


def stacked(
    base: Checkpoint, experts: Sequence[Checkpoint], texts: Sequence[str], exclude: Sequence[str] = ()
) -> Stack:
    """The models as ones with the layers that the texts name.

    Raises:
        UsageError: A text names what there is not, or an expert is called base.
        PlanError: The models have no one list of layers, or cannot be matched.
    """
    if base.components.keys() != {""}:
        raise PlanError(f"{base.reference.text} has several components, and layers are those of one model",
                        hint="name one of them as the base, by its folder")  # fmt: skip
    if BASE in (expert.name for expert in experts):
        raise UsageError(f"an expert is called '{BASE}', which is the base here", option="layers",
                         hint="name it otherwise, NAME=REF")  # fmt: skip
    (base, beyond), *others = map(_without_predictors, (base, *experts))
    experts = [expert for expert, _ in others]
    modules = _modules(base, texts)
    experts = _matched(base, experts, [module.prefix for module in modules if module.prefix], exclude)
    models = (base, *experts)
    names = [BASE, *(expert.name for expert in experts)]
    views = _Views(models, modules)
    values: Values = {(*place, _PREDICTORS): 0 for place in beyond}
    remarks = [f"Layers of '{model.name}' that predict further tokens are left out: they belong to its own last layer."
               for model, (_, left) in zip(models, ((base, beyond), *others), strict=True) if left]  # fmt: skip
    for module in modules:
        prefix = module.prefix or ""
        own = layers(base.tensors).get(prefix, 0)
        counts = [own if model.vector is not None else layers(model.tensors).get(prefix, 0) for model in models]
        runs = [parse(text, module.name, words, names, counts) for text, words in module.texts]
        runs = runs or [Run("the rest of all models", tuple((model, 0) for model in range(len(models))), None, 0)]
        if module.prefix is None and len(runs) > 1:
            raise UsageError(f"'{runs[1].text}': the module is made twice", option="layers", hint=FORM)
        stack = views.put_together(module, runs)
        if prefix:
            each = [(models[model].config or base.config, counts[model], number) for model, number in stack]
            said, doubtful = stacked_values(base.config, own, each, prefix)
            values = {**values, **said}
            remarks += doubtful
    return views.stack(values, tuple(remarks))


def _without_predictors(model: Checkpoint) -> tuple[Checkpoint, list[Place]]:
    """The model less layers behind its last that predict further tokens, and where its config counts these."""
    places, tensors = [], dict(model.tensors)
    for place, part in text_parts(model.config).items():
        last = next((part[key] for key in COUNTS if part.get(key) and part.get(_PREDICTORS)), inf)
        # Towers have numbers of their own.
        beyond = {name for name in tensors if (layer_of(name) or ("", 0))[1] >= last and not TOWERS.search(name)}
        if beyond:
            places.append(place)
            tensors = {name: info for name, info in tensors.items() if name not in beyond}
    return replace(model, tensors=tensors), places


def _matched(
    base: Checkpoint, experts: Sequence[Checkpoint], prefixes: Sequence[str], exclude: Sequence[str]
) -> tuple[Checkpoint, ...]:
    """The experts by the base's names, of which the base may have fewer layers."""
    ends = {(prefix, layers(base.tensors)[prefix] - 1) for prefix in prefixes}
    last = {name: info for name, info in base.tensors.items() if layer_of(name) in ends}
    found: list[Checkpoint] = []
    complaints: list[str] = []

    def merges(name: str) -> bool:
        return not matches(name, exclude)

    for expert in compared(base, [placed(base, expert) for expert in experts]):
        tall = dict(base.tensors)
        most = max(layers(expert.tensors).values(), default=0)
        for name, info in last.items():
            prefix, number = layer_of(name) or ("", 0)
            for more in range(number + 1, most):
                other = name.replace(f"{prefix}.{number}.", f"{prefix}.{more}.", 1)
                tall[other] = replace(info, name=other, file=Path(other))  # tied to none
        grown = replace(base, tensors=tall)
        one, unsure = match(grown, restack(grown, expert), merges)
        refuse_lookalikes(grown, one, merges)
        found.append(one)
        complaints += unsure
    if complaints:
        raise disagreement(complaints, tables=False)
    return tuple(found)


class _Views:
    """The models as they are put together, tensor by tensor."""

    def __init__(self, models: Sequence[Checkpoint], modules: Sequence[_Module]) -> None:
        self._models = models
        # Of each model, by module and number of the layer, tensors by the ends of their names; others by their names.
        self._content: list[dict[tuple[str, int], dict[str, TensorInfo]]] = []
        self._same = [model.vector.unchanged if model.vector is not None else frozenset() for model in models]
        for model in models:
            content: dict[tuple[str, int], dict[str, TensorInfo]] = defaultdict(dict)
            for name, info in model.tensors.items():
                module = next(module for module in modules if module.holds(name))
                front, number = layer_of(name) or ("", 0)
                if module.prefix and front == module.prefix:
                    content[module.name, number][name[len(f"{front}.{number}.") :]] = info
                else:
                    after = module.prefix is not None and is_after(name, module.prefix)
                    content[module.name, _AFTER if after else _BEFORE][name] = info
            self._content.append(content)
        self._tensors: list[dict[str, TensorInfo]] = [{} for _ in models]
        self._unchanged: list[set[str]] = [set() for _ in models]
        self._lent: list[dict[Path, int]] = [{} for _ in models]  # files of other models, and whose they are
        self._read: list[set[Path]] = [set() for _ in models]
        self._origins: dict[str, Origin] = {}

    def put_together(self, module: _Module, runs: Sequence[Run]) -> list[tuple[int, int]]:
        """Add a module as its runs make it; the model and the layer of it that each of its layers is from."""

        def content(place: int | None) -> Callable[[int, int], Tensors]:
            return lambda model, number: self._content[model].get((module.name, number if place is None else place), {})

        self._take(runs[0], 0, content(_BEFORE), str)
        origins: list[tuple[int, int]] = []
        for run in runs:
            for step in range(run.count or 0):
                front = f"{module.prefix}.{len(origins)}."
                self._take(run, step, content(None), front.__add__)
                origins.append((run.sources[0][0], run.sources[0][1] + step))
        self._take(runs[-1], 0, content(_AFTER), str)
        alone = [name for name in self._models[0].tensors if name.startswith(f"{module.prefix}.0.") and _ALONE in name]
        if origins and (lost := set(alone) - self._origins.keys()):
            raise UsageError(f"'{runs[0].text}': the first layer must be a model's first: it alone has {lost.pop()}",
                             option="layers", hint="begin with layer 0")  # fmt: skip
        return origins

    def _take(self, run: Run, step: int, content: Callable[[int, int], Tensors], name_of: Callable[[str], str]) -> None:
        """Add what a run makes of its models' content, which goes by names in the output."""
        first, start = next((source for source in run.sources if source[0] == run.base), run.sources[0])
        # An adapter is a change to the base's tensor of its own layer.
        stand = (0 if self._models[first].vector is not None else first, start)
        if run.base == first != stand[0]:
            raise UsageError(f"'{run.text}': its base must be a model, not what changes in one", option="layers",
                             hint="name the model with it on: MODEL+ADAPTER")  # fmt: skip
        base = content(stand[0], stand[1] + step)
        merged = [source for source in run.sources if source[0] != (run.base or 0)]
        sources = [(m, n) for m, n in merged if not run.lone or self._models[m].vector is not None]
        for end, info in base.items():
            name = name_of(end)
            have = (m - 1 for m, n in sources if _ALONE not in end or end in content(m, n + step))
            self._origins[name] = Origin(run, tuple(have), stand[0])
            self._put(0, name, info, stand[0])
        for model, number in sources:
            theirs = content(model, number + step)
            same = (stand[0], stand[1]) == (0, number)
            for end, info in theirs.items():
                if info.change is not None and not same:
                    seen = content(0, number + step)[end]
                    self._put(model, name_of(end), self._absolute(model, info, seen), model)
                    self._lend(model, seen, 0)
                else:
                    self._put(model, name_of(end), info, model)
            if self._models[model].vector is not None:
                for end, info in content(0, number + step).items():
                    if end in theirs or info.name not in self._same[model]:
                        continue
                    if same:
                        self._unchanged[model].add(name_of(end))
                    else:
                        self._put(model, name_of(end), info, 0)

    def _absolute(self, model: int, info: TensorInfo, seen: TensorInfo) -> TensorInfo:
        """A change that tells where it is seen from."""
        change = info.change
        if change is None or change.factors is None:
            raise PlanError(
                f"'{self._models[model].name}': its change to '{info.name}' is seen from the base's tensor of that "
                "name, which is not what stands there",
                hint=f"name the base with the same layers in that run: {BASE}:FIRST-LAST",
            )
        return info if change.origin is not None else replace(info, change=replace(change, origin=seen))

    def _put(self, view: int, name: str, info: TensorInfo, owner: int) -> None:
        self._tensors[view][name] = replace(info, name=name)
        self._lend(view, info, owner)

    def _lend(self, view: int, info: TensorInfo, owner: int) -> None:
        self._read[owner] |= info.files
        if view != owner:
            self._lent[view] |= dict.fromkeys(info.files, owner)

    def stack(self, config: Values, remarks: tuple[str, ...]) -> Stack:
        """The models as they are now. Each has the files that something is read from."""
        views = []
        for i, model in enumerate(self._models):
            files = {f: s for f, s in model.files.items() if f in self._read[i] or model.adapter is not None}
            vector = model.vector and replace(model.vector, unchanged=frozenset(self._unchanged[i]))
            views.append(replace(model, tensors=self._tensors[i], files=files, vector=vector, absent=frozenset()))
        for view, lent in zip(views, self._lent, strict=True):
            view.lenders = {**view.lenders, **{file: views[owner] for file, owner in lent.items()}}
        return Stack(views[0], tuple(views[1:]), self._origins, config, remarks)


def of_sources(setting: Setting, method: str | None, sources: tuple[int, ...] | None) -> Setting:
    """How a tensor is merged that is made from some experts alone: their weights and options."""
    if sources is None:
        return setting
    if method == PASSTHROUGH != setting.method:
        setting = Setting(PASSTHROUGH, registry.load(PASSTHROUGH).options(), setting.weights)
    each = {option: tuple(values[i] for i in sources) for option, values in setting.each.items()}
    return replace(setting, weights=tuple(setting.weights[i] for i in sources), each=each)
