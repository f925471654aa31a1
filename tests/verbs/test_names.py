"""Whatever a directory is called: it is merged, replayed, evaluated, extracted, verified, and told as text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import modelmerge
from modelmerge.checkpoint.output import CARD
from modelmerge.checkpoint.reference import Named, parse
from modelmerge.cli import main
from modelmerge.errors import UsageError
from tests.support.checkpoints import read, same_bits
from tests.support.commands import run
from tests.support.strangers import HOSTILE, steers, tokens

PROGRAM = (sys.executable, "-m", "modelmerge")
NAMES = [
    "my expert", "run (1)", "epoch=3-step=100", "=", "==", "a=", "=a", "e=one", "x@y", "a:b", "a,b", "a[1]", "*", "?x",
    "[a-z]*", "[red]x[bold]", ".hidden", "..x", "-x", "--force", "_x", "a\nb", "a\n```\n# h", "q'u\"o`te",
    "\x1b[31mred", "\u202eevil", "b\udcff\udcfe", "é", "e\u0301", "x" * 255, "ü" * 127, "~", "~root", "$HOME", "a|b",
    "<script>", "a\\b", "a#b", "100%", "{x}", " ", "x.", "\r", "\x07", "\x9b31m", "null", "--", "README.md", "hf:",
    "modelmerge-hub-x",
]  # fmt: skip
SOME = ["epoch=3-step=100", "[red]x[bold]", "a\n```\n# h", "\x1b[31m\u202e", "b\udcff", "x" * 255, "-x", "~root"]


def model(place: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    place.mkdir(parents=True)
    state = {"m.0.w.weight": torch.randn(4, 4, generator=generator), "b": torch.randn(2, generator=generator)}
    file = place.parent / "new.safetensors"  # which the longest names leave no room for
    save_file(state, file)
    os.rename(file, place / "model.safetensors")
    (place / "config.json").write_text('{"model_type": "x"}')
    return place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "base", 0)
    model(tmp_path / "one", 1)
    Path("score.py").write_text("def score(model):\n    return 0.5\n")
    return tmp_path


def as_text(*places: str) -> None:
    """All that was written there for readers is UTF-8 without codes; JSON is plain letters."""
    files = [
        file
        for place in places
        for file in Path(place).rglob("*")
        if file.is_file() and file.suffix in (".json", ".md", ".html")
    ]
    assert files
    for file in files:
        content = file.read_bytes().decode()
        assert not steers(content), file
        assert file.suffix != ".json" or content.isascii()


@pytest.mark.parametrize("names", [SOME, pytest.param(NAMES, marks=pytest.mark.slow)], ids=len)
def test_experts_of_any_name_go_through_every_verb(
    names: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(names):
        model(here / "d" / name, i)
    experts = [f"./d/{name}" for name in names]
    weight = [f"--weight={name}={1 + i}" for i, name in enumerate(names)]
    lines = {
        "merge": ("merge", "task-arithmetic", "base", *experts, "-o", "k", *weight),
        "replay": ("merge", "--recipe", "k/modelmerge.json", "-o", "again"),
        "plan": ("merge", "ties", "base", *experts, "-o", "p", "--dry-run", "-v"),
        "verify": ("verify", "k"),
        "weights": ("eval", "weights", "k", "--no-decompose", "--report", "weights.html"),
        "custom": ("eval", "custom", *experts, "k", "--script", "score.py:score", "--no-cache", "--update-card",
                   "--report", "custom.html", "--plot", "bars.svg"),
        "extract": ("extract", "base", *experts, "-o", "v"),
        "verify vectors": ("verify", "v", "-v"),
        "vectors": ("merge", "task-arithmetic", "base", *(f"./v/{name}" for name in names), "-o", "kv", *weight),
        "disentangle": ("disentangle", "awd", "base", *experts, "-o", "t", "--experts"),
    }  # fmt: skip
    for label, line in lines.items():
        code, out, err = run(capsys, *line)
        assert code == 0, (label, err)
        assert not steers(out + err), label
    assert same_bits(read(Path("k")), read(Path("again")))
    for place in ("k", "again"):
        manifest = json.loads(Path(place, "modelmerge.json").read_bytes())
        assert [expert["name"] for expert in manifest["inputs"]["experts"]] == names
        assert [expert["name"] for expert in manifest["recipe"]["experts"]] == names
        assert manifest["recipe"]["experts"][0]["reference"] == str(here / "d" / names[0])
    as_text(".")


def test_what_strangers_wrote_into_files_is_text_everywhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors' and tasks' names, a licence, an adapter's base, an index: through merge, eval, cards and pages."""
    hostile = HOSTILE.replace("\x00", "").replace("\udcff", "")  # which no JSON of safetensors can hold
    for i, name in enumerate(("base", "one")):
        state = {"m.0.w.weight": torch.randn(4, 4), f"{name}.{hostile}": torch.randn(3), hostile: torch.randn(2)}
        save_file(state, Path(name, "model.safetensors"))
        Path(name, "README.md").write_text(f"---\nlicense: {json.dumps(hostile + str(i))}\n---\n")
    Path("score.py").write_text(f"def score(model):\n    return {{{hostile!a}: 0.5}}\n")
    card = ("score.py:score", "--no-cache", "--update-card", "--report", "k/custom.html", "--plot", "bars.svg")
    for line in (
        ("merge", "ties", "base", "one", "-o", "k", "--dry-run", "-v"),
        ("merge", "ties", "base", "one", "-o", "k", "-v"),
        ("eval", "weights", "k", "--exclude", "base*", "--per-layer", "--report", "k/weights.html"),
        ("eval", "custom", "k", "one", "--script", *card),
        ("eval", "custom", "k", "--script", "score.py:score", "--fail-under", "avg=0.1"),
        ("extract", "base", "one", "-o", "v", "-v"),
        ("merge", "average", "base", "one", "-o", "e", "--at", f"{hostile} nonsense"),
    ):
        code, out, err = run(capsys, *line)
        assert code == (2 if "e" in line else 0), (line, err)
        assert "Traceback" not in err
        assert not steers(out + err), line
        assert "extract" in line or "[red]x[/red]" in out + err
    as_text("k", "v")
    body = Path("k", CARD).read_text().split("---\n", 2)[2]
    kinds = [token for token in tokens(body) if token.type in ("heading_open", "html_inline", "link_open")]
    titles = [line for line in body.splitlines() if line.startswith("#")]
    assert len(kinds) - len(titles) == 1, "the method's link"
    assert "heading" not in " ".join(titles)


