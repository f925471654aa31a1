"""`modelmerge merge METHOD BASE EXPERT... -o DIR`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from modelmerge.cli import options as opt
from modelmerge.cli.bars import Bars
from modelmerge.cli.help import with_examples
from modelmerge.cli.output import Sink, flag, line, table
from modelmerge.cli.plan import head, next_lines, part_lines, plan_lines, result_lines
from modelmerge.errors import ModelMergeError, UsageError
from modelmerge.methods import registry
from modelmerge.methods.contract import Method
from modelmerge.methods.options import asks_overlap, change_options, with_experts
from modelmerge.plan import presets
from modelmerge.plan.recipe import Recipe, parse_weights
from modelmerge.verbs.auto import AUTO, SUMMARY, refuse_within

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from modelmerge.hub.upload import Target, Uploader
    from modelmerge.progress import Reporter
    from modelmerge.verbs.prepare import Prepared

MERGE = with_examples(
    "Merge experts of one base into one checkpoint. Without METHOD: list the methods.",
    (
        "modelmerge merge ties base math=runs/7 code=runs/9 -o merged --weight math=2",
        "modelmerge merge --recipe merged/modelmerge.json -o again",
    ),
)


def usage(verb: str, name: str) -> tuple[str, str]:
    """Two examples of a verb with a method."""
    line = f"modelmerge {verb} {name} base math code -o out"
    if verb == "search":
        return (
            f"{line} --try scale=0.2,0.5 --on lm:gsm8k",
            f"{line} --try scale=0.1:1.0:0.1 --on custom:metric.py:score",
        )
    if verb == "merge" and name != AUTO and registry.load(name).on_data:
        return (
            f"modelmerge merge {name} base svhn mine -o out --task svhn --data mine=photos --classes mine=names.txt",
            f"modelmerge merge {name} base first=a/final second=b/final -o out --script classifiers.py:unlabelled",
        )
    if verb == "merge" and name == "ties":
        return f"{line} --dry-run", f"{line} --at '*mlp*: tsv-m scale=0.8'"
    return f"{line} --dry-run", f"modelmerge {verb} {name} base first=a/final second=b/final -o out -q"


def list_methods(verb: str, kind: str, sink: Sink) -> None:
    """Print the methods of a kind."""
    methods = [{"method": name, "summary": registry.summary(name, kind)} for name in registry.names(kind)]
    methods += [{"method": AUTO, "summary": SUMMARY}] if kind == "merge" else []
    grid = table(None, ["method", ""], [[m["method"], m["summary"]] for m in methods], words=2)
    line = f"\nmodelmerge {verb} METHOD BASE EXPERT... -o DIR      (METHOD --help for its options)"
    sink.result({"methods": methods}, quiet="\n".join(m["method"] for m in methods), human=[grid, line])


def listing(verb: str, kind: str) -> Callable[..., None]:
    """What a verb does without a method."""

    def run(sink: Sink, context: typer.Context) -> None:
        if opt.is_alone(context):
            list_methods(verb, kind, sink)

    return opt.command(run, [opt.argument("context", typer.Context)])


def show_preset(preset: presets.Preset, sink: Sink) -> None:
    """Print what a preset stands for."""
    rows = [["base", preset.base], *([name, reference] for name, reference in preset.experts.items())]
    settings = [[name, " ".join(_as_typed(options))] for name, options in preset.methods.items()]
    sink.result(
        {"preset": dataclasses.asdict(preset)},
        quiet="\n".join([preset.base, *preset.experts.values()]),
        human=[
            preset.summary, table(None, ["", "reference"], rows, words=2),
            table(None, ["method", "settings"], settings, words=2),
            f"\nmodelmerge merge METHOD --preset {preset.name} -o DIR",
        ],
    )  # fmt: skip


def _as_typed(options: Mapping[str, Any]) -> list[str]:
    return [
        flag(option) if each is True else f"{flag(option)} {each}"
        for option, value in options.items()
        for each in (value if isinstance(value, list) else [value])
    ]


def replay_or_list(words: Sequence[str]) -> Callable[..., None]:
    """What `merge` does without a method: list what there is, or repeat a merge with other options."""
    file = _recipe_in(words)
    method = _method_of(file) if file is not None else None

    def models(
        recipe: opt.RecipeFile = None, preset: opt.Preset = None, output: opt.OptionalOutput = None,
        allow_different_bits: opt.DifferentBits = False,
    ) -> None: ...  # fmt: skip

    def run(sink: Sink, context: typer.Context, **values: Any) -> None:
        recipe, preset, output = values["recipe"], values["preset"], values["output"]
        if not opt.is_alone(context):
            return
        if preset and recipe:
            raise UsageError("--recipe and --preset exclude each other", hint="a recipe names its models")
        if values["allow_different_bits"] and not recipe:
            raise UsageError("--allow-different-bits has no effect without --recipe FILE")
        if output and preset:
            raise UsageError("no method is named", hint=f"merge METHOD --preset {preset} -o {output}")
        if output and not recipe:
            raise UsageError("no method is named", hint=f"there are: {', '.join(registry.names())}")
        if preset:
            show_preset(presets.load(preset), sink)
        elif not recipe:
            list_methods("merge", "merge", sink)
        elif not output:
            raise UsageError("--recipe needs an output directory", hint="give -o DIR")
        else:
            names = {name for name in values if opt.typed(context, name)}
            weights = parse_weights(values["weight"] or ())
            weighted = {"weight"} if isinstance(weights, str) else {f"{name}.weight" for name in weights}

            def prepared() -> Prepared:
                from modelmerge.verbs.recipes import prepare_file

                return prepare_file(
                    Path(recipe).expanduser(), device=values["device"], stream=values["stream"],
                    change=lambda recipe: _changed(recipe, method, values, names),
                    changed={*names - {"weight"}, *weighted}, script=_script(values, context),
                    allow_different_bits=values["allow_different_bits"],
                )  # fmt: skip

            carry_out(prepared, executed, described, values, sink)

    arguments = [opt.argument("context", typer.Context)]
    parameters = [*(_of_method(method) if method else []), *opt.shared(models), *opt.shared(opt.divided)]
    parameters += [*opt.shared(opt.merged), *opt.shared(opt.written)]
    shown = ("recipe", "preset", "output", "allow_different_bits")
    if file is None:  # the page lists the methods, whose pages have the options
        parameters = [opt.in_help(p, shown=p.name in shown) for p in parameters]
    return opt.command(run, [*arguments, *parameters])


def _recipe_in(words: Sequence[str]) -> Path | None:
    """The file that --recipe names."""
    for word, following in itertools.pairwise([*words, ""]):
        if word == "--recipe" or word.startswith("--recipe="):
            return Path(word.partition("=")[2] or following).expanduser()
    return None


def _method_of(file: Path) -> Method | None:
    """The method of a recipe, for its options; None where it cannot be read, which is said when it is run."""
    from modelmerge.plan import mergekit
    from modelmerge.plan.recipe import read_recipe

    try:
        recipe = mergekit.read(file).recipe if file.suffix in (".yaml", ".yml") else read_recipe(file)[0]
        return registry.load(recipe.method)
    except ModelMergeError:
        return None


def _changed(recipe: Recipe, method: Method | None, values: Mapping[str, Any], names: set[str]) -> Recipe:
    """The recipe of a file with the options that were typed in place of its own."""
    fields = _fields(values)
    if isinstance(fields.get("weights"), dict) and isinstance(recipe.weights, dict):
        fields["weights"] = {**recipe.weights, **fields["weights"]}
    options = opt.of_values(method, values, names) if method else {}
    if method and method.on_data:
        if unlabelled := _unlabelled(values):
            fields |= {"unlabelled": unlabelled, "coefficients": {}}
        elif options:
            fields["coefficients"] = {}
    if method and options:
        changed = change_options(method, recipe.method, recipe.options, options, len(recipe.experts), recipe.overlap)
        if recipe.overlap is not None or not asks_overlap(changed):  # else it is measured
            changed = with_experts(changed, len(recipe.experts), recipe.overlap)
        fields["options"] = dataclasses.asdict(changed)
    return dataclasses.replace(recipe, **fields)


def command(name: str, *, preset: bool = False) -> Callable[..., None]:
    """The Typer command of a merge method, its options made from the method's dataclass.

    With a preset there are no arguments.
    """
    method = None if name == AUTO else registry.load(name)

    def run(sink: Sink, context: typer.Context, **values: Any) -> None:
        recipe = recipe_of(name, method, values, context)
        refuse_early(recipe, values)
        place = {"device": values["device"], "stream": values["stream"], "look": not values["dry_run"]}
        if (within := values.get("within")) is not None:
            refuse_within(name, within, {way: values[way] for way in ("cluster", "part", "finish")})
            place["within"] = within
        place["script"] = _script(values, context)

        def prepared() -> Prepared:
            from modelmerge.verbs.parts import as_measured
            from modelmerge.verbs.prepare import prepare

            return prepare(as_measured(recipe, values["finish"] or ()), **place)

        carry_out(prepared, executed, described, values, sink)

    return opt.command(run, parameters(method, preset=preset))


def parameters(method: Method | None, *, preset: bool = False) -> list[Any]:
    """What a command takes that merges by a method: its own options first, then those of every merge."""
    first = [opt.argument("context", typer.Context)]
    # A method that takes a model's weights as they are may have none but the base's.
    experts = (
        opt.Layered if method and method.most_experts == 1 and method.on_weights(method.options()) else opt.Experts
    )
    first += [] if preset else [opt.argument("base", opt.Base), opt.argument("experts", experts)]

    def output(output: opt.Output, preset: opt.Preset = None) -> None: ...

    return [
        *first, *(_of_method(method) if method else opt.shared(opt.chosen)), *opt.shared(output),
        *opt.shared(opt.divided),
        *opt.shared(opt.merged), *opt.shared(opt.written),
    ]  # fmt: skip


def _of_method(method: Method) -> list[Any]:
    data = [*opt.shared(opt.unlabelled), *opt.shared(opt.drawn)] if method.on_data else []
    return [*opt.of_method(method), *data]


def recipe_of(name: str, method: Method | None, values: dict[str, Any], context: typer.Context) -> Recipe:
    """The recipe that the command line describes."""
    names = {word for word in values if opt.typed(context, word)}
    if values["preset"]:
        chosen = _of_preset(presets.load(values["preset"]), name, names)
        values |= chosen
        names |= chosen.keys()
    return Recipe(
        method=name,
        base=values["base"],
        experts=tuple(values["experts"]),
        options=opt.of_values(method, values, names) if method else {},
        unlabelled=_unlabelled(values) if method and method.on_data else {},
        **_fields(values),
    )


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the shared options say of a recipe, as far as they were typed."""
    fields: dict[str, Any] = {
        name: tuple(values[name]) for name in ("at", "layers", "disentangle", "include", "exclude") if values[name]
    }
    plain = ("rest", "dtype", "on_mismatch", "vocab", "files_from", "max_shard_size", "seed")
    fields |= {name: values[name] for name in plain if values[name] is not None}
    if "vocab" in fields:
        fields["tables"] = None  # a mergekit configuration's
    if values["weight"]:
        fields["weights"] = parse_weights(values["weight"])
    if values["as_lora"] is not None:
        from modelmerge.checkpoint.as_lora import parse_size

        small = parse_size(values["as_lora"])
        fields["as_lora"] = small.rank or small.energy
    return fields


