"""Whole merges from files against the outputs of an independent implementation (fusion_bench's own classes).

The vectors: `four` and `five-odd` checkpoints with 4 and 5 experts; see the names of the files for the methods. The
float64 files hold APGD's intermediates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelmerge
from modelmerge.methods import apgd
from modelmerge.methods.contract import Context
from modelmerge.methods.merge.apgd import Options

ORACLE = Path(__file__).parent / "oracle"
SETS = {"four": 4, "five-odd": 5}
KEPT = ["encoder*weight"]  # with the rule for linear layers: the keys that APGD's code takes
ALL = {"include": ["*"], "rest": "average"}  # every matrix, whatever its name; the mean for the other tensors


@pytest.mark.parametrize("family", SETS)
@pytest.mark.parametrize(
    ("file", "method", "options", "tolerance"),
    [
        ("task-arithmetic", "task-arithmetic", {"published": True}, 1e-5),
        ("ties-sum", "ties", {"published": True}, 1e-4),
        ("ties-mean", "ties", {"reduce": "mean", "scale": 0.3}, 1e-4),
        ("apgd", "apgd", {"published": True, "include": KEPT}, 1e-4),
        ("consensus", "consensus", {"tall_lambda": 0.6, "published": True}, 1e-5),
        ("tsv-m", "tsv-m", ALL, 1e-5),
        ("iso-c", "iso-c", ALL, 1e-5),
        ("iso-cts", "iso-cts", ALL, 1e-5),
        ("wudi", "wudi", {"solver": "adam", "steps": 400, **ALL}, 1e-5),
    ],
)
def test_merge_agrees(
    family: str, file: str, method: str, options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    folder = ORACLE / family
    experts = [folder / f"expert_{i}.safetensors" for i in range(SETS[family])]
    modelmerge.merge(folder / "base.safetensors", experts, tmp_path / "out", method=method, **options)
    base = load_file(folder / "base.safetensors")
    want = load_file(folder / "merged" / f"{file}.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == base.keys()
    changed = 0
    for name in base:
        tensor = want[name]  # beside them, the file of consensus has its masks
        tau = (tensor - base[name]).norm()
        if tau == 0:
            assert torch.equal(got[name], base[name]), name
        else:
            changed += 1
            # Next to it the rounding of the weights themselves, which shows where they are large and tau is small.
            rounding = 2**-24 * tensor.norm()
            assert (got[name] - tensor).norm() <= tolerance * tau + rounding, name
    assert changed == (3 if method == "apgd" else len(base))


@pytest.mark.parametrize("family", SETS)
def test_apgd_intermediates_agree_with_float64(family: str) -> None:
    folder, tasks = ORACLE / family, SETS[family]
    base = load_file(folder / "base.safetensors")
    experts = [load_file(folder / f"expert_{i}.safetensors") for i in range(tasks)]
    oracle = load_file(folder / "apgd-float64.safetensors")
    options = Options(published=True)
    for name in [key.removeprefix("delta/") for key in oracle if key.startswith("delta/")]:
        taus = torch.stack([expert[name] - base[name] for expert in experts])
        lambdas = [options.eta / tau.norm().item() for tau in taus]
        want = [oracle[f"lamda/{i}/{name}"].item() for i in range(tasks)]
        assert lambdas == pytest.approx(want, rel=1e-5)
        basis = apgd.task_basis(taus, options)
        projection = basis.double() @ basis.double().T
        assert (projection - oracle[f"projection/{name}"]).norm() <= 1e-4 * projection.norm(), name
        correction = apgd.descend(taus, lambdas, basis, options, Context(tensor=name, weights=(1.0,) * tasks))
        delta = oracle[f"delta/{name}"]
        assert (correction.double() - delta).norm() <= 1e-3 * delta.norm(), name
