"""eval weights: the papers' statistics, streamed, against whole tensors and full SVDs in float64."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import modelmerge
from modelmerge import evaluation
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.engine import job
from modelmerge.errors import CheckpointError, PlanError, UsageError
from modelmerge.evaluation import interference as conflicts
from modelmerge.evaluation.conclusions import conclusion
from modelmerge.methods import leading, linalg
from modelmerge.verbs.evaluate import evaluate
from tests.support.checkpoints import base_state, family, read, write
from tests.support.commands import import_no_torch, run
from tests.support.hub_server import FakeHub
from tests.support.lora import adapter_of, base_of

evaluate_weights = partial(evaluate, suite="weights")
MATRICES = ("model.layers.0.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight")


@pytest.fixture
def merged(models: list[Path], tmp_path: Path) -> Path:
    """A merge by TIES of the three experts."""
    modelmerge.merge(models[0], models[1:], tmp_path / "ties", method="ties")
    return tmp_path / "ties"


def vectors(paths: list[Path], tensor: str) -> Tensor:
    """The task vectors of all but the first model, float64."""
    base, *others = (read(path)[tensor].double() for path in paths)
    return torch.stack([other - base for other in others])


def close(value: float | None, wanted: float, tolerance: float = 1e-6) -> None:
    assert value == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("decompose", [True, False])
def test_figures_are_those_of_whole_tensors(
    decompose: bool, models: list[Path], merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 64)  # so that tensors are cut
    report = evaluate_weights([merged], per_layer=True, decompose=decompose)
    names = [name for name, tensor in read(models[0]).items() if tensor.is_floating_point() and tensor.numel()]
    assert set(report["tensors"]) == set(names)
    all_of_it = torch.cat([vectors([*models, merged], name).view(4, -1) for name in names], dim=1)
    for told, taus in [
        (report["model"], all_of_it),
        *((report["tensors"][name], vectors([*models, merged], name).view(4, -1)) for name in names),
    ]:
        experts, model = taus[:3], taus[3]
        own, theirs = told["experts"], told["models"]["ties"]
        close(theirs["norm"], float(model.norm()))
        up, down = (experts > 0).sum(0), (experts < 0).sum(0)
        close(own["sign_conflict"], float(((up > 0) & (down > 0)).sum() / ((up + down) > 0).sum()))
        close(own["minority_sign_share"], float(torch.minimum(up, down).sum() / (up + down).sum()))
        for i in range(3):
            expert = f"expert_{i}"
            close(own["norms"][expert], float(experts[i].norm()))
            for j in range(3):
                cosine = torch.cosine_similarity(experts[i], experts[j], dim=0)
                close(own["cosines"][i][j], float(cosine), 1e-5)
            seen = theirs["experts"][expert]
            if model.any():
                close(seen["cosine"], float(torch.cosine_similarity(model, experts[i], dim=0)), 1e-5)
            close(seen["distance"], float((model - experts[i]).norm()))
            close(seen["relative_distance"], float((model - experts[i]).norm() / experts[i].norm()))


def test_statistics_of_matrices_are_those_of_full_svds(models: list[Path], merged: Path) -> None:
    report = evaluate_weights([merged], per_layer=True)
    for name in MATRICES:
        taus = vectors([*models, merged], name)
        experts, model = taus[:3], taus[3]
        told = report["tensors"][name]
        u, s, _ = torch.linalg.svd(model, full_matrices=False)
        rank = next(k for k in range(1, 17) if s[k:].norm() <= 0.05 * s.norm())
        ratios = [float((u[:, :rank].T @ tau).norm() / tau.norm()) for tau in experts]
        for i, ratio in enumerate(ratios):
            close(told["models"]["ties"]["experts"][f"expert_{i}"]["subspace_alignment"], ratio, 1e-5)
        parts = [torch.linalg.svd(tau, full_matrices=False) for tau in experts]
        k = min(model.shape) // 3
        left, values, right = (
            torch.cat([p[0][:, :k] for p in parts], dim=1),
            torch.cat([p[1][:k] for p in parts]),
            torch.cat([p[2][:k] for p in parts]),
        )
        identity = torch.eye(len(values), dtype=torch.float64)
        crossing = (left.T @ left - identity) @ values.diag() @ (right @ right.T - identity)
        close(told["experts"]["singular_task_interference"]["mean"], float(crossing.abs().sum()), 1e-5)
        close(
            told["experts"]["singular_task_interference"]["relative"], float(crossing.abs().sum() / values.sum()), 1e-5
        )

        def gap(w: Tensor, taus: Tensor = experts) -> float:
            return float(sum(((t * (w - t)).sum(1) ** 2).sum() for t in taus))

        close(told["models"]["ties"]["apgd_gap"], gap(model) / gap(torch.zeros_like(model)), 1e-5)
    mean = sum(report["tensors"][n]["experts"]["singular_task_interference"]["mean"] for n in MATRICES) / 3
    close(report["model"]["experts"]["singular_task_interference"]["mean"], mean)
    assert report["model"]["matrices"] == 3


def test_apgd_ends_where_its_gap_is_said_to(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "apgd", method="apgd")
    told = evaluate_weights([tmp_path / "apgd"])["model"]
    assert told["experts"]["apgd_gap"]["solved"] < told["experts"]["apgd_gap"]["start"] < 1.0
    close(told["models"]["apgd"]["apgd_gap"], told["experts"]["apgd_gap"]["solved"], 1e-4)


def test_orthogonality_is_what_disentangling_reports(models: list[Path], merged: Path, tmp_path: Path) -> None:
    report = modelmerge.disentangle(models[0], models[1:], tmp_path / "vectors", method="awd")
    told = evaluate_weights([merged], per_layer=True)["tensors"]
    for name in MATRICES:
        for when in ("before", "after"):
            close(told[name]["experts"]["awd_orthogonality"][when], report["tensors"][name][when]["mean_cosine"])
    assert told["model.embed_tokens.weight"]["experts"]["awd_orthogonality"] is None


def test_interference_is_nothing_where_all_is_orthogonal_and_all_where_nothing_is() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    apart = torch.stack([u[:, 6 * i : 6 * i + 6] @ v[6 * i : 6 * i + 6] for i in range(2)]).float()
    assert conflicts.singular_interference(apart, [None] * len(apart))[1] < 1e-5
    same = 3.0 * (u[:, :1] @ v[:1])[None].expand(2, -1, -1).float()
    interference, relative = conflicts.singular_interference(same, [None] * len(same))
    close(interference, 6.0, 1e-5)
    close(relative, 1.0, 1e-5)
    assert conflicts.subspace_alignment(apart, apart[0]).tolist() == pytest.approx([1.0, 0.0], abs=1e-5)


def test_large_matrices_are_iterated_on_and_say_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, 520)[:, None]
    shapes = [(520, 520), (520, 600)]
    pairs = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    taus = [left @ (decay * right) for left, right in pairs]
    rank = 520 // 8
    assert leading.iterates(taus[0].shape, rank)
    for tau in (taus[0], taus[1].T):
        left, values, right = linalg.quick_triplets(tau, rank)
        exact = torch.linalg.svdvals(tau.double())[:rank]
        assert torch.allclose(values, exact, rtol=2e-2)
        assert float((left.T @ left - torch.eye(rank)).abs().max()) < 1e-5
        close(
            float(((left * values) @ right - tau).norm()),
            float((tau.double().square().sum() - exact.square().sum()).sqrt()),
            1e-3,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_expected_rounding_is_near_the_measured_one(dtype: str, tmp_path: Path) -> None:
    models = family(tmp_path / "models", dtype=getattr(torch, dtype))
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="task-arithmetic")
    report = evaluate_weights([tmp_path / "out"])
    measured = manifest["rounding"]["relative_error"]
    assert report["models"][0]["measured_rounding"] == measured
    assert report["model"]["models"]["out"]["expected_rounding"] == pytest.approx(measured, rel=0.1)


def test_zero_is_on_the_finest_grid() -> None:
    assert conflicts.expected_rounding(torch.zeros(4), torch.bfloat16) < 1e-70
    assert conflicts.expected_rounding(torch.full((12,), 1.5), torch.bfloat16) == 2.0**-14


def test_an_expert_and_the_base_can_be_looked_at_too(models: list[Path]) -> None:
    report = evaluate_weights(
        [models[1], f"start={models[0]}"], base=models[0], experts={"expert_0": models[1], "other": models[2]}
    )
    json.dumps(report, allow_nan=False)
    expert, start = report["model"]["models"]["expert_0"], report["model"]["models"]["start"]
    close(expert["experts"]["expert_0"]["cosine"], 1.0)
    close(expert["experts"]["expert_0"]["distance"], 0.0)
    close(expert["experts"]["expert_0"]["subspace_alignment"], 1.0, 1e-2)
    assert (start["norm"], start["apgd_gap"]) == (0.0, 1.0)
    assert start["experts"]["other"]["cosine"] is None
    assert start["experts"]["other"]["subspace_alignment"] is None
    assert [entry["name"] for entry in report["models"]] == ["expert_0", "start"]


def test_an_expert_that_changed_nothing_makes_no_nan(models: list[Path], tmp_path: Path) -> None:
    idle = write(tmp_path / "idle", read(models[0]))
    report = evaluate_weights([idle], base=models[0], experts={"one": models[0], "two": idle}, per_layer=True)
    json.dumps(report, allow_nan=False)
    assert report["model"]["experts"]["sign_conflict"] is None
    report = evaluate_weights([models[1]], base=models[0], experts={"one": models[1], "two": idle}, per_layer=True)
    json.dumps(report, allow_nan=False)
    assert report["model"]["experts"]["awd_orthogonality"] is None


def test_each_tensor_is_read_once(models: list[Path], merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes: dict[tuple[str, str], int] = {}
    before = Checkpoint.read_into

    def counted(self: Checkpoint, tensor: Any, offset: int, buffer: memoryview, **other: Any) -> None:
        key = (self.name, tensor.name)
        read_bytes[key] = read_bytes.get(key, 0) + len(buffer)
        before(self, tensor, offset, buffer, **other)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    evaluate_weights([merged], per_layer=True)
    sizes = {name: tensor.nbytes for name, tensor in read(models[0]).items() if tensor.is_floating_point()}
    expected = {(model, name): size for model in ("base", "expert_0", "expert_1", "expert_2", "ties")
                for name, size in sizes.items() if size}  # fmt: skip
    assert read_bytes == expected


def test_models_of_every_kind(models: list[Path], merged: Path, tmp_path: Path, hub: FakeHub) -> None:
    linear = {"method": "ties", "include": ["*proj.weight"]}
    modelmerge.merge(models[0], models[1:], tmp_path / "whole", **linear)
    modelmerge.merge(models[0], models[1:], tmp_path / "adapter", as_lora=16, **linear)
    hub.add("org/merged", {file.name: file.read_bytes() for file in merged.iterdir()})
    report = evaluate_weights(
        [merged, tmp_path / "whole", tmp_path / "adapter", f"file={merged / 'model.safetensors'}", "hubbed=org/merged"],
        base=models[0], experts=[str(model) for model in models[1:]],
        per_layer=True,
    )  # fmt: skip
    told = report["model"]["models"]
    assert told["file"] == told["hubbed"] == told["ties"]
    for layer in (report["tensors"][name]["models"] for name in MATRICES):
        for name in ("expert_0", "expert_1"):
            close(layer["adapter"]["experts"][name]["cosine"], layer["whole"]["experts"][name]["cosine"], 1e-4)
    assert report["models"][3]["files"][str(merged / "model.safetensors")]["sha256"]


def test_adapters_are_measured_by_their_factors(tmp_path: Path) -> None:
    """As what they become in a checkpoint is, and without a decomposition of a whole matrix."""
    base = base_of("llama", tmp_path / "base")
    adapters = [adapter_of(base, tmp_path / f"e{i}", i, target_modules=["q_proj", "down_proj"]) for i in range(3)]
    for i, each in enumerate(adapters):
        modelmerge.merge(base, [each], tmp_path / "whole" / f"e{i}", method="average", dtype="float64")
    modelmerge.merge(base, adapters, tmp_path / "sum", method="task-arithmetic", as_lora=6)
    told = []
    for experts in (adapters, [tmp_path / "whole" / each.name for each in adapters]):
        report = evaluate_weights([tmp_path / "sum"], base=base, experts=[str(each) for each in experts])
        told.append({key: report["model"][key] for key in ("experts", "models")})
    compare(*told)


def compare(one: Any, other: Any) -> None:
    """Whether two reports have the same figures."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = [*one.values()], [other[key] for key in one]
    if isinstance(one, list):
        for mine, theirs in zip(one, other, strict=True):
            compare(mine, theirs)
    else:
        assert one == (other if other is None else pytest.approx(other, rel=1e-3, abs=1e-5))