def _unlabelled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The unlabelled data that the command line names."""
    words = [parameter.name for parameter in opt.shared(opt.unlabelled)]
    return {opt.PLURALS.get(word, word): values[word] for word in words if values[word] is not None}


def _script(values: Mapping[str, Any], context: typer.Context) -> str | None:
    """The script that the command line itself names."""
    return values["script"] if "script" in values and opt.typed(context, "script") else None


def _of_preset(preset: presets.Preset, name: str, typed: set[str]) -> dict[str, Any]:
    """Base, experts, and the settings of a preset for the method that the command line does not give."""
    values: dict[str, Any] = {"base": preset.base, "experts": [f"{n}={ref}" for n, ref in preset.experts.items()]}
    for option, value in preset.methods.get(name, {}).items():
        # A preset's data give way to other data, however they are named.
        rivals = {"task", "data", "script"} if option == "task" else {option}
        if not rivals & typed:
            values[option] = value
    return values


def executed(prepared: Prepared, out: Path, **how: Any) -> dict[str, Any]:
    """Do a merge that is prepared; its manifest."""
    from modelmerge.verbs.merge import execute

    return execute(prepared, out, **how)


def described(prepared: Prepared, **how: Any) -> dict[str, Any]:
    """The plan of a merge that is prepared."""
    from modelmerge.verbs.merge import describe

    return describe(prepared, **how)


def refuse_early(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Refuse what can be known to be wrong without torch, whose import takes seconds."""
    from modelmerge.checkpoint.output import check_output
    from modelmerge.plan.checks import check_recipe

    paths = [part.path for reference in check_recipe(recipe) for part in reference.parts]
    if not values["dry_run"]:
        force = any(values.get(name) for name in ("force", "resume", "cluster"))
        check_output(Path(values["output"]).expanduser(), paths, force=force)


