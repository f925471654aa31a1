"""`modelmerge merge METHOD BASE EXPERT... -o DIR`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from modelmerge.cli import options as opt
from modelmerge.cli.output import Bars, Format, Sink, size, table
from modelmerge.cli.search import results
from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.contract import Disentangler
from modelmerge.methods.options import option_types
from modelmerge.plan import presets
from modelmerge.plan.recipe import Recipe, parse_weights
from modelmerge.verbs.auto import AUTO, SUMMARY

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from modelmerge.hub.upload import Target
    from modelmerge.verbs.prepare import Prepared

EXAMPLES = (
    "modelmerge merge                                                    (lists the methods)",
    "modelmerge merge task-arithmetic base math code -o merged --scale 0.4",
    "modelmerge merge ties base math=runs/7 code=runs/9 -o merged --weight math=2",
    "modelmerge merge task-arithmetic base math code -o merged --disentangle awd",
    "modelmerge merge ties base math code -o merged --disentangle apgd",
    'modelmerge merge ties base math code -o merged --at "*attn*: tsv-m scale=0.8" --at "*mlp*: kron"',
    "modelmerge merge ties base lora-1 lora-2 -o merged --as-lora 32     (adapters in, an adapter out)",
    "modelmerge merge apgd base sun cars dtd -o merged --device cuda:1 --dry-run",
    "modelmerge merge apgd --preset clip-b32-8 -o merged",
    "modelmerge merge ties base math code -o merged --search scale=0.1:1.0:0.1 --on custom:metric.py:accuracy",
    "modelmerge merge tsv-m base svhn gtsrb -o merged --search scale=0.5:1.5:0.25 --on clip:svhn,limit=500 "
    "--on clip:gtsrb,limit=500",
    "modelmerge merge adamerging base svhn mnist dtd -o merged --task svhn --task mnist --data dtd=images/dtd",
    "modelmerge merge --recipe merged/modelmerge.json -o again",
    "modelmerge merge --recipe mergekit.yml -o merged",
)

Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE",
        help="The model the experts were fine-tuned from, as [NAME=]REF: a directory, a .safetensors or .bin file, or "
        "org/name@revision on the Hugging Face Hub.",
        show_default=False,
    ),
]
Experts = Annotated[
    list[str],
    typer.Argument(metavar="EXPERT", help="The fine-tuned models, as [NAME=]REF each.", show_default=False),
]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="Repeat the merge of a modelmerge.json, or run a mergekit YAML."),
]


def chosen_format(form: str, json: bool, quiet: bool) -> Format:
    """The format that `--format`, `--json` and `-q` ask for."""
    asked = {form} - {"human"} | ({"json"} if json else set()) | ({"quiet"} if quiet else set())
    if len(asked) > 1:
        raise UsageError("--json, --quiet and --format ask for different formats", hint="give one of them")
    return typing.cast(Format, asked.pop() if asked else "human")


def sink_of(values: Mapping[str, Any]) -> Sink:
    """Where the results of a command go whose options are these."""
    return Sink(chosen_format(values["form"], values["json"], values["quiet"]), verbose=values.get("verbose", False))


def examples(lines: tuple[str, ...]) -> str:
    """Examples for the foot of a help page."""
    return "\n\n".join(("[bold]Examples[/]", *(f"[dim]$[/] {line}" for line in lines)))


def usage(kind: str, name: str) -> tuple[str, ...]:
    """Examples of a method."""
    if kind == "merge" and name != AUTO and registry.load(name).finder is not None:
        return (
            f"modelmerge merge {name} base svhn mnist -o out --task svhn --task mnist",
            f"modelmerge merge {name} base svhn mine -o out --task svhn --data mine=photos --classes mine=names.txt",
            f"modelmerge merge {name} base first=a/final second=b/final -o out --script classifiers.py:unlabelled",
        )
    return (
        f"modelmerge {kind} {name} base math code -o out",
        f"modelmerge {kind} {name} base first=a/final second=b/final -o out -q",
    )


def list_methods(kind: str, sink: Sink) -> None:
    """Print the methods of a kind."""
    listed = [{"method": name, "summary": registry.summary(name, kind)} for name in registry.names(kind)]
    listed += [{"method": AUTO, "summary": SUMMARY}] if kind == "merge" else []
    shown = table(None, ["method", ""], [[m["method"], m["summary"]] for m in listed], left=2)
    verb = "disentangle" if kind == "transform" else kind
    usage = f"\nmodelmerge {verb} METHOD BASE EXPERT... -o DIR      (METHOD --help for its options)"
    sink.result({"methods": listed}, quiet="\n".join(m["method"] for m in listed), human=[shown, usage])


def show_preset(preset: presets.Preset, sink: Sink) -> None:
    """Print what a preset stands for."""
    rows = [["base", preset.base], *([name, reference] for name, reference in preset.experts.items())]
    settings = [[name, " ".join(_as_typed(told))] for name, told in preset.methods.items()]
    sink.result(
        {"preset": dataclasses.asdict(preset)},
        quiet="\n".join([preset.base, *preset.experts.values()]),
        human=[
            preset.summary, table(None, ["", "reference"], rows, left=2),
            table(None, ["method", "settings"], settings, left=2),
            f"\nmodelmerge merge METHOD --preset {preset.name} -o DIR",
        ],
    )  # fmt: skip


def _as_typed(options: Mapping[str, Any]) -> list[str]:
    return [
        f"{opt.flag(option)} {each}"
        for option, value in options.items()
        for each in (value if isinstance(value, list) else [value])
    ]


def replay_or_list() -> Callable[..., None]:
    """What `merge` does without a method: list what there is, or repeat a merge."""

    def own(
        recipe: RecipeFile = None,
        preset: opt.Preset = None,
        output: Annotated[
            str | None, typer.Option("-o", "--output", metavar="DIR", help="With --recipe: directory for the result.")
        ] = None,
    ) -> None: ...

    def run(context: typer.Context, **values: Any) -> None:
        """Merge experts of one base into one checkpoint.

        Without a method, list what there is; with --recipe, repeat a merge to the same bits.
        """
        recipe, preset, output = values["recipe"], values["preset"], values["output"]
        if context.invoked_subcommand is not None:
            if preset:
                raise UsageError("--preset stands before the method", hint=f"merge METHOD --preset {preset} -o DIR")
            if recipe:
                raise UsageError("--recipe and a method exclude each other", hint="the recipe names its method")
            return
        if preset and recipe:
            raise UsageError("--recipe and --preset exclude each other", hint="a recipe names its models")
        if output and preset:
            raise UsageError("no method is named", hint=f"merge METHOD --preset {preset} -o {output}")
        if output and not recipe:
            raise UsageError("no method is named", hint=f"there are: {', '.join(registry.names())}")
        if preset:
            show_preset(presets.load(preset), sink_of(values))
        elif not recipe:
            list_methods("merge", sink_of(values))
        elif not output:
            raise UsageError("--recipe needs an output directory", hint="give -o DIR")
        else:
            from pathlib import Path

            from modelmerge.verbs.prepare import prepare_file

            file = Path(recipe).expanduser()
            _run(lambda: prepare_file(file, device=values["device"], stream=values["stream"]), values)

    arguments = [opt.of_argument("context", typer.Context)]
    return opt.with_parameters(run, [*arguments, *opt.shared(own), *opt.shared(opt.written)])


def command(name: str, *, preset: bool = False) -> Callable[..., None]:
    """The Typer command of a merge method, its options made from the method's dataclass.

    With a preset there are no arguments.
    """
    chosen = None if name == AUTO else registry.load(name)
    fronts = {front: registry.load(front, "transform") for front in registry.names("transform")}

    def shared(
        output: opt.Output,
        preset: opt.Preset = None,
        weight: opt.Weight = None,
        at: opt.At = None,
        disentangle: opt.Disentangle = None,
        rest: opt.Rest = None,
        dtype: opt.Dtype = None,
        include: opt.Include = None,
        exclude: opt.Exclude = None,
        on_mismatch: opt.OnMismatch = "error",
        max_shard_size: opt.ShardSize = "5GB",
        seed: opt.Seed = 0,
        as_lora: opt.AsLora = None,
        search: opt.Search = None,
        on: opt.On = None,
    ) -> None: ...

    def run(context: typer.Context, **values: Any) -> None:
        from modelmerge.checkpoint.as_lora import parse_size
        from modelmerge.verbs.prepare import prepare

        if preset:
            values |= _of_preset(presets.load(values["preset"]), name, context)
        if values.get("apgd"):
            values |= _with_apgd(values)
        small = parse_size(values["as_lora"]) if values["as_lora"] is not None else None
        recipe = Recipe(
            method=name,
            base=values["base"],
            experts=tuple(values["experts"]),
            options=opt.chosen(chosen, values, context) if chosen else {},
            weights=parse_weights(values["weight"] or ()),
            at=tuple(values["at"] or ()),
            disentangle=values["disentangle"],
            disentangle_options=_front_options(fronts, values),
            rest=values["rest"],
            dtype=values["dtype"],
            include=tuple(values["include"] or ()),
            exclude=tuple(values["exclude"] or ()),
            on_mismatch=values["on_mismatch"],
            max_shard_size=values["max_shard_size"],
            seed=values["seed"],
            as_lora=(small.rank or small.energy) if small is not None else None,
            unlabelled=_unlabelled(values) if chosen and chosen.finder else {},
        )
        look = not values["dry_run"]
        if values["search"] or values["on"]:
            _search(recipe, values, context, look)
            return
        _run(lambda: prepare(recipe, device=values["device"], stream=values["stream"], look=look), values)

    arguments = [opt.of_argument("context", typer.Context)]
    arguments += [] if preset else [opt.of_argument("base", Base), opt.of_argument("experts", Experts)]
    in_front = [parameter for front, told in fronts.items() for parameter in opt.of_front(front, told)]
    # Required parameters first, as in any signature; the method's own options head the help page.
    own = opt.of_method(chosen) if chosen else []
    own += opt.shared(_published) if chosen and chosen.published else []
    found = opt.shared(opt.drawn) if chosen and chosen.finder else []
    own += [*opt.shared(opt.unlabelled), *opt.shared(_apgd)] if found else []
    return opt.with_parameters(
        run, [*arguments, *own, *opt.shared(shared), *opt.shared(opt.written), *found, *in_front]
    )


def _published(published: opt.Published = False) -> None: ...


def _apgd(apgd: opt.Apgd = False) -> None: ...


def _with_apgd(values: Mapping[str, Any]) -> dict[str, Any]:
    """What --apgd is short for."""
    if values["disentangle"] not in (None, "apgd"):
        raise UsageError(f"--apgd and --disentangle {values['disentangle']} exclude each other")
    if values["apgd_correction"] not in (None, "task"):
        raise UsageError("--apgd is --apgd-correction task", hint="for another one: --disentangle apgd")
    return {"disentangle": "apgd", "apgd_correction": "task"}


def _unlabelled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The unlabelled data that the command line names."""
    words = [parameter.name for parameter in opt.shared(opt.unlabelled)]
    given = {word: values[word] for word in words if values[word] is not None}
    return {{"task": "tasks", "template": "templates"}.get(word, word): value for word, value in given.items()}