def test_the_command_in_every_format(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "eval", "weights", merged)
    assert (code, err) == (0, "")
    assert "they do not predict accuracy" in out
    assert "model.layers.*.q_proj.weight" in out
    assert "model.layers.0.q_proj.weight" not in out
    assert "ties, by layer" not in out
    assert "\nsign conflict: of the entries that experts change" in out, "columns are explained"
    assert "random changes of all entries have 75 %" in out
    assert "\ncosine: with the expert's task vector" in out
    assert "--per-layer has each layer" in out.splitlines()[-1]
    layered = run(capsys, "eval", "weights", merged, "--per-layer")[1]
    assert "model.layers.0.q_proj.weight" in layered
    assert "ties, by layer" in layered
    assert "--per-layer" not in layered
    bare = run(capsys, "eval", "weights", merged, "--no-decompose")[1]
    assert "interference" not in bare, "what was not measured has no column"
    assert "alignment" not in bare
    code, out, _ = run(capsys, "eval", "weights", merged, "--json")
    told = json.loads(out)
    assert (code, told["suite"]) == (0, "weights")
    code, out, err = run(capsys, "eval", "weights", merged, f"again={merged}", "-q", "--no-decompose")
    assert (code, err) == (0, "")
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[:2] for line in lines] == [[m, f"expert_{i}"] for m in ("ties", "again") for i in range(3)]
    close(float(lines[0][2]), told["model"]["models"]["ties"]["experts"]["expert_0"]["cosine"], 1e-5)