def destination(values: Mapping[str, Any]) -> Target | None:
    """Where the result is to be pushed, if anywhere."""
    if values["push"] is None:
        if values["private"]:
            raise UsageError("--private has no effect without --push REPO")
        return None
    from modelmerge.hub.upload import parse_target

    return parse_target(values["push"], private=values["private"])


def finish(sink: Sink, target: Target | None, out: Path, data: dict[str, Any], human: list[str | Text | Table]) -> None:
    """Push the finished output, where that is asked for, and print the result."""
    quiet = str(out)
    if target is not None:
        from modelmerge.verbs.push import push_to

        done = push_to(target, out, progress=sink.form == "human" and sink.margin.is_terminal)
        quiet, data = done.url, {**data, "url": done.url, "commit": done.commit}
        human = [*human, line(("pushed", "bold green"), " to ", (done.url, "bold"))]
    sink.result(data, quiet=quiet, human=human)


def checked(target: Target | None, *, create: bool = True) -> dict[str, Any] | None:
    """What there is where the result is to be pushed; an error if that would be refused."""
    if target is None:
        return None
    from modelmerge.hub.upload import check

    return check(target, create=create)


@contextlib.contextmanager
def _uploader(target: Target | None, progress: Reporter) -> Iterator[dict[str, Uploader]]:
    """What `execute` is told of an upload that goes along with a merge; nothing where there is none."""
    if target is None:
        yield {}
        return
    from modelmerge.hub.upload import Uploader

    with Uploader(target, progress) as uploader:
        yield {"uploader": uploader}