def _of_preset(preset: presets.Preset, name: str, context: typer.Context) -> dict[str, Any]:
    """The values that a preset gives: base, experts, and the method's settings that the command line does not give."""
    told: dict[str, Any] = {"base": preset.base, "experts": [f"{n}={ref}" for n, ref in preset.experts.items()]}

    def given(option: str) -> bool:
        source = context.get_parameter_source(option)
        return source is not None and not source.name.startswith("DEFAULT")

    for option, value in preset.methods.get(name, {}).items():
        # Its data give way to data of one's own, whatever these are told by.
        own = ("task", "data", "script") if option == "task" else (option,)
        if not any(map(given, own)):
            told[option] = value
    return told


def _front_options(fronts: dict[str, Disentangler], values: dict[str, Any]) -> dict[str, Any]:
    """The options given for what goes in front of the method."""
    given = {}
    for front, told in fronts.items():
        for spec in option_types(told.options):
            value = values[opt.front_word(front, spec)]
            if value is None:
                continue
            if values["disentangle"] != front:
                word = opt.flag(opt.front_word(front, spec))
                raise UsageError(f"{word} has no effect without --disentangle {front}")
            given[spec] = value
    return given


def destination(values: Mapping[str, Any]) -> Target | None:
    """Where the result is to be pushed, if anywhere."""
    told = {"private": values["private"], "create_pr": values["create_pr"], "message": values["commit_message"]}
    if values["push"] is None:
        for word, value in told.items():
            if value:
                word = opt.flag("commit_message" if word == "message" else word)
                raise UsageError(f"{word} has no effect without --push REPO")
        return None
    from modelmerge.hub.upload import parse_target

    return parse_target(values["push"], **told)


