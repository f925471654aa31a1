"""Merges written as PEFT adapters: loaded, run and merged by peft itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.cli import main
from modelmerge.errors import CheckpointError, OutputError, UsageError
from tests.support.cards import loaded_by_card
from tests.support.checkpoints import State, read
from tests.support.lora import TOLERANCE, adapter_of, base_of, distance, load, merged_by_peft

PROMPT = torch.tensor([[1, 5, 9, 17]])


def tuned(base: Path, directory: Path, seed: int, keep: tuple[str, ...] = (), scale: float = 1e-2) -> Path:
    """A full expert: every floating tensor has moved, but for those whose names hold a word to `keep`."""
    torch.manual_seed(seed)
    state = load_file(base / "model.safetensors")
    moved = {
        k: v + scale * torch.randn_like(v)
        if v.is_floating_point() and not k.endswith(("running_mean", "running_var")) and not any(w in k for w in keep)
        else v
        for k, v in state.items()
    }
    directory.mkdir(parents=True)
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((base / "config.json").read_bytes())
    return directory


def both_ways(base: Path, experts: list[Path], root: Path, size: float, **options: Any) -> tuple[State, State, Any]:
    """The merged checkpoint, what peft makes of the merged adapter, and the adapter's manifest."""
    return whole(base, experts, root, **options), *through_peft(base, experts, root, size, **options)


def whole(base: Path, experts: list[Path], root: Path, **options: Any) -> State:
    """The merged checkpoint."""
    told: dict[str, Any] = {"method": "task-arithmetic", "scale": 0.5} | options
    modelmerge.merge(base, experts, root / "full", **told)
    return read(root / "full")


def through_peft(base: Path, experts: list[Path], root: Path, size: float, **options: Any) -> tuple[State, Any]:
    """What peft makes of the merged adapter, and the adapter's manifest."""
    told: dict[str, Any] = {"method": "task-arithmetic", "scale": 0.5} | options
    manifest = modelmerge.merge(base, experts, root / "small", as_lora=size, **told)
    return merged_by_peft(base, root / "small", root / "peft"), manifest


def relative(base: State, full: State, small: State) -> float:
    lost = sum(
        float((full[k].double() - small[k].double()).square().sum()) for k in base if base[k].is_floating_point()
    )
    size = sum(float((full[k].double() - base[k].double()).square().sum()) for k in base if base[k].is_floating_point())
    return (lost / size) ** 0.5