def carry_out(
    prepare: Callable[[], Any],
    execute: Callable[..., dict[str, Any]],
    describe: Callable[..., dict[str, Any]],
    values: Mapping[str, Any],
    sink: Sink,
    more: Callable[[Mapping[str, Any]], list[str | Text | Table]] = lambda manifest: [],
) -> None:
    """Prepare a merge or a search, and print its plan or do it; `more` goes above what is printed of the result."""
    target, out = destination(values), Path(values["output"]).expanduser()
    pictures = None
    if values.get("plot") or values.get("page"):
        from modelmerge.verbs.render import pictures_at

        pictures = pictures_at(values["plot"], "auto", values.get("page"))
    # An empty text is no part: who means one must not get the whole.
    ways: dict[str, Any] = {name: values.get(name) for name in ("cluster", "part", "finish")}
    divided = {name: value for name, value in ways.items() if value not in (None, [])}
    if target is not None and "part" in divided:
        raise UsageError("--push has no place beside --part", hint="push once it is done: modelmerge push DIR")
    resume = {"resume": values["resume"]} if "resume" in values else {}
    # What a function of the user's prints is no result.
    with Bars(sink) as bars, contextlib.redirect_stdout(sys.stderr):
        with bars.waiting("planning"):
            prepared = prepare()
        if not values["dry_run"]:
            # A search writes many files of which one model stays.
            ahead = target if "cluster" in values else None
            with _uploader(ahead, bars) as uploading:
                manifest = execute(
                    prepared, out, force=values["force"], **resume, **divided, **uploading,
                    ready=lambda: checked(target), progress=bars,
                )  # fmt: skip
    if values["dry_run"]:
        plan = {**describe(prepared, **divided), "push": checked(target, create=False)}
        prepared.close()
        title = head(plan["method"], plan["disentangle"])
        sink.result({"plan": plan}, quiet=str(out), human=plan_lines(title, plan, sink.verbose))
        return
    data = {"output": str(out), "manifest": manifest}
    if "part" in manifest:
        sink.result(data, quiet=str(out), human=part_lines(manifest, out))
        return
    lines = [*more(manifest), *result_lines(manifest, out, verbose=sink.verbose)]
    if pictures is not None:
        files = pictures.write_of(manifest)
        data, lines = {**data, "pictures": [*map(str, files)]}, [*lines, *(line((str(f), "bold")) for f in files)]
    if uploading and not uploading["uploader"].commits:
        target, lines = None, [*lines, line("the process that put it in place pushes it")]
    finish(sink, target, out, data, [*lines, *next_lines(manifest, out)])