def finish(sink: Sink, target: Target | None, out: Path, data: dict[str, Any], human: list[str | Table]) -> None:
    """Push the finished output, where that is asked for, and print the result."""
    quiet = str(out)
    if target is not None:
        from modelmerge.verbs.push import push_to

        done = push_to(target, out, progress=sink.form == "human" and sink.margin.is_terminal)
        quiet, data = done.url, {**data, "url": done.url, "commit": done.commit}
        human = [*human, f"[bold green]pushed[/] to [bold]{done.url}[/]"]
    sink.result(data, quiet=quiet, human=human)


def checked(target: Target | None, *, create: bool = True) -> dict[str, Any] | None:
    """What there is where the result is to be pushed; an error if that would be refused."""
    if target is None:
        return None
    from modelmerge.hub.upload import check

    return check(target, create=create)


def _search(recipe: Recipe, values: Mapping[str, Any], context: typer.Context, look: bool) -> None:
    """Search the values of options, and do what the options say."""
    from modelmerge.verbs.search import execute_search, parse_axes, prepare_search

    axes = parse_axes(values["search"] or ())
    for name in axes:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{opt.flag(name)} is given, and searched", hint="leave one of them out")

    place = {"device": values["device"], "stream": values["stream"]}
    _run(lambda: prepare_search(recipe, axes, values["on"] or (), look=look, **place), values, execute_search)