def test_without_a_suite_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for name in evaluation.names():
        assert name in run(capsys, "eval")[1]
        code, out, _ = run(capsys, "eval", name, "--help")
        assert (code, "Examples" in out) == (0, True)
    assert run(capsys, "eval", "-q")[1].split() == list(evaluation.names())
    assert json.loads(run(capsys, "eval", "--json")[1])["suites"][0]["summary"]
    assert run(capsys, "eval", "wieghts", "x")[0] == 2


def test_listing_and_help_import_no_torch() -> None:
    lines = (["eval"], ["eval", "--help"], *(["eval", name, "--help"] for name in evaluation.names()))
    import_no_torch(*lines)


def test_what_cannot_be_known_is_asked_for(models: list[Path], merged: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"base and experts must be named: beside 'expert_0'"):
        evaluate_weights([models[1]])
    with pytest.raises(UsageError, match=r"^experts must be named"):
        evaluate_weights([models[1]], base=models[0])
    modelmerge.merge(models[0], models[1:3], tmp_path / "two", method="ties")
    with pytest.raises(UsageError, match="merges of different experts"):
        evaluate_weights([merged, tmp_path / "two"])
    with pytest.raises(UsageError, match="two models are called 'ties'"):
        evaluate_weights([merged, merged])
    evaluate_weights([merged, models[1]])  # the merge knows where both came from


