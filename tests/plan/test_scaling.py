"""Factors on the task vectors by layer, for every method."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.cli import main
from modelmerge.engine import job
from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.options import option_types
from modelmerge.plan import scaling
from tests.support.checkpoints import SHAPES, State, base_state, read, same_bits, write
from tests.support.methods import takes

NAMES = registry.data_free()
FLOATING = list(SHAPES)
FACTORS = {"model.layers.0.q_proj.weight": 0.5, "*.mlp.up_proj.*": 2.0, "*embed*": 0.25}


def merged(models: list[Path], out: Path, **told: Any) -> State:
    modelmerge.merge(models[0], models[1:], out, **told)
    return read(out)


def factor(name: str) -> float:
    return 0.5 if "q_proj" in name else 2.0 if "up_proj" in name else 0.25 if "embed" in name else 1.0


# --- what is said ---


@pytest.mark.parametrize(
    ("text", "entries", "back"),
    [
        ("0.5,1.2", (("*", (0.5, 1.2)),), "0.5,1.2"),
        ("2", (("*", (2.0,)),), "2"),
        ("[1, 0, 1e-3]", (("*", (1.0, 0.0, 1e-3)),), "1,0,0.001"),
        ('{"*a*": 0.5, "*": [1, 2]}', (("*a*", (0.5,)), ("*", (1.0, 2.0))), '{"*a*": 0.5, "*": [1.0, 2.0]}'),
    ],
)  # fmt: skip
def test_grammar_and_back(text: str, entries: Any, back: str) -> None:
    said = scaling.parse(text)
    assert said.entries == entries
    assert str(said) == back
    assert scaling.parse(back) == said


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files_say_the_same(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"f.{suffix}"
    told = {"*q_proj*": 0.5, "*.[01].*": [1e-3, 2]}
    file.write_text(json.dumps(told) if suffix == "json" else '"*q_proj*": 0.5\n"*.[01].*":\n- 1e-3\n- 2\n')
    assert scaling.parse(str(file)) == scaling.parse(json.dumps(told))
    file.write_text("[0.5, 1]" if suffix == "json" else "- 0.5\n- 1\n")
    assert scaling.parse(str(file)) == scaling.parse("0.5,1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no such file|cannot be read"),
        ("0.5:1.2", "no such file, and no numbers write it like 0.5,1.2"),
        ("0.5,,1", "no such file, and no numbers"),
        ("inf", "no such file, and no numbers"),
        ("{}", "neither a mapping"),
        ("[]", r"'\*': \[\] is no finite number"),
        ('{"*": "much"}', "'much' is no finite number"),
        ('{"*": [1, NaN]}', "is no finite number"),
        ('{"*": true}', "True is no finite number"),
        ('{"*": {"a": 1}}', "is no finite number"),
        ('{"*": 1,', "no JSON or YAML"),
        ('{"*a*": 1, "*a*": 2}', r"'\*a\*' comes twice"),
        ('{"*colour*": 1}', r"'\*colour\*' matches no tensor that is merged .* names are like: "),
        ('{"*": 1, "*mlp*": 2}', r"'\*mlp\*' matches no tensor that is merged and that no glob before it matches"),
        ('{"*embed*": [1, 2]}', r"goes over layers, and no tensor of '\*embed\*' lies in one"),
    ],
)
def test_what_is_none_is_refused(text: str, says: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        merged(models, tmp_path / "out", method="ties", layer_scale=text)
    assert re.search(says, f"{refused.value.message} {refused.value.hint}")
    assert refused.value.message.startswith("--layer-scale")


def test_a_yaml_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.yml").write_text('"*a*": 1\n"*a*": 2\n')
    with pytest.raises(UsageError, match=r"f\.yml: '\*a\*' comes twice"):
        scaling.parse(str(tmp_path / "f.yml"))


def test_factors_by_layer() -> None:
    names = ["embed", "enc.0.w", "enc.1.w", "enc.2.w", "dec.0.w", "dec.1.w", "head.weight"]
    assert scaling.parse("0.5,1,2").factors(names) == {
        "embed": 1.0, "enc.0.w": 0.5, "enc.1.w": 1.0, "enc.2.w": 2.0, "dec.0.w": 0.5, "dec.1.w": 2.0,
        "head.weight": 1.0,
    }  # fmt: skip
    both = scaling.parse('{"dec*": [3, 4], "head*": 0, "*.1.*": 7}').factors(names)
    assert both == dict.fromkeys(names, 1.0) | {"dec.0.w": 3.0, "dec.1.w": 4.0, "head.weight": 0.0, "enc.1.w": 7.0}


# --- what is merged ---


@pytest.mark.parametrize("name", NAMES)
def test_every_method_merges_the_scaled_task_vectors(
    name: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As experts that went so far; powers of two and float64, so that their task vectors are exact."""
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    states = [read(path) for path in models[: 1 + takes(name, 3)]]
    far = [
        {k: states[0][k].double() + factor(k) * (state[k] - states[0][k]).double() if k in SHAPES else state[k]
         for k in state}
        for state in states
    ]  # fmt: skip
    paths = [write(tmp_path / f"{i}", state) for i, state in enumerate(far)]
    told = (
        {"method": name, "density": 0.5} if "density" in option_types(registry.load(name).options) else {"method": name}
    )
    names = [f"expert_{i}={path}" for i, path in enumerate(paths[1:])]
    modelmerge.merge(paths[0], names, tmp_path / "far", **told)
    want = read(tmp_path / "far")
    got = merged(models[: len(paths)], tmp_path / "out", layer_scale=FACTORS, **told)
    for key in FLOATING:
        moved = want[key] - far[0][key]
        assert (got[key].double() - want[key]).norm() <= 1e-5 * moved.norm() + 1e-8 * states[0][key].norm() * 2, key
    assert not same_bits(got, merged(models[: len(paths)], tmp_path / "plain", **told))