@pytest.mark.parametrize("name", SOME, ids=ascii)
def test_bases_and_outputs_of_any_name(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(here / "d" / name, 2)
    for line in (
        ("merge", "average", f"./d/{name}", "one", "-o", f"./o/{name}"),
        ("merge", "--recipe", f"./o/{name}", "-o", f"./o/{name}", "--force"),
        ("verify", f"./o/{name}"),
        ("eval", "weights", f"./o/{name}"),
        ("eval", "custom", f"./o/{name}", "--script", "score.py:score", "--no-cache", "--update-card", "--json"),
        ("extract", f"./o/{name}", "one", "-o", f"./v/{name}"),
    ):
        code, out, err = run(capsys, *line)
        assert code == 0, (line, err)
        assert not steers(out + err), line
    assert json.loads(Path("o", name, "modelmerge.json").read_bytes())["recipe"]["base"]["name"] == name
    as_text("o", "v")
    assert sorted(os.listdir("o")) == [name], "nothing is left beside it"


def test_a_process_of_its_own_takes_any_name(here: Path) -> None:
    name = "b\udcff\udcfe=\n\x1b[31m"
    model(here / name, 2)
    merged = subprocess.run([*PROGRAM, "merge", "average", "base", "one", f"./{name}", "-o", f"o/{name}", "-q"],
                            capture_output=True, check=True)  # fmt: skip
    assert merged.stdout == os.fsencode(f"o/{name}\n")
    recipe = os.fsdecode(merged.stdout.removesuffix(b"\n"))
    assert main(["merge", "--recipe", recipe, "-o", "again"]) == 0
    assert Path(recipe, "model.safetensors").read_bytes() == Path("again", "model.safetensors").read_bytes()


def test_a_name_that_was_typed_stays_with_base_and_experts(here: Path) -> None:
    modelmerge.merge("my base=base", {"a=b": "one", "=": "base"}, "k", method="average")
    again = modelmerge.replay("k", "again")
    assert [again["inputs"]["base"]["name"], *(e["name"] for e in again["inputs"]["experts"])] == [
        "my base",
        "a=b",
        "=",
    ]


def test_manifests_that_had_name_and_location_in_one_text_are_replayed(here: Path) -> None:
    model(here / "my expert", 4)
    manifest = modelmerge.merge("base", ["one", "./my expert"], "k", method="ties")
    recipe = manifest["recipe"]
    recipe["base"] = recipe["base"]["reference"]
    recipe["experts"] = [f"{expert['name']}={expert['reference']}" for expert in recipe["experts"]]
    Path("k", "modelmerge.json").write_text(json.dumps(manifest))
    again = modelmerge.replay("k", "again")
    assert [expert["name"] for expert in again["recipe"]["experts"]] == ["one", "my expert"]
    assert same_bits(read(Path("k")), read(Path("again")))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../x", "a\0b"])
def test_what_no_directory_is_called_is_no_name(name: str, here: Path) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a model"):
        parse(Named(name, "one"))
    with pytest.raises(UsageError, match="cannot be the name of a model"):
        modelmerge.extract("base", {name: "one"}, "v")
    assert not Path("v").exists()


def test_an_expert_cannot_take_the_manifests_place(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("one", "modelmerge.json")
    code, _, err = run(capsys, "extract", "base", "./modelmerge.json", "-o", "v")
    assert (code, "cannot be called 'modelmerge.json' here" in err) == (2, True)
    assert main(["extract", "base", "other=./modelmerge.json", "-o", "v"]) == 0
    assert Path("v/other", "model.safetensors").exists()
    assert not Path("v", CARD).exists()


def test_copies_of_a_model_are_told(models: list[Path], tmp_path: Path) -> None:
    copies = [
        shutil.copytree(model, tmp_path / "copies" / name)
        for model, name in zip(models[:2], ("zero", "one"), strict=True)
    ]
    manifest = modelmerge.merge(models[0], [*models[1:], *copies], tmp_path / "out", method="ties")
    told = [note for note in manifest["notes"] if "same files" in note]
    assert told == ["'zero': its weights are the same files as the base's: its task vector is zero.",
                    f"'one': its weights are the same files as those of '{models[1].name}'."]  # fmt: skip