def test_models_that_do_not_fit_or_hold_nan_are_refused(models: list[Path], merged: Path, tmp_path: Path) -> None:
    state = read(merged)
    state["model.layers.0.q_proj.weight"] = torch.zeros(8, 16)
    odd = write(tmp_path / "odd", state)
    with pytest.raises(PlanError, match=r"q_proj.weight': shape \[16, 16\] in the base, but \[8, 16\] in odd"):
        evaluate_weights([merged, odd])
    report = evaluate_weights([merged, odd], on_mismatch="copy", per_layer=True)
    assert "model.layers.0.q_proj.weight" in report["left_out"]
    state = read(merged)
    state["logit_scale"] = torch.tensor(float("nan"))
    with pytest.raises(CheckpointError, match="'logit_scale' of 'bad' holds NaN"):
        evaluate_weights([merged, write(tmp_path / "bad", state)])


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        state = {name: t + 0.01 * i * torch.randn(t.shape, generator=torch.Generator().manual_seed(i))
                 for name, t in base_state().items() if name == "model.embed_tokens.weight"}  # fmt: skip
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
        (directory / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
        paths.append(directory)
    report = evaluate_weights([f"m={paths[1]}"], base=paths[0], experts={"a": paths[1], "b": paths[2]}, per_layer=True)
    assert list(report["tensors"]) == ["model.embed_tokens.weight"]


def weights_report(conflicts: dict[str, float], cosines: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    """As much of a report as its conclusion rests on; the first conflict is the whole model's."""
    names = list(next(iter(cosines.values())))
    layers = {
        name: {"entries": 100, "experts": {"sign_conflict": share, "norms": dict.fromkeys(names, 1.0)}}
        for name, share in conflicts.items()
    }
    whole, *_ = layers.values()
    whole["models"] = {m: {"experts": {name: {"cosine": v} for name, v in row.items()}} for m, row in cosines.items()}
    return {"suite": "weights", "model": whole, "layer_types": {k: v for k, v in layers.items() if k != "whole"}}


def test_the_conclusion_names_where_the_conflicts_lie_and_who_lost_most() -> None:
    report = weights_report(
        {"whole": 0.4, "mlp": 0.55, "attention": 0.3},
        {"ties": {"math": 0.4, "code": 0.6}, "kron": {"math": 0.7, "code": 0.71}},
    )
    assert conclusion(report) == [
        "The experts conflict most in mlp: 55 % of the entries that experts change have changes of both signs, and "
        "40 % in the whole model.",
        "math lost most in ties: its cosine is 0.400, and code, which kept most, has 0.600.",
        "kron kept all experts alike: cosines from 0.700 to 0.710.",
        "kron kept most of all experts: its mean cosine is 0.705 (ties 0.500).",
    ]
    even = weights_report({"whole": 0.4, "mlp": 0.41}, {"ties": {"math": 0.4, "code": None}})
    assert conclusion(even) == [
        "The experts conflict alike in all kinds of layers: 40 % of the entries that experts change have changes of "
        "both signs.",
        "The cosine of ties and math is 0.400.",
    ]
    assert conclusion(weights_report({"whole": 0.0}, {"copy": {"math": None}})) == []
