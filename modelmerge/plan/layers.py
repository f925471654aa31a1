"""Layers from several places: `NAME:FIRST-LAST`, each a run of layers of the output, in order.

A run is one model's layers as they are; or those of several models, or of all (`FIRST-LAST`), merged by the method.
Every model is seen as one that has the output's layers, which are its own tensors by other names; all that follows sees
ordinary models. Where a run does not name the base, the first model of the run stands in the base's place, as one of
those that are merged; `base=NAME:FIRST-LAST` has another model be the base of a run.

What comes before the layers (embeddings) is made as the first run, and what comes after them (final norm, head) as the
last run, from their models alone.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from modelmerge.checkpoint.config_file import Values
from modelmerge.checkpoint.configs import Config, compared
from modelmerge.checkpoint.header import MERGEABLE_DTYPES, TensorInfo, is_buffer
from modelmerge.checkpoint.layer_config import COUNTS, stacked_values
from modelmerge.checkpoint.leftovers import refuse_lookalikes
from modelmerge.checkpoint.matching import is_head, match
from modelmerge.checkpoint.names import matches
from modelmerge.checkpoint.pairing import placed
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError, UsageError, suggestion
from modelmerge.methods import registry
from modelmerge.plan.disagreements import disagreement
from modelmerge.plan.overrides import BASE, Choice, Setting, layer_of, layers
from modelmerge.plan.stacks import restack
from modelmerge.plan.vocabulary import Tokenizers, compare, is_table, row_count

PASSTHROUGH = "passthrough"  # the method that takes one model's weights as they are
_FORM = "write it like math:0-8, 8-16 for all models, or 'math:0-8 code:4-12' for some"
_WORD = re.compile(r"(?:(.*):)?(\d{1,9})-(\d{1,9})", re.DOTALL)
# Words of lists of layers that are no language model's; a `vocab_projector` is a head.
TOWERS = re.compile(r"vision|visual|audio|image|speech|(?<!b_)projector|connector|merger|resampler|abstractor|\bmtp\b")
# What comes after the layers, but for heads: final norms, and what classifies; heads of several weights, too.
_AFTER = re.compile(
    r"(^|\.)(((final_?|output_|out_|post_|embedding_)?(layer_?)?norm(_f|_out)?|ln_f|ln_out|score|qa_outputs|project_out"
    r"|out_proj|multi_choice_classifier|summary)\.[^.]+$"
    r"|((lm_)?head|pooler|cls|(pre_)?classifier|vocab_\w+|output_layer|(gener|discrimin)ator_\w+)\.)|^decoder\.[^.]+$"
)
_BEFORE = re.compile(r"emb(?!edding_norm\.)|wte|wpe|pre_?la?y")
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Run:
    """A run of layers of the output, and the places of the models it is from (the base's is 0) with the first layer.

    `base` is the place of the model that it names as its base, if it does.
    """

    text: str
    sources: tuple[tuple[int, int], ...]
    count: int
    base: int | None = None

    @property
    def based(self) -> bool:
        """Whether it names its base."""
        return self.base is not None

    @property
    def lone(self) -> bool:
        """Whether it is the layers of one model, as they are."""
        return len(self.sources) == 1


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


def parse(text: str, names: Sequence[str], counts: Sequence[int]) -> Run:
    """The run that a text says, of models with these names, the base's first, and so many layers each.

    Raises:
        UsageError: It is none, or names a model or layers that there are not.
    """

    def refusal(why: str, hint: str | None = _FORM) -> UsageError:
        return UsageError(f"'{text}': {why}", option="layers", hint=hint)

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise refusal(str(error)) from None
    spans: dict[int, tuple[int, int]] = {}
    bases: list[int] = []
    for word in words:
        form = _WORD.fullmatch(word)
        if form is None or (form[1] is None and len(words) > 1):
            raise refusal(f"'{word}' is not {'NAME:' if len(words) > 1 else '[NAME:]'}FIRST-LAST")
        first, last = int(form[2]), int(form[3])
        if first >= last:
            raise refusal(f"{first}-{last} holds no layer: the last is not part of it")
        name = form[1] if form[1] is None or form[1] in names else form[1].removeprefix(f"{BASE}=")
        if name is not None and name not in names:
            raise refusal(f"there is no model '{name}'",
                          suggestion(name, names, f"there are: {', '.join(names)}"))  # fmt: skip
        bases += [0 if name is None else names.index(name)] if name in (None, BASE) or name != form[1] else []
        for model in range(len(names)) if name is None else [names.index(name)]:
            if last > counts[model]:
                raise refusal(f"'{names[model]}' has {counts[model]} layers", f"the last is {counts[model]} at most")
            if model in spans:
                raise refusal(f"names '{names[model]}' twice", "name the model twice among the experts, NAME=REF each")
            spans[model] = first, last
    if len({last - first for first, last in spans.values()}) != 1:
        raise refusal("needs as many layers of each model" if spans else "names no layers")
    if len(bases) > 1:
        raise refusal("names two bases", "name the base among the experts too, NAME=REF, to merge it into another")
    first, last = next(iter(spans.values()))
    return Run(text, tuple((model, span[0]) for model, span in spans.items()), last - first, *bases)


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
    prefix = list_of_layers(base.tensors, _said(base.config), base.reference.text)
    experts = _matched(base, experts, prefix, exclude)
    models = (base, *experts)
    own = layers(base.tensors)[prefix]
    counts = [own if model.vector is not None else layers(model.tensors).get(prefix, 0) for model in models]
    runs = [parse(text, [BASE, *(expert.name for expert in experts)], counts) for text in texts]
    views = _Views(models, prefix)
    views.take(runs[0], 0, views.before, lambda name: name)
    number = 0
    for run in runs:
        for step in range(run.count):
            front = f"{prefix}.{number}."
            views.take(run, step, views.layer, lambda end, front=front: front + end)  # type: ignore[misc]
            number += 1
    views.take(runs[-1], 0, views.after, lambda name: name)
    first = [(run.sources[0], step) for run in runs for step in range(run.count)]
    each = [(models[m].config or base.config, counts[m], start + step) for (m, start), step in first]
    config, doubtful = stacked_values(base.config, own, each)
    remarks = [
        f"config.json tells kinds of layers by their numbers in '{key}', and the layers have others here: look whether "
        "that is still right."
        for key in doubtful
        if [number for _, _, number in each] != list(range(len(each)))
    ]
    return views.stack(config, tuple(remarks))


def list_of_layers(names: Iterable[str], said: Sequence[object], where: str) -> str:
    """What stands before the numbers of a model's layers, as `model.layers`; of several lists, the language model's.

    Args:
        names: The names of its tensors.
        said: The numbers of layers that its config names.
        where: What the model is called.

    Raises:
        PlanError: There is no one such list.
    """
    count = layers(names)
    lists = {prefix: n for prefix, n in count.items() if not TOWERS.search(prefix)} or count
    two = any("encoder" in prefix for prefix in lists) and any("decoder" in prefix for prefix in lists)
    if len(lists) > 1 and not two and len(fitting := {prefix: n for prefix, n in lists.items() if n in said}) == 1:
        lists = fitting
    if len(lists) != 1:
        some = ", ".join(f"{prefix} ({n})" for prefix, n in count.items())
        raise PlanError(
            f"{where} has {f'several lists of layers: {some}' if count else 'no numbered layers'}",
            hint="layers can be taken from models that have one list of them",
        )
    return next(iter(lists))


def _said(config: Config) -> list[object]:
    """The numbers of layers in a config, and in those inside it."""
    return [part.get(key) for part in (config, *config.values()) if isinstance(part, dict) for key in COUNTS]


def _matched(
    base: Checkpoint, experts: Sequence[Checkpoint], prefix: str, exclude: Sequence[str]
) -> tuple[Checkpoint, ...]:
    """The experts by the base's names, of which the base may have fewer layers."""
    ours = layers(base.tensors)[prefix]
    last = {name: info for name, info in base.tensors.items() if layer_of(name) == (prefix, ours - 1)}
    found: list[Checkpoint] = []
    complaints: list[str] = []

    def merges(name: str) -> bool:
        return not matches(name, exclude)

    for expert in compared(base, [placed(base, expert) for expert in experts]):
        tall = dict(base.tensors)
        for number in range(ours, max(layers(expert.tensors).values(), default=0)):
            for name, info in last.items():
                other = f"{prefix}.{number}.{name[len(f'{prefix}.{ours - 1}.') :]}"
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

    def __init__(self, models: Sequence[Checkpoint], prefix: str) -> None:
        self._models = models
        self._layers: list[dict[int, dict[str, TensorInfo]]] = []
        self._others: list[dict[str, TensorInfo]] = []
        self._same = [model.vector.unchanged if model.vector is not None else frozenset() for model in models]
        self._prefix = prefix
        for model in models:
            inside: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
            outside: dict[str, TensorInfo] = {}
            for name, info in model.tensors.items():
                front, number = layer_of(name) or ("", 0)
                if front == prefix:
                    inside[number][name[len(f"{prefix}.{number}.") :]] = info
                else:
                    outside[name] = info
            self._layers.append(inside)
            self._others.append(outside)
        self._tensors: list[dict[str, TensorInfo]] = [{} for _ in models]
        self._unchanged: list[set[str]] = [set() for _ in models]
        self._lent: list[dict[Path, int]] = [{} for _ in models]  # files of other models, and whose they are
        self._read: list[set[Path]] = [set() for _ in models]
        self._origins: dict[str, Origin] = {}

    def layer(self, model: int, number: int) -> Tensors:
        """A model's tensors in a layer, by the ends of their names."""
        return self._layers[model].get(number, {})

    def before(self, model: int, _: int) -> Tensors:
        """A model's tensors that come before its layers, or beside them."""
        return {name: info for name, info in self._others[model].items() if not is_after(name, self._prefix)}

    def after(self, model: int, _: int) -> Tensors:
        """A model's tensors that come after its layers."""
        return {name: info for name, info in self._others[model].items() if is_after(name, self._prefix)}

    def take(self, run: Run, step: int, content: Callable[[int, int], Tensors], name_of: Callable[[str], str]) -> None:
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
        origin = Origin(run, tuple(m - 1 for m, _ in sources), stand[0])
        for end, info in base.items():
            name = name_of(end)
            self._origins[name] = origin
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


def is_after(name: str, prefix: str) -> bool:
    """Whether a tensor comes after the layers whose names begin with the prefix, by its own name."""
    if TOWERS.search(name) and not TOWERS.search(prefix):  # a tower has an end of its own, and comes as a whole
        return False
    return is_head(name) or (_AFTER.search(name) is not None and not _BEFORE.search(name))


def of_sources(setting: Setting, method: str | None, sources: tuple[int, ...] | None) -> Setting:
    """How a tensor is merged that is made from some experts alone: their weights and options."""
    if sources is None:
        return setting
    if method == PASSTHROUGH != setting.method:
        setting = Setting(PASSTHROUGH, registry.load(PASSTHROUGH).options(), setting.weights)
    each = {option: tuple(values[i] for i in sources) for option, values in setting.each.items()}
    return replace(setting, weights=tuple(setting.weights[i] for i in sources), each=each)