def test_a_curve_in_float64(models: list[Path], tmp_path: Path) -> None:
    got = merged(models, tmp_path / "out", method="task-arithmetic", scale=1.0, layer_scale=[0.5, 1.25])
    base, *experts = ({k: t.double() for k, t in read(path).items()} for path in models)
    for key in FLOATING:
        scale = 0.5 if ".0." in key else 1.25 if ".1." in key else 1.0
        want = base[key] + scale * sum(expert[key] - base[key] for expert in experts)
        assert torch.allclose(got[key].double(), want, atol=1e-7), key


def test_a_trim_counts_the_scaled_entries(models: list[Path], tmp_path: Path) -> None:
    """In float64; what is scaled by nothing is trimmed first."""
    got = merged(models[:2], tmp_path / "out", method="ties", scale=1.0, density=0.3, layer_scale=FACTORS)
    base, expert = (read(path) for path in models[:2])
    tau = torch.cat([(factor(k) * (expert[k] - base[k])).flatten() for k in FLOATING])
    want = tau * (tau.abs() >= tau.abs().sort(descending=True).values[int(0.3 * len(tau))])
    assert torch.allclose(torch.cat([(got[k] - base[k]).flatten() for k in FLOATING]), want, atol=1e-7)


@pytest.mark.parametrize("name", ["tsv-m", "kron"])
def test_factors_of_low_rank_experts_are_scaled_too(name: str, tmp_path: Path) -> None:
    """As whole experts that went half as far."""
    base, keys = base_state(torch.float64), [key for key in FLOATING if key.endswith("proj.weight")]
    write(tmp_path / "base", base)
    for i in range(3):
        for folder, size in (("far", 1e-2), ("half", 5e-3)):
            state, generator = dict(base), torch.Generator().manual_seed(i)
            for key in keys:
                m, n = SHAPES[key]
                left, right = (torch.randn(shape, generator=generator) for shape in ((m, 2), (2, n)))
                state[key] = base[key] + size * left @ right
            write(tmp_path / folder / f"e{i}", state)
    modelmerge.extract(tmp_path / "base", [tmp_path / "far" / f"e{i}" for i in range(3)], tmp_path / "low", rank=2)
    told: dict[str, Any] = {"method": name, "rest": "base", "include": ["*proj.weight"]}
    want = merged([tmp_path / "base", *(tmp_path / "half" / f"e{i}" for i in range(3))], tmp_path / "want", **told)
    low = [tmp_path / "base", *(tmp_path / "low" / f"e{i}" for i in range(3))]
    got = merged(low, tmp_path / "got", layer_scale="0.5", **told)
    for key in keys:
        moved = want[key] - base[key]
        assert (got[key] - want[key]).norm() <= 1e-4 * moved.norm()
        assert moved.norm() > 1e-3