def _execute(prepared: Prepared, out: Path, **told: Any) -> dict[str, Any]:
    from modelmerge.verbs.merge import execute

    return execute(prepared, out, **told)


def _run(
    prepare: Callable[[], Any], values: Mapping[str, Any], execute: Callable[..., dict[str, Any]] = _execute
) -> None:
    """Prepare a merge or a search and do what the options say."""
    import contextlib
    import sys
    from pathlib import Path

    from modelmerge.charts import drawing
    from modelmerge.charts.figures import of_coefficients

    sink, target, force, resume = sink_of(values), destination(values), values["force"], values["resume"]
    plot = Path(values["plot"]).expanduser() if values.get("plot") else None
    if plot is not None:
        drawing.check(plot)
    out = Path(values["output"]).expanduser()
    with contextlib.redirect_stdout(sys.stderr):  # what a function of the user's prints is no result
        prepared = prepare()
    if values["dry_run"]:
        plan = {**prepared.describe(), "push": checked(target, create=False)}
        prepared.close()
        sink.result(
            {"plan": plan},
            quiet=str(out),
            human=plan_lines(_with_front(plan["method"], plan["disentangle"]), plan, sink.verbose),
        )
        return
    with Bars(sink) as bars, contextlib.redirect_stdout(sys.stderr):
        manifest = execute(prepared, out, force=force, resume=resume, ready=lambda: checked(target), reporter=bars)
    weights = sum(entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors"))
    counts = manifest["tensors"]
    groups = [f"{len(group['tensors'])} by {group['method']}" for group in counts["groups"]]
    done = [f"{counts['merged']} tensors merged" + (f" ({', '.join(groups)})" if len(groups) > 1 else "")]
    done += [f"{len(counts['copied'])} copied from the base"] if counts["copied"] else []
    lines: list[str | Table] = [
        f"[bold green]merged[/] {len(manifest['inputs']['experts'])} experts with "
        f"{_with_front(manifest['recipe']['method'], manifest['recipe']['disentangle'])}: "
        f"{', '.join(done)}",
        f"[bold]{out}[/]  {size(weights)} of weights in {manifest['seconds']:.1f} s on {manifest['device']}",
    ]
    rounding = manifest["rounding"]
    if rounding and rounding["relative_error"] is not None:
        lines.append(
            f"rounding to {rounding['stored_as']} changes the merged task vector by {rounding['relative_error']:.2%}"
        )
    lines += _coefficient_lines(manifest, sink.verbose) if "adaptation" in manifest else []
    if sink.verbose and counts["copied"]:
        lines.append(table(None, ["copied", "why"], [[k, v] for k, v in counts["copied"].items()], left=2))
    if "searched" in manifest:
        lines = [*results(manifest["searched"]), *lines]
    data = {"output": str(out), "manifest": manifest}
    if plot is not None:
        drawing.save([of_coefficients(manifest["recipe"]["coefficients"])], plot)
        data, lines = {**data, "plot": str(plot)}, [*lines, f"[bold]{plot}[/]"]
    finish(sink, target, out, data, lines)


def _coefficient_lines(manifest: Mapping[str, Any], verbose: bool) -> list[str | Table]:
    """The coefficients that were found on data: of each expert over the tensors, and, if verbose, of each tensor."""
    tasks, found = manifest["adaptation"]["tasks"], manifest["recipe"]["coefficients"]
    rows = []
    for expert, told in tasks.items():
        own = [each[expert] for each in found.values()]
        figures = (sum(own) / len(own), min(own), max(own), told["entropy_before"], told["entropy_after"])
        rows.append([expert, *(f"{figure:.3f}" for figure in figures)])
    lines: list[str | Table] = [
        "",
        table(
            f"Coefficients over {len(found)} tensors; entropy of the predictions in the first and the last "
            f"{manifest['adaptation']['averaged_steps']} steps",
            ["", "mean", "least", "most", "before", "after"],
            rows,
        ),
    ]
    if verbose:
        each = [[tensor, *(f"{value:.3f}" for value in told.values())] for tensor, told in found.items()]
        lines.append(table(None, ["tensor", *tasks], each))
    return lines


def _with_front(name: str, front: str | None) -> str:
    return f"{front} + {name}" if front else name


def plan_lines(head: str, plan: dict[str, Any], verbose: bool) -> list[str | Table]:
    """A plan for people: what happens to how many tensors and why, bytes, peak memory."""
    groups: dict[tuple[str, str], int] = {}
    for tensor in plan["tensors"]:
        groups[tensor["action"], tensor["reason"]] = groups.get((tensor["action"], tensor["reason"]), 0) + 1
    rows = [[action, str(count), reason] for (action, reason), count in sorted(groups.items(), reverse=True)]
    counted = table(None, ["action", "tensors", "why"], rows, left=3)
    sizes, memory = plan["bytes"], plan["peak_memory"]
    lines: list[str | Table] = [
        f"[bold]{head}[/] of {len(plan['experts'])} experts onto {plan['base']['name']}, on {plan['device']}",
        counted,
    ]
    if plan["expert_only"]:
        rows = [[name, ", ".join(experts)] for name, experts in plan["expert_only"].items()]
        lines.append(table(None, ["not in the base, left out", "in"], rows, left=2))
    lines += [f"note: {escape(remark)}" for remark in plan["remarks"]]
    if verbose:
        rows = [
            [
                t["name"],
                "x".join(map(str, t["shape"])) or "0-d",
                f"{t['dtype']} -> {t['stored_as']}",
                t["action"],
                t["reason"],
            ]
            for t in plan["tensors"]
        ]
        lines.append(table(None, ["tensor", "shape", "dtype", "action", "why"], rows, left=5))
    times = f" ({plan['passes']:.3g} passes)" if "passes" in plan else ""
    files = f" in {len(plan['shards'])} file{'s' * (len(plan['shards']) != 1)}" if "shards" in plan else " at most"
    peak = f"peak memory {size(memory['host'])}"
    if memory["device"]:
        peak += f", on the device {size(memory['device'])}"
    if plan["cache"] and sizes["download"]:
        cache = plan["cache"]
        held = "which holds it" if cache["enough"] else "[bold red]too little[/]: --stream stores no weights"
        lines.append(f"{size(cache['free'])} free in {cache['directory']}, {held}")
    lines.append(
        f"download {size(sizes['download'])}, read {size(sizes['read'])}{times}, "
        f"write {size(sizes['write'])}{files}; {peak}"
    )
    if sizes["scratch"]:
        lines.append(f"{size(sizes['scratch'])} beside the output while it runs, for what disentangling found")
    if "search" in plan:
        found = plan["search"]
        lines.append(
            f"{found['candidates']} candidates in {found['merges']} merge{'s' * (found['merges'] != 1)}, each measured "
            f"on {escape(', '.join(found['on']))}; on the disk {size(found['disk']['all'])} at once, where there is "
            f"less {size(found['disk']['least'])} at least"
        )
    if plan["push"]:
        what = [word for word in ("new", "private") if plan["push"][word]]
        what += ["as a pull request"] if plan["push"]["pull_request"] else []
        lines.append(f"push to {plan['push']['repository']} {', '.join(what)}".rstrip())
    return lines