def test_adapters_in_an_adapter_out_with_nothing_lost(tmp_path: Path) -> None:
    import peft

    base = base_of("llama", tmp_path / "base")
    experts = [adapter_of(base, tmp_path / f"e{i}", i, target_modules=["q_proj", "down_proj"]) for i in range(3)]
    full, small, manifest = both_ways(base, experts, tmp_path, 6)
    assert distance(full, read(base), full) > 1e-2
    assert distance(full, small, full) < TOLERANCE
    assert manifest["adapter"]["relative_error"] < 1e-6
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_bytes())
    assert config["r"] == config["lora_alpha"] == 6
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(base.resolve())
    assert config["rank_pattern"] == {}
    assert {file.name for file in (tmp_path / "small").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "modelmerge.json",
    }  # fmt: skip
    # Not merged either: the adapter as it runs gives the merged model's logits.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = peft.PeftModel.from_pretrained(load(base), tmp_path / "small")(PROMPT).logits
        want = load(tmp_path / "full")(PROMPT).logits
        as_told = loaded_by_card(tmp_path / "small")["model"](PROMPT).logits
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(as_told, got)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "ties": ("llama", {"method": "ties", "scale": 0.7}),
    "apgd": ("llama", {"method": "apgd", "scale": 0.35}),
    "apgd, the rest averaged": ("llama", {"method": "apgd", "scale": 0.35, "rest": "average"}),
    "disentangled": ("llama", {"disentangle": "awd"}),
    "corrected": ("llama", {"disentangle": "apgd"}),
    "gpt2": ("gpt2", {"exclude": ["transformer.wte.weight"]}),
    "bert": ("bert", {}),
    "t5": ("t5", {"exclude": ["shared.weight"]}),
    "convolutions": ("resnet", {}),
    "clip": ("clip", {"exclude": ["logit_scale", "*class_embedding"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_makes_of_it_what_is_said_of_it(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    base = base_of(kind, tmp_path / "base")
    experts = [tuned(base, tmp_path / f"e{i}", i) for i in range(2)]
    full = whole(base, experts, tmp_path, **options)
    for size in (2, 0.8):
        small, manifest = through_peft(base, experts, tmp_path / str(size), size, **options)
        check(read(base), full, small, manifest["adapter"], size)
        model = loaded_by_card(tmp_path / str(size) / "small")["model"]
        assert type(model.get_base_model()) is type(load(base))
        # And it is an expert like any other.
        adapter, again = tmp_path / str(size) / "small", tmp_path / str(size) / "again"
        modelmerge.merge(base, [adapter], again, method="task-arithmetic", scale=1.0)
        assert distance(read(again), small, read(base)) < TOLERANCE


def check(origin: State, full: State, small: State, told: dict[str, Any], size: float) -> None:
    """The errors that are told are there, and are the least of their rank."""
    assert told["relative_error"] == pytest.approx(relative(origin, full, small), rel=1e-3)
    assert 0 < told["relative_error"] < 1
    for name, value in full.items():
        entry = told["tensors"].get(name)
        if entry is None:
            assert torch.equal(small[name], value), name  # kept whole, or not changed
            continue
        tau = (value - origin[name]).double()
        values = torch.linalg.svdvals(tau)
        best = float((values[entry["rank"] :].square().sum() / values.square().sum()).sqrt())
        error = float((small[name].double() - value.double()).norm() / tau.norm())
        assert error == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert entry["relative_error"] == pytest.approx(best, rel=1e-3, abs=1e-5)
        if size < 1:
            assert best**2 <= 0.2 + 1e-6
            assert entry["rank"] == 1 or values[: entry["rank"] - 1].square().sum() < 0.8 * values.square().sum()
        else:
            assert entry["rank"] == min(size, *tau.shape)


@pytest.mark.parametrize(
    ("kind", "kept", "tensor"),
    [
        ("llama-tied", (), "model.embed_tokens.weight"),
        ("gpt2", (), "transformer.wte.weight"),
        ("t5", (), "shared.weight"),
        ("clip", ("class_embedding",), "logit_scale"),
        ("clip", ("logit_scale",), "vision_model.embeddings.class_embedding"),
    ],
)
def test_what_has_no_place_is_refused_if_it_changed(
    kind: str, kept: tuple[str, ...], tensor: str, tmp_path: Path
) -> None:
    base = base_of(kind, tmp_path / "base")
    experts = [tuned(base, tmp_path / "e0", 0, kept), tuned(base, tmp_path / "e1", 1, kept)]
    with pytest.raises(OutputError, match=f"changes '{tensor}', which a PEFT adapter has no place for"):
        modelmerge.merge(base, experts, tmp_path / "out", method="average", as_lora=2)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    fine = [tuned(base, tmp_path / f"f{i}", i, (*kept, tensor)) for i in range(2)]
    modelmerge.merge(base, fine, tmp_path / "out", method="average", as_lora=2)


def test_tied_weights_that_the_base_stores_twice_are_refused_too(tmp_path: Path) -> None:
    base = base_of("llama-tied", tmp_path / "base")
    state = load_file(base / "model.safetensors")
    save_file(
        state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()},
        base / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    expert = tuned(base, tmp_path / "e", 0, keep=("embed_tokens",))
    with pytest.raises(OutputError, match=r"changes 'lm_head\.weight', which a PEFT adapter has no place for"):
        modelmerge.merge(base, [expert], tmp_path / "out", method="average", as_lora=2)


def test_no_linear_layer_changed(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    expert = tuned(base, tmp_path / "e", 0, keep=("proj", "lm_head"))
    with pytest.raises(OutputError, match="nothing to write as a LoRA"):
        modelmerge.merge(base, [expert], tmp_path / "out", method="average", as_lora=2)


def test_a_bias_may_change_without_its_weight(tmp_path: Path) -> None:
    base = base_of("bert", tmp_path / "base")
    expert = tuned(base, tmp_path / "e", 0, keep=("query.weight", "LayerNorm"))
    full, small, _ = both_ways(base, [expert], tmp_path, 0.999999)
    assert distance(full, small, full) < 1e-4
    assert torch.equal(*(state["bert.encoder.layer.0.attention.self.query.bias"] for state in (full, small)))


def test_a_norm_at_the_top_brings_its_namesakes(tmp_path: Path) -> None:
    """peft saves all modules whose names end as one in its list does."""
    base = base_of("llama", tmp_path / "base")
    load(base).model.save_pretrained(tmp_path / "inner")
    inner = tmp_path / "inner"
    assert "norm.weight" in read(inner)
    expert = tuned(inner, tmp_path / "e", 0, keep=("layernorm",))
    full, small, manifest = both_ways(inner, [expert], tmp_path, 16)
    assert "layers.1.input_layernorm" in manifest["adapter"]["modules_to_save"]
    assert distance(full, small, full) < TOLERANCE


def test_dtypes(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    experts = [tuned(base, tmp_path / f"e{i}", i) for i in range(2)]
    told: dict[str, Any] = {"method": "average", "as_lora": 16}
    wide = modelmerge.merge(base, experts, tmp_path / "wide", **told)["adapter"]
    narrow = modelmerge.merge(base, experts, tmp_path / "narrow", dtype="bfloat16", **told)["adapter"]
    assert {t.dtype for t in read(tmp_path / "wide").values()} == {torch.float32}
    assert {t.dtype for t in read(tmp_path / "narrow").values()} == {torch.bfloat16}
    assert wide["relative_error"] < 1e-6
    assert 1e-4 < narrow["relative_error"] < 1e-2  # rounding is part of what is said


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of("llama", tmp_path / "base")
    experts = [str(adapter_of(base, tmp_path / f"e{i}", i, target_modules=["q_proj"])) for i in range(2)]
    words = ["merge", "task-arithmetic", str(base), *experts, "-o", str(tmp_path / "out"), "--as-lora"]
    assert main([*words, "3", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    actions = {tensor["name"]: tensor["action"] for tensor in plan["tensors"]}
    assert plan["shards"] == ["adapter_model.safetensors"]
    assert actions["model.layers.0.self_attn.q_proj.weight"] == "low rank"
    assert actions["model.norm.weight"] == "keep if changed"
    assert main([*words, "3"]) == 0
    said = capsys.readouterr().err
    assert "Written as a PEFT adapter of rank 3: its relative error is" in said
    manifest = json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())
    assert manifest["recipe"]["as_lora"] == 3
    assert "--as-lora 3" in manifest["command"]
    assert f"{manifest['adapter']['relative_error']:.2%}" in (tmp_path / "out" / "README.md").read_text()
    assert plan["bytes"]["write"] >= (tmp_path / "out" / "adapter_model.safetensors").stat().st_size - 4096
    assert main(["merge", "--recipe", str(tmp_path / "out"), "-o", str(tmp_path / "again"), "-q"]) == 0
    same = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("out", "again")]
    assert same[0] == same[1]
    for size, message in (("0", "must be a rank"), ("1.5", "must be a rank"), ("x", "must be a rank")):
        assert main([*words, size, "--force"]) == 2
        assert message in capsys.readouterr().err


def wide(root: Path) -> tuple[Path, list[Path]]:
    """A base of one weight, and three adapters of rank 4 of it: twelve directions of eighty."""
    generator = torch.Generator().manual_seed(0)
    (root / "base").mkdir()
    weight = torch.randn(96, 80, generator=generator)
    save_file({"layers.0.q_proj.weight": weight}, root / "base" / "model.safetensors")
    experts = []
    for i in range(3):
        a, b = torch.randn(4, 80, generator=generator), torch.randn(96, 4, generator=generator)
        key = "base_model.model.layers.0.q_proj.lora_"
        (expert := root / f"e{i}").mkdir()
        save_file({f"{key}A.weight": 0.1 * a, f"{key}B.weight": 0.1 * b}, expert / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
        (expert / "adapter_config.json").write_text(json.dumps(config))
        experts.append(expert)
    return root / "base", experts


@pytest.mark.parametrize("size", [5, 20, 0.9])
# The sum and `kron` stay in what the factors span, and a small matrix is decomposed; TIES does not.
@pytest.mark.parametrize("method", ["task-arithmetic", "kron", "ties"])
def test_the_factors_are_the_best_of_their_rank(method: str, size: float, tmp_path: Path) -> None:
    base, experts = wide(tmp_path)
    told: dict[str, Any] = {"method": method, "scale": 0.5}
    modelmerge.merge(base, experts, tmp_path / "full", dtype="float64", **told)
    modelmerge.merge(base, experts, tmp_path / "small", as_lora=size, **told)
    delta = next(iter(read(tmp_path / "full").values())) - next(iter(read(base).values())).double()
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    shares = s.square().cumsum(0) / s.square().sum()
    rank = int(size) if size >= 1 else int((shares >= size).nonzero()[0]) + 1
    factors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    a, b = (next(value for key, value in factors.items() if f"lora_{part}" in key) for part in "AB")
    assert a.shape == (rank, 80)
    assert b.shape == (96, rank)
    want = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert torch.linalg.norm(b.double() @ a.double() - want) < 1e-5 * torch.linalg.norm(want)


def test_a_factor_that_is_not_finite_is_named(tmp_path: Path) -> None:
    base, experts = wide(tmp_path)
    file = experts[1] / "adapter_model.safetensors"
    factors = load_file(file)
    next(iter(factors.values()))[0, 0] = torch.nan
    save_file(factors, file)
    with pytest.raises(CheckpointError, match=r"e1/adapter_model\.safetensors: tensor '.*lora_.*' of 'e1' holds NaN"):
        modelmerge.merge(base, experts, tmp_path / "out", method="average", as_lora=4)
    assert not (tmp_path / "out").exists()


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    with pytest.raises(UsageError, match="no effect with as_lora"):
        modelmerge.merge(base, [base], tmp_path / "out", method="average", as_lora=2, max_shard_size="1MB")