def test_disentangled_task_vectors_are_scaled(models: list[Path], tmp_path: Path) -> None:
    told: dict[str, Any] = {"method": "task-arithmetic", "scale": 1.0, "disentangle": "awd"}
    plain = merged(models, tmp_path / "plain", **told)
    got, base = merged(models, tmp_path / "out", layer_scale=FACTORS, **told), read(models[0])
    for key in FLOATING:
        assert torch.allclose(got[key] - base[key], factor(key) * (plain[key] - base[key]), atol=1e-7)


def test_as_lora(models: list[Path], tmp_path: Path) -> None:
    told: dict[str, Any] = {"method": "ties", "include": ["*proj.weight"], "layer_scale": "0.5,2"}
    whole, base = merged(models, tmp_path / "whole", **told), read(models[0])
    merged(models, tmp_path / "lora", as_lora=16, **told)
    factors = read(tmp_path / "lora")
    for key in (key for key in FLOATING if key.endswith("proj.weight")):
        place = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        product = factors[f"{place}B.weight"] @ factors[f"{place}A.weight"]
        assert torch.allclose(product, whole[key] - base[key], atol=1e-6)


# --- what is told ---


def test_the_recipe_and_the_command_repeat_it_without_the_file(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text('"*q_proj*": 0.5\n"*": [0.5, 1.5]\n')
    words = ["merge", "ties", *map(str, models), "--layer-scale", str(file), "--rule", "*mlp*=tsv-m"]
    assert main([*words, "-o", str(tmp_path / "one"), "--dry-run"]) == 0
    assert "task vectors times 0.5 to 1.5, by layer" in capsys.readouterr().out
    assert main([*words, "-o", str(tmp_path / "one"), "-q"]) == 0
    file.unlink()
    manifest = json.loads((tmp_path / "one" / "modelmerge.json").read_text())
    assert manifest["tensors"]["layer_scale"]["model.layers.1.mlp.down_proj.weight"] == 1.5
    assert main(["merge", "--recipe", str(tmp_path / "one"), "-o", str(tmp_path / "two"), "-q"]) == 0
    again = shlex.split(manifest["command"])[1:]
    again[again.index("-o") + 1] = str(tmp_path / "three")
    assert main([*again, "-q"]) == 0
    assert all(same_bits(read(tmp_path / name), read(tmp_path / "one")) for name in ("two", "three"))
    assert "| `--layer-scale` |" in (tmp_path / "one" / "README.md").read_text()


# --- LARV ---


def layered(root: Path, layers: int = 4) -> list[Path]:
    """A base of so many layers and two experts, one of which left the second layer alone."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"h.{i}.{name}": shape for i in range(layers) for name, shape in
              (("attn.weight", (8, 8)), ("mlp.weight", (12, 8)), ("mlp.bias", (12,)))}  # fmt: skip
    shapes["embed.weight"] = (10, 8)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    paths = [write(root / "base", base)]
    for i in range(2):
        state = {}
        for name, tensor in base.items():
            rank = 1 + (hash_of(name) + i) % 4
            tau = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 2:
                left = torch.randn(len(tensor), rank, generator=generator)
                tau = left @ torch.randn(rank, tensor.shape[1], generator=generator)
            state[name] = tensor.clone() if i and name.startswith("h.1.") else tensor + 1e-2 * tau
        paths.append(write(root / f"expert_{i}", state))
    return paths


def hash_of(name: str) -> int:
    return sum(map(ord, name))
