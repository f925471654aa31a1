"""extract and disentangle through files, and merges of what they wrote."""

from __future__ import annotations

import dataclasses
import errno
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.checkpoint.scratch import Scratch
from modelmerge.checkpoint.staging import Staging
from modelmerge.cli import main
from modelmerge.engine import job
from modelmerge.errors import CheckpointError, OutputError, PlanError, ReferenceNotFound, UsageError
from modelmerge.methods import registry
from modelmerge.methods.words import parse_transform
from tests.support.checkpoints import State, base_state, expert_state, family, read, same_bits, write
from tests.support.methods import constant_scale, takes, typed

LINEAR = {
    "model.layers.0.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight",
}  # fmt: skip


def vector_paths(out: Path, models: list[Path]) -> list[Path]:
    return [out / path.name for path in models[1:]]


def restored(base: State, vector: State, dtypes: State) -> State:
    """Base plus task vector, in the expert's dtypes."""
    return {k: (v.float() + vector[k]).to(dtypes[k].dtype) if k in vector else v for k, v in base.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_and_task_vector_make_the_expert(dtype: torch.dtype, tmp_path: Path) -> None:
    models = family(tmp_path / "m", dtype=dtype)
    report = modelmerge.extract(models[0], models[1:], tmp_path / "out")
    base = read(models[0])
    for told, path in zip(report["experts"], models[1:], strict=True):
        vector, expert = read(tmp_path / "out" / path.name), read(path)
        assert all(tensor.dtype == torch.float32 for tensor in vector.values())
        again = restored(base, vector, expert)
        lost = sum(int((again[k] != expert[k]).sum()) for k in expert)
        assert lost == told["entries_not_restored"]
        assert lost <= 0.02 * sum(t.numel() for t in expert.values())
        for key in vector:
            # Where an entry is not restored, float32 cannot hold the difference: it is wrong by rounding alone.
            assert torch.allclose(
                again[key].float(), expert[key].float(), rtol=2e-2 if dtype != torch.float32 else 1e-6
            )


def test_what_did_not_change_is_left_out_and_listed(tmp_path: Path) -> None:
    base = base_state()
    expert = expert_state(base, 0)
    expert["model.layers.0.norm.weight"] = base["model.layers.0.norm.weight"]
    expert["model.layers.0.q_proj.weight"] = base["model.layers.0.q_proj.weight"]
    paths = [
        write(tmp_path / "base", base),
        write(tmp_path / "e", expert),
        write(tmp_path / "f", expert_state(base, 1)),
    ]
    report = modelmerge.extract(paths[0], paths[1:], tmp_path / "out")
    unchanged = ["model.layers.0.norm.weight", "model.layers.0.q_proj.weight"]
    manifest = json.loads((tmp_path / "out" / "e" / "modelmerge.json").read_bytes())
    assert sorted(report["experts"][0]["unchanged_tensors"]) == unchanged
    assert sorted(manifest["unchanged"]) == ["empty", *unchanged]
    assert not set(unchanged) & read(tmp_path / "out" / "e").keys()
    assert set(unchanged) < read(tmp_path / "out" / "f").keys()
    # And yet a merge knows them.
    modelmerge.merge(paths[0], paths[1:], tmp_path / "direct", method="ties")
    modelmerge.merge(paths[0], [tmp_path / "out" / "e", tmp_path / "out" / "f"], tmp_path / "by_vectors", method="ties")
    assert same_bits(read(tmp_path / "direct"), read(tmp_path / "by_vectors"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # Every method in 16 bits, where task vectors are the harder to tell; in 32 some, the others when there is time.
        pytest.param(name, dtype, marks=[] if dtype == torch.bfloat16 or name in ("ties", "apgd") else pytest.mark.slow)
        for name in registry.data_free()
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_merging_task_vectors_is_merging_the_experts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    count = takes(name, 3)
    models = family(tmp_path / "m", dtype=dtype, experts=count)
    modelmerge.extract(models[0], models[1:], tmp_path / "out", max_shard_size="3KB")
    modelmerge.merge(models[0], models[1:], tmp_path / "direct", method=name)
    mixed = [*vector_paths(tmp_path / "out", models)[:2], *models[3:]][:count]
    modelmerge.merge(models[0], mixed, tmp_path / "by_vectors", method=name)
    assert same_bits(read(tmp_path / "direct"), read(tmp_path / "by_vectors"))


def test_a_task_vector_of_another_base_is_refused(models: list[Path], tmp_path: Path) -> None:
    modelmerge.extract(models[0], models[1:2], tmp_path / "out")
    other = write(tmp_path / "other", base_state(seed=9))
    with pytest.raises(PlanError, match="'expert_0' is a task vector of another base"):
        modelmerge.merge(other, [tmp_path / "out" / "expert_0"], tmp_path / "x", method="average")
    with pytest.raises(ReferenceNotFound, match="is a task vector, not a base"):
        modelmerge.merge(tmp_path / "out" / "expert_0", models[1:], tmp_path / "x", method="average")


def test_a_task_vector_with_a_broken_manifest_is_refused(models: list[Path], tmp_path: Path) -> None:
    modelmerge.extract(models[0], models[1:2], tmp_path / "out")
    (tmp_path / "out" / "expert_0" / "modelmerge.json").write_text('{"kind": "task-vector"}')
    with pytest.raises(CheckpointError, match=r"modelmerge\.json: malformed"):
        modelmerge.merge(models[0], [tmp_path / "out" / "expert_0"], tmp_path / "x", method="average")


def test_the_table_tells_norms_cosines_and_ranks(tmp_path: Path) -> None:
    base = base_state()
    expert = expert_state(base, 0)
    key = "model.layers.1.mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(5)
    flat = torch.randn(16, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    expert[key] = base[key] + 0.01 * flat
    opposite = {k: 2 * v - expert[k] if v.is_floating_point() else v for k, v in base.items()}
    paths = [write(tmp_path / "base", base), write(tmp_path / "e", expert), write(tmp_path / "o", opposite)]
    report = modelmerge.extract(paths[0], paths[1:], tmp_path / "out")
    taus = torch.cat([(expert[k] - base[k]).flatten() for k in base if base[k].is_floating_point()]).double()
    origin = torch.cat([base[k].flatten() for k in base if base[k].is_floating_point()]).double()
    told = report["experts"][0]
    assert told["norm"] == pytest.approx(taus.norm().item(), rel=1e-6)
    assert told["relative_norm"] == pytest.approx((taus.norm() / origin.norm()).item(), rel=1e-6)
    assert told["changed"] == 1.0
    assert report["cosines"]["model"][0][1] == pytest.approx(-1.0, abs=1e-6)
    assert "model.layers.*.mlp.up_proj.weight" in report["cosines"]["layer_types"]
    ranks = {r["tensor"]: r["numerical_rank"] for r in report["ranks"]}
    assert ranks["model.layers.0.mlp.up_proj.weight"]["e"] == 16
    exact = torch.linalg.matrix_rank(expert[key] - base[key]).item()
    assert ranks[key]["e"] in (2, exact)  # rounding to float32 may lift further singular values over the threshold


@pytest.mark.parametrize(("rank", "energy"), [(3, None), (None, 0.8), (None, 1.0)])
def test_factors_are_the_best_of_their_rank_and_the_error_is_said(
    rank: int | None, energy: float | None, models: list[Path], tmp_path: Path
) -> None:
    report = modelmerge.extract(models[0], models[1:], tmp_path / "out", rank=rank, energy=energy)
    base, expert, vector = read(models[0]), read(models[1]), read(tmp_path / "out" / "expert_0")
    told = report["low_rank"]["expert_0"]["tensors"] if report["low_rank"] else {}
    if energy == 1.0:
        assert not told  # all directions: smaller whole than as factors
    for key, entry in told.items():
        tau = (expert[key] - base[key]).double()
        values = torch.linalg.svdvals(tau)
        kept = vector[f"{key}.left"].double() @ vector[f"{key}.right"].double()
        best = (values[entry["rank"] :].square().sum() / values.square().sum()).sqrt()
        assert (tau - kept).norm() / tau.norm() == pytest.approx(best.item(), rel=1e-5)
        assert entry["relative_error"] == pytest.approx(best.item(), rel=1e-5)
        if energy is not None:
            shares = values.square().cumsum(0) / values.square().sum()
            assert shares[entry["rank"] - 1] >= energy
            assert entry["rank"] == 1 or shares[entry["rank"] - 2] < energy
        else:
            assert entry["rank"] == rank
    modelmerge.merge(models[0], vector_paths(tmp_path / "out", models), tmp_path / "merged", method="average")
    merged = read(tmp_path / "merged")
    want = dict.fromkeys(base, 0)
    for path in models[1:]:
        v, e = read(tmp_path / "out" / path.name), read(path)
        for key in base:
            low = v[f"{key}.left"] @ v[f"{key}.right"] if f"{key}.left" in v else e[key] - base[key]
            want[key] = want[key] + low / 3
    for key in LINEAR:
        assert torch.allclose(merged[key], base[key] + want[key], atol=1e-6)


def both_ways(models: list[Path], out: Path, name: str, front: str, told: dict[str, Any], **more: Any) -> None:
    """Disentangling on the way is disentangling first, to the last bit."""
    more |= constant_scale(name)
    vectors = [out / f"{front}-vectors" / model.name for model in models[1:]]
    if not vectors[0].exists():
        modelmerge.disentangle(models[0], models[1:], vectors[0].parent, method=front, **told)
    modelmerge.merge(models[0], vectors, out / "two", method=name, force=True, **more)
    modelmerge.merge(
        models[0], models[1:], out / "one", method=name, disentangle=typed(front, told), force=True, **more
    )
    assert same_bits(read(out / "one"), read(out / "two"))


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    """Two experts, and three, stored in 16 bits; what is disentangled of them stays for the next test."""
    root = tmp_path_factory.mktemp("apart")
    return {count: family(root / str(count) / "m", dtype=torch.bfloat16, experts=count) for count in (2, 3)}


@pytest.mark.parametrize(
    ("name", "front"),
    [
        # Every method behind one transform, every transform before some methods; the others when there is time.
        pytest.param(name, front, marks=[] if front == "awd" or name in ("ties", "kron", "dare") else pytest.mark.slow)
        for name in registry.data_free()
        for front in registry.names("transform")
        if takes(name, 3) > 1
    ],
)
def test_in_front_of_any_merge_is_the_two_commands_in_turn(
    name: str, front: str, apart: dict[int, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    models = apart[takes(name, 3)]
    both_ways(models, models[0].parent.parent, name, front, {"steps": 20} if front == "awd" else {})
    modelmerge.merge(models[0], models[1:], tmp_path / "plain", method=name, **constant_scale(name))
    # Experts made of noise are orthogonal or worse: model-stock may keep the base either way.
    changed = not same_bits(read(tmp_path / "plain"), read(models[0].parent.parent / "one"))
    assert changed or (name == "model-stock" and front == "awd")


@pytest.mark.parametrize(
    ("front", "told"),
    [
        *(
            ("awd", {"granularity": granularity, "published": published, "steps": 10})
            for granularity in ("row", "tensor", "model")
            for published in (False, True)
        ),
        ("apgd", {"correction": "task", "density": 0.5}),
        ("apgd", {"correction": "task", "published": True, "steps": 5}),
        ("apgd", {"solver": "adam", "steps": 5, "lengths": "lambda"}),
    ],
)
def test_in_front_of_a_merge_with_options_is_the_two_commands_in_turn(
    front: str, told: dict[str, Any], models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    both_ways(models, tmp_path, "ties", front, told)
    both_ways(models, tmp_path, "tsv-m", front, told)


@pytest.mark.parametrize(
    "order",
    [("awd steps=10", "apgd"), ("apgd density=0.5", "awd granularity=row steps=10"), ("awd steps=10", "awd steps=20")],
)
@pytest.mark.parametrize("name", ["ties", "tsv-m"])
def test_a_chain_of_transforms_is_the_commands_in_turn(
    name: str, order: tuple[str, str], models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    place = models[1:]
    for i, text in enumerate(order):
        method, spec, options = parse_transform(text)
        given = {
            key: value for key, value in dataclasses.asdict(options).items() if value != getattr(spec.options(), key)
        }
        modelmerge.disentangle(models[0], place, tmp_path / f"v{i}", method=method, **given)
        place = [tmp_path / f"v{i}" / path.name for path in models[1:]]
    scale = constant_scale(name)
    modelmerge.merge(models[0], place, tmp_path / "in-turn", method=name, **scale)
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "chain", method=name, disentangle=order, **scale)
    assert same_bits(read(tmp_path / "chain"), read(tmp_path / "in-turn"))
    modelmerge.replay(tmp_path / "chain", tmp_path / "again")
    assert same_bits(read(tmp_path / "chain"), read(tmp_path / "again"))
    assert manifest["command"].count("--disentangle") == 2


@pytest.mark.parametrize(
    "told", [{}, {"density": 0.3}, {"published": True, "steps": 20}, {"solver": "adam", "steps": 20}]
)
def test_the_sum_of_what_apgd_corrected_is_apgd(told: dict[str, Any], models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "apgd", method="apgd", norm_cap=1e9, rest="base", **told)
    modelmerge.disentangle(models[0], models[1:], tmp_path / "v", method="apgd", lengths="lambda", **told)
    vectors = vector_paths(tmp_path / "v", models)
    modelmerge.merge(models[0], vectors, tmp_path / "sum", method="task-arithmetic", scale=1.0)
    want, got, base = (read(path) for path in (tmp_path / "apgd", tmp_path / "sum", models[0]))
    for key in LINEAR:
        assert (got[key] - want[key]).norm() <= 1e-6 * (want[key] - base[key]).norm()


def test_matrices_that_wait_take_the_room_that_was_said(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, seen, scratch = sum(t.numel() for k, t in read(models[0]).items() if k in LINEAR), [], Staging.scratch
    monkeypatch.setattr(Staging, "scratch", lambda self, nbytes: seen.append(nbytes) or scratch(self, nbytes))
    for told, count in (({}, 1), ({"correction": "task"}, 1), ({"correction": "task", "solver": "adam"}, 3)):
        plan = modelmerge.disentangle(
            models[0], models[1:], tmp_path / "v", method="apgd", dry_run=True, **told
        )["plan"]  # fmt: skip
        assert plan["bytes"]["scratch"] == 4 * entries * count
        modelmerge.merge(
            models[0], models[1:], tmp_path / "m", method="ties", disentangle=typed("apgd", told),
            force=True,
        )  # fmt: skip
        assert seen.pop() == 4 * entries * count

    def full(staging: Staging, nbytes: int) -> None:
        monkeypatch.setattr(Scratch, "__init__", fail)
        scratch(staging, nbytes)

    def fail(made: Scratch, directory: Path, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Staging, "scratch", full)
    with pytest.raises(OutputError, match=r"cannot keep [\d,]+ bytes beside the output in .*: no space left"):
        modelmerge.merge(models[0], models[1:], tmp_path / "x", method="ties", disentangle="apgd")
    assert not [path for path in tmp_path.iterdir() if "x" in path.name]


@pytest.mark.parametrize("granularity", ["row", "tensor", "model"])
def test_the_redundant_vector_is_what_was_taken_out(granularity: str, models: list[Path], tmp_path: Path) -> None:
    report = modelmerge.disentangle(
        models[0], models[1:], tmp_path / "v", method="awd", granularity=granularity, full_experts=True
    )
    base, redundant = read(models[0]), read(tmp_path / "v" / "redundant")
    assert redundant.keys() == LINEAR == report["tensors"].keys()
    square = dict.fromkeys(LINEAR, 0.0)
    for path in models[1:]:
        expert, vector = read(path), read(tmp_path / "v" / path.name)
        full = read(tmp_path / "v" / "experts" / path.name)
        assert full.keys() == base.keys()
        for key in base:
            if key in LINEAR:
                assert torch.allclose(vector[key] + redundant[key], expert[key] - base[key], atol=1e-7)
                square[key] += (expert[key] - base[key]).double().square().sum().item() / 3
            if key in vector:
                assert torch.equal(full[key], base[key] + vector[key])
            else:
                assert torch.equal(full[key], base[key])
        assert (tmp_path / "v" / "experts" / path.name / "tokenizer.json").is_file()
    for key in LINEAR:
        size = redundant[key].double().norm().item() / square[key] ** 0.5
        assert report["tensors"][key]["redundant"] == pytest.approx(size, rel=1e-4, abs=1e-9)
    assert report["loss"]["lowest"] <= report["loss"]["first"] == report["loss"]["curve"][0]
    assert len(report["loss"]["curve"]) == report["steps"] + 1 == 301


@pytest.mark.parametrize("front", ["awd", "apgd"])
def test_the_report_s_cosines_are_those_of_the_files(front: str, models: list[Path], tmp_path: Path) -> None:
    told = {"granularity": "model"} if front == "awd" else {"density": 0.5, "correction": "task"}
    report = modelmerge.disentangle(models[0], models[1:], tmp_path / "v", method=front, **told)
    base = read(models[0])

    def cosines(states: list[State], minus: State | None) -> list[float]:
        flat = [
            torch.cat([(s[k] - minus[k] if minus else s[k]).flatten() for k in sorted(LINEAR)]).double() for s in states
        ]
        return [float(torch.cosine_similarity(flat[i], flat[j], dim=0).abs()) for i in range(3) for j in range(i)]

    before = cosines([read(path) for path in models[1:]], base)
    after = cosines([read(path) for path in vector_paths(tmp_path / "v", models)], None)
    for when, values in (("before", before), ("after", after)):
        told = report["model"][when]
        assert told["mean_cosine"] == pytest.approx(sum(values) / 3, abs=1e-6)
        assert told["largest_cosine"] == pytest.approx(max(values), abs=1e-6)
    assert sum(after) < sum(before) or front != "awd"
    assert report["loss"]["lowest"] < report["loss"]["first"]


@pytest.mark.parametrize("front", registry.names("transform"))
def test_a_layer_that_one_expert_left_alone_stays_alone(front: str, tmp_path: Path) -> None:
    base = base_state()
    key = "model.layers.0.q_proj.weight"
    frozen = expert_state(base, 1)
    frozen[key] = base[key]
    paths = [write(tmp_path / "base", base), *(write(tmp_path / f"e{i}", expert_state(base, i)) for i in (0, 2)),
             write(tmp_path / "frozen", frozen)]  # fmt: skip
    modelmerge.disentangle(paths[0], paths[1:], tmp_path / "v", method=front)
    assert key not in read(tmp_path / "v" / "frozen")
    assert key in read(tmp_path / "v" / "e0")


@pytest.mark.parametrize("front", registry.names("transform"))
def test_sharding_and_workers_change_no_bit_of_a_disentangled_merge(
    front: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for block, shards in ((1 << 18, "5GB"), (64, "2KB")):
        monkeypatch.setattr(job, "CPU_BLOCK", block)
        out = tmp_path / f"{block}"
        modelmerge.merge(models[0], models[1:], out, method="task-arithmetic", disentangle=front, max_shard_size=shards)
        results.append(read(out))
    assert same_bits(*results)


def test_a_recipe_with_a_front_repeats_to_the_same_bits(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "one", method="ties", disentangle="awd alpha=0.03")
    again = modelmerge.replay(tmp_path / "one", tmp_path / "two")
    assert again["recipe"]["disentangle"][0].startswith("awd published=false alpha=0.03 lr=0.01 ")
    assert same_bits(read(tmp_path / "one"), read(tmp_path / "two"))


@pytest.mark.parametrize("front", registry.names("transform"))
def test_without_linear_layers_there_is_nothing_to_disentangle(front: str, models: list[Path], tmp_path: Path) -> None:
    for run in (
        partial(modelmerge.disentangle, method=front),
        partial(modelmerge.merge, method="average", disentangle=front),
    ):
        with pytest.raises(UsageError, match="no weight of a linear layer is left to disentangle"):
            run(models[0], models[1:], tmp_path / "v", include=["*norm*"])
    assert not (tmp_path / "v").exists()


def test_one_expert_is_nothing_to_disentangle(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to disentangle"):
        modelmerge.disentangle(models[0], models[1:2], tmp_path / "v", method="awd")
    with pytest.raises(UsageError, match="nothing to disentangle"):
        modelmerge.merge(models[0], models[1:2], tmp_path / "v", method="average", disentangle="awd")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("told", "says"),
    [({"rank": 2, "energy": 0.5}, "exclude each other"), ({"rank": 0}, "rank must be"), ({"energy": 1.5}, "energy")],
)
def test_wrong_ranks_are_refused(told: dict[str, Any], says: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        modelmerge.extract(models[0], models[1:], tmp_path / "v", **told)


def test_outputs_are_guarded_as_those_of_a_merge(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="not empty"):
        modelmerge.extract(models[0], models[1:], tmp_path / "v")
    with pytest.raises(OutputError, match="is the input"):
        modelmerge.disentangle(models[0], models[1:], models[1], method="awd", force=True)
    with pytest.raises(UsageError, match="cannot be called 'redundant'"):
        modelmerge.disentangle(models[0], {"redundant": models[1], "b": models[2]}, tmp_path / "w", method="awd")
    modelmerge.extract(models[0], models[1:], tmp_path / "v", force=True)
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == ["expert_0", "expert_1", "expert_2", "modelmerge.json"]
    assert not [p for p in tmp_path.iterdir() if "modelmerge" in p.name]


@pytest.mark.parametrize(("verb", "front"), [("extract", None), ("disentangle", "awd"), ("disentangle", "apgd")])
def test_what_an_interrupted_run_finished_is_taken_up(
    verb: str, front: str | None, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path, **told: Any) -> None:
        more = {"method": front} if front else {}
        getattr(modelmerge, verb)(models[0], models[1:], out, max_shard_size="1KB", **more, **told)

    run(tmp_path / "whole")
    finish, done = Staging._finish, []

    def interrupted(self: Staging, file: Any) -> None:
        if len(done) >= 4:
            raise KeyboardInterrupt
        finish(self, file)
        done.append(file.shard.filename)

    monkeypatch.setattr(Staging, "_finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", resume=True)
    kept = {name: (tmp_path / ".out.modelmerge" / name).stat().st_ino for name in done}
    assert len(kept) >= 4
    monkeypatch.setattr(Staging, "_finish", finish)
    run(tmp_path / "out", resume=True)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in done} == kept
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()


def test_nan_leaves_nothing(tmp_path: Path) -> None:
    base = base_state()
    broken = expert_state(base, 0)
    broken["model.layers.0.q_proj.weight"][3, 3] = torch.nan
    paths = [write(tmp_path / "b", base), write(tmp_path / "x", broken), write(tmp_path / "y", expert_state(base, 1))]
    fronts = [partial(modelmerge.disentangle, method=front) for front in registry.names("transform")]
    for run in (modelmerge.extract, *fronts):
        with pytest.raises(CheckpointError, match=r"x/model\.safetensors: tensor 'model\.layers\.0\.q_proj\.weight'"):
            run(paths[0], paths[1:], tmp_path / "v")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "x", "y"]


def test_on_the_command_line(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(path) for path in models]
    assert main(["extract", *words, "-o", str(tmp_path / "v")]) == 0
    out = capsys.readouterr().out
    assert "Cosines" in out
    assert "expert_2" in out
    assert main(["extract", *words, "-o", str(tmp_path / "w"), "--rank", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["manifest"]["report"]
    assert set(report["low_rank"]) == {"expert_0", "expert_1", "expert_2"}
    assert main(["disentangle"]) == 0
    assert "awd" in capsys.readouterr().out
    assert main(["disentangle", "awd", *words, "-o", str(tmp_path / "d"), "--experts"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("awd by tensor: loss ")
    assert (tmp_path / "d" / "experts" / "expert_0" / "config.json").is_file()
    assert main(["disentangle", "awd", *words, "-o", str(tmp_path / "p"), "--published", "--steps", "5", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["manifest"]["report"]["options"]
    assert (options["granularity"], options["published"], options["steps"]) == ("model", True, 5)
    row = ["disentangle", "awd", *words, "-o", str(tmp_path / "q"), "--published", "--granularity", "row", "-q"]
    assert main(row) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'q'}\n"
    assert json.loads((tmp_path / "q" / "modelmerge.json").read_bytes())["report"]["options"]["granularity"] == "row"
    merge = ["merge", "task-arithmetic", *words, "-o", str(tmp_path / "m")]
    assert main([*merge, "--disentangle", "awd alfa=0.5"]) == 2
    assert "did you mean 'alpha'" in capsys.readouterr().err
    assert main([*merge, "--disentangle", "awd alpha"]) == 2
    assert "'alpha' is not OPTION=V" in capsys.readouterr().err
    assert main([*merge, "--disentangle", "adw"]) == 2
    assert "did you mean 'awd'" in capsys.readouterr().err
    assert main([*merge, "--disentangle", "awd alpha=0.5 granularity=model"]) == 0
    assert capsys.readouterr().out.startswith("merged 3 experts with awd + task-arithmetic")
    card = (tmp_path / "m" / "README.md").read_text().replace(" \\\n ", "")
    assert "--disentangle 'awd published=false alpha=0.5 " in card
    words = ["merge", "ties", *words, "-o", str(tmp_path / "c"), "--disentangle", "apgd ridge=0.5"]
    assert main([*words, "--dry-run"]) == 0
    assert "beside the output while it runs, for what disentangling found" in capsys.readouterr().out
    assert main(words) == 0
    card = (tmp_path / "c" / "README.md").read_text().replace(" \\\n ", "")
    assert "ridge=0.5" in card
    assert "None" not in card[card.index("modelmerge merge") :]
    assert main([*words[:-1], "apgd steps=5 solver=exact", "-f"]) == 2
    assert "steps=5 solver=exact': steps has no effect with solver exact" in capsys.readouterr().err
