"""What storing in 16 bits loses of a merge is measured and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.checkpoint import staging
from modelmerge.cli import main
from modelmerge.engine import job
from modelmerge.errors import OutputError
from tests.support.checkpoints import State, base_state, expert_state, family, read, write


def in_memory(base: State, experts: list[State], stored: State) -> float:
    """The relative error of `stored`, an average merge, in float64 from beginning to end."""
    lost = merged = 0.0
    for name, theta in base.items():
        if theta.is_floating_point() and theta.numel():
            delta = torch.stack([expert[name].double() - theta.double() for expert in experts]).mean(0)
            merged += float(delta.square().sum())
            lost += float((stored[name].double() - (theta.double() + delta)).square().sum())
    return (lost / merged) ** 0.5


@pytest.mark.parametrize(
    ("dtype", "stored_as"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, "bfloat16"), (torch.float64, "float16")],
    ids=str,
)
def test_the_error_is_that_of_float64(
    dtype: torch.dtype, stored_as: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    base, *experts = family(tmp_path, dtype=dtype)
    manifest = modelmerge.merge(base, experts, tmp_path / "out", method="average", dtype=stored_as)
    want = in_memory(read(base), [read(e) for e in experts], read(tmp_path / "out"))
    assert want > 1e-3
    assert manifest["rounding"]["relative_error"] == pytest.approx(want, rel=1e-4)
    assert manifest["rounding"]["stored_as"] == (stored_as or str(dtype).removeprefix("torch."))
    assert manifest["rounding"]["tensors_measured"] == 7


def test_a_matrix_method_is_measured_with_what_the_rest_gets(tmp_path: Path) -> None:
    base, *experts = family(tmp_path, dtype=torch.bfloat16)
    told = {"method": "apgd", "published": True, "steps": 3, "rest": "average"}
    whole = modelmerge.merge(base, experts, tmp_path / "wide", dtype="float32", **told)
    assert whole["rounding"] is None
    manifest = modelmerge.merge(base, experts, tmp_path / "out", **told)
    origin, wide, stored = read(base), read(tmp_path / "wide"), read(tmp_path / "out")
    kept = [name for name, tensor in origin.items() if tensor.is_floating_point()]
    lost = sum(float((stored[n].double() - wide[n].double()).square().sum()) for n in kept)
    merged = sum(float((wide[n].double() - origin[n].double()).square().sum()) for n in kept)
    assert manifest["rounding"]["relative_error"] == pytest.approx((lost / merged) ** 0.5, rel=1e-3)


def test_where_one_tensor_is_narrow_the_others_count_without_loss(tmp_path: Path) -> None:
    base = base_state()
    base["model.layers.0.norm.weight"] = base["model.layers.0.norm.weight"].bfloat16()
    expert = expert_state(base_state(), 0)
    paths = [write(tmp_path / "base", base), write(tmp_path / "e", expert)]
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average")
    want = in_memory(base, [expert], read(tmp_path / "out"))
    assert manifest["rounding"]["relative_error"] == pytest.approx(want, rel=1e-3)
    assert want < 0.05


def test_the_figure_does_not_depend_on_workers_or_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    base, *experts = family(tmp_path, dtype=torch.bfloat16)
    figures = set()
    for workers, size in ((1, "5GB"), (3, "5GB"), (2, "1KB")):
        before = torch.get_num_threads()
        torch.set_num_threads(workers)
        try:
            out = tmp_path / f"{workers}"
            figures.add(
                modelmerge.merge(base, experts, out, method="ties", max_shard_size=size)["rounding"]["relative_error"]
            )
        finally:
            torch.set_num_threads(before)
    assert len(figures) == 1


@pytest.mark.parametrize(("scale", "warned"), [(1e-1, False), (1e-3, True)])
def test_more_than_a_twentieth_is_warned_of(
    scale: float, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: tensor for name, tensor in base_state(torch.bfloat16).items() if tensor.is_floating_point()}
    base, expert = write(tmp_path / "base", state), write(tmp_path / "e", expert_state(state, 0, scale=scale))
    words = ["merge", "task-arithmetic", str(base), str(expert), "--scale", "0.9", "-o"]
    assert main([*words, str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    manifest = json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())
    lost = manifest["rounding"]["relative_error"]
    assert f"rounding to bfloat16 changes the merged task vector by {lost:.2%}" in out
    assert (lost > 0.05) == warned
    assert ("the dtype float32 keeps it" in err) == warned
    assert ("the dtype float32 keeps it" in (tmp_path / "out" / "README.md").read_text()) == warned
    assert main([*words, str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert "rounding" not in out + err


def test_nothing_is_told_where_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base", base_state(torch.bfloat16))
    expert = write(tmp_path / "e", base_state(torch.bfloat16))
    assert main(["merge", "average", str(base), str(expert), "-o", str(tmp_path / "out")]) == 0
    assert "rounding" not in "".join(capsys.readouterr())
    manifest = json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())
    assert manifest["rounding"]["relative_error"] is None


def test_a_resumed_run_says_how_many_tensors_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *experts = family(tmp_path, dtype=torch.bfloat16)
    merge: dict[str, Any] = {"method": "average", "max_shard_size": "1KB", "resume": True}
    with monkeypatch.context() as broken:
        broken.setattr(staging.Staging, "publish", lambda *args: (_ for _ in ()).throw(OutputError("pulled the plug")))
        with pytest.raises(OutputError):
            modelmerge.merge(base, experts, tmp_path / "out", **merge)
    manifest = modelmerge.merge(base, experts, tmp_path / "out", **merge)
    assert manifest["rounding"] == {"stored_as": "bfloat16", "relative_error": None, "tensors_measured": 0}
