"""merge adamerging: weights found on unlabelled data, for CLIP models and for any classifier."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modelmerge
from modelmerge.charts.figures import of_coefficients
from modelmerge.cli import main
from modelmerge.engine import memory
from modelmerge.errors import CheckpointError, ModelMergeError, PlanError, RecipeError, UsageError
from modelmerge.evaluation import digits
from modelmerge.evaluation.custom import batches, draws, names_in
from modelmerge.record.redaction import published
from tests.support import clip_models
from tests.support import digits as digit_experts
from tests.support.checkpoints import State
from tests.support.digits import TASKS
from tests.support.methods import typed
from tests.support.terminal import seen

QUICK: dict[str, Any] = {"steps": 40, "lr": 0.03}
EXPERTS, STEPS = ("first", "second"), {"steps": 3, "lr": 0.05}


pytestmark = pytest.mark.usefixtures("one_thread")


# Real experts.


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base that has seen a few digits, and an expert of each task: [base, *experts]."""
    return digit_experts.save(tmp_path_factory.mktemp("digits"))


def accuracy(merged: Path) -> float:
    """The mean over the tasks, on images that neither experts nor coefficients have seen."""
    state, tasks = load_file(merged / "model.safetensors"), digits.load_tasks()
    return sum(digits.accuracy(state, tasks[name]) for name in TASKS) / len(TASKS)


@pytest.fixture(scope="module")
def merged(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("merged") / "layer"
    told = {"script": "modelmerge.evaluation.digits:unlabelled"}
    return out, modelmerge.merge(experts[0], experts[1:], out, method="adamerging", unlabelled=told, **QUICK)


def test_it_beats_task_arithmetic_on_held_out_images(
    merged: tuple[Path, dict[str, Any]], experts: list[Path], tmp_path: Path
) -> None:
    modelmerge.merge(experts[0], experts[1:], tmp_path / "ta", method="task-arithmetic", scale=0.3)
    told = {"script": digits.unlabelled}
    modelmerge.merge(
        experts[0], experts[1:], tmp_path / "task", method="adamerging", granularity="task", unlabelled=told, **QUICK
    )
    start, task, layer = (accuracy(place) for place in (tmp_path / "ta", tmp_path / "task", merged[0]))
    assert layer > start + 0.04
    assert layer > task > start - 0.01


def test_the_manifest_tells_coefficients_and_entropy(merged: tuple[Path, dict[str, Any]], experts: list[Path]) -> None:
    out, manifest = merged
    assert json.loads((out / "modelmerge.json").read_bytes()) == manifest
    found, search = manifest["recipe"]["coefficients"], manifest["adaptation"]
    assert len(search["entropy"]) == QUICK["steps"]
    assert sum(search["entropy"][-20:]) < sum(search["entropy"][:20])
    for name in TASKS:
        assert search["tasks"][name]["script"] == "digits.py:unlabelled"
        assert search["tasks"][name]["entropy_before"] > 0
    base, state = load_file(experts[0] / "model.safetensors"), load_file(out / "model.safetensors")
    others = [load_file(expert / "model.safetensors") for expert in experts[1:]]
    unchanged = {key for key in base if all(torch.equal(base[key], other[key]) for other in others)}
    assert found.keys() == base.keys() - unchanged
    assert "classifier.weight" in unchanged
    for key, told in found.items():
        assert list(told) == list(TASKS)
        sum_of = sum(c * (other[key] - base[key]) for c, other in zip(told.values(), others, strict=True))
        torch.testing.assert_close(state[key], base[key] + sum_of)
    card = (out / "README.md").read_text()
    assert "--script modelmerge.evaluation.digits:unlabelled" in card
    assert "found on unlabelled data" in card


def test_a_replay_needs_no_data_and_repeats_the_bits(
    merged: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(digits, "unlabelled")
    again = modelmerge.replay(merged[0] / "modelmerge.json", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (merged[0] / "model.safetensors").read_bytes()
    assert again["recipe"]["coefficients"] == merged[1]["recipe"]["coefficients"]


@pytest.mark.parametrize("odd", ["tensor", "expert"])
def test_coefficients_of_something_else_are_refused(
    odd: str, merged: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    manifest = json.loads((merged[0] / "modelmerge.json").read_bytes())
    found = manifest["recipe"]["coefficients"]
    if odd == "tensor":
        manifest["recipe"]["exclude"] = ["embeddings.position"]
    else:
        found["embeddings.position"] = {"inverted": 1.0, "other": 0.5}
    (tmp_path / "edited.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=r"the recipe has coefficients of .*'embeddings.position'"):
        modelmerge.replay(tmp_path / "edited.json", tmp_path / "again")


# Small classifiers: two linear layers, and the batches of two tasks.


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(self.lower(x).tanh())


@pytest.fixture
def small(tmp_path: Path) -> list[Path]:
    """[base, first, second], of `Network`."""
    torch.manual_seed(0)
    base = Network().state_dict()
    states = [base, *({name: w + 0.3 * torch.randn_like(w) for name, w in base.items()} for _ in EXPERTS)]
    for name, state in zip(("base", *EXPERTS), states, strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    return [tmp_path / name for name in ("base", *EXPERTS)]


SCRIPT = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.upper = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.upper(self.lower(x).tanh())


def unlabelled(expert):
    return Network(), torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
"""


def rows(count: int = 40) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(3))


def run(paths: list[Path], out: Path, script: Callable[[Any], Any], **told: Any) -> dict[str, Any]:
    return modelmerge.merge(
        paths[0], paths[1:], out, method="adamerging", unlabelled={"script": script}, **(STEPS | told)
    )


def coefficients(manifest: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return manifest["recipe"]["coefficients"]


def test_the_same_seed_finds_the_same(small: list[Path], tmp_path: Path) -> None:
    def script(expert: Any) -> Any:
        return Network(), rows()

    one, two, other = (run(small, tmp_path / str(i), script, seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert coefficients(one) == coefficients(two) != coefficients(other)
    assert one["adaptation"] == two["adaptation"]
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("form", ["tuple", "mapping", "list", "loader"])
def test_inputs_come_in_several_forms(form: str, small: list[Path], tmp_path: Path) -> None:
    """All inputs in one batch: whatever the form, the same first entropy."""

    class Named(Network):
        def forward(self, x: Tensor, scale: Tensor) -> Any:
            return {"logits": super().forward(x) * scale[:, None]}

    x, ones = rows(20), torch.ones(20)
    forms: dict[str, Any] = {
        "tuple": (x, ones), "mapping": {"x": x, "scale": ones}, "list": [(x, ones)],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, ones), batch_size=20),
    }  # fmt: skip
    plain = run(small, tmp_path / "plain", lambda expert: (Network(), x), batch_size=20)
    told = run(small, tmp_path / "told", lambda expert: (Named(), forms[form]), batch_size=20)
    assert told["adaptation"]["entropy"] == pytest.approx(plain["adaptation"]["entropy"], abs=1e-5)


def test_the_function_is_given_the_expert(small: list[Path], tmp_path: Path) -> None:
    seen = []

    def script(expert: Any) -> Any:
        seen.append((expert.name, expert.path, expert.base_path))
        module = Network()
        module.load_state_dict(dict(expert))  # what is merged is put in afterwards
        return module, rows()

    run(small, tmp_path / "out", script)
    assert seen == [(name, path, small[0]) for name, path in zip(EXPERTS, small[1:], strict=True)]


class Wrapped(nn.Module):
    """The network behind a prefix, with a head of its own for the task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body, self.head = Network(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_module_may_hold_the_model_behind_a_prefix(small: list[Path], tmp_path: Path) -> None:
    manifest = run(small, tmp_path / "out", lambda expert: (Wrapped(), rows()), batch_size=40, init=0.3)
    module, states = Wrapped(), [load_file(path / "model.safetensors") for path in small]
    at_first = {key: w + 0.3 * sum(s[key] - w for s in states[1:]) for key, w in states[0].items()}
    module.body.load_state_dict(at_first)
    expected = torch.distributions.Categorical(logits=module(rows())).entropy().mean()
    assert manifest["adaptation"]["entropy"][0] == pytest.approx(expected.item(), abs=1e-5)


def test_a_tensor_that_a_module_uses_twice_is_replaced_in_both_places(small: list[Path], tmp_path: Path) -> None:
    class Twice(Network):
        def __init__(self) -> None:
            super().__init__()
            self.also = nn.Linear(6, 8)
            self.also.weight = self.lower.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.upper(self.also(x).tanh()) + super().forward(x)

    shared = Twice()

    def script(expert: Any) -> Any:  # one module for both tasks
        return shared, rows()

    run(small, tmp_path / "out", script)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert shared.also.weight is shared.lower.weight
    torch.testing.assert_close(shared.also.weight.detach(), merged["lower.weight"])


def test_weights_are_part_of_the_task_vectors(small: list[Path], tmp_path: Path) -> None:
    def script(expert: Any) -> Any:
        return Network(), rows()

    plain = run(small, tmp_path / "plain", script)
    told = run(small, tmp_path / "told", script, weights={"first": 0.0})
    assert plain["adaptation"]["entropy"][0] != told["adaptation"]["entropy"][0]
    assert coefficients(told)["lower.weight"]["first"] == 0.3  # nothing depends on it
    base, second, merged = (load_file(p / "model.safetensors") for p in (small[0], small[2], tmp_path / "told"))
    c = coefficients(told)["lower.bias"]["second"]
    torch.testing.assert_close(
        merged["lower.bias"], base["lower.bias"] + c * (second["lower.bias"] - base["lower.bias"])
    )


@pytest.mark.parametrize(("front", "told"), [("awd", {}), ("apgd", {"correction": "task"})])
def test_a_front_is_the_two_commands_in_turn(
    front: str, told: dict[str, Any], small: list[Path], tmp_path: Path
) -> None:
    def script(expert: Any) -> Any:
        return Network(), rows()

    one = run(small, tmp_path / "one", script, disentangle=typed(front, told))
    modelmerge.disentangle(small[0], small[1:], tmp_path / "v", method=front, **told)
    two = run([small[0], *(tmp_path / "v" / name for name in EXPERTS)], tmp_path / "two", script)
    plain = run(small, tmp_path / "plain", script)
    assert coefficients(one) == coefficients(two) != coefficients(plain)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    # What the front kept on the disk is gone.
    assert not [place for place in tmp_path.iterdir() if place.name.startswith(".")]


@pytest.mark.parametrize("transforms", [(), ("awd alpha=0.2",)])
def test_any_method_can_stand_behind_coefficients(
    transforms: tuple[str, ...], small: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TIES by the weights that are the coefficients of `adamerging`, tensor by tensor; and a replay without data."""

    def script(expert: Any) -> Any:
        return Network(), rows()

    data = {"script": script, **STEPS}
    behind = {"disentangle": transforms, "method": "ties", "unlabelled": data, "density": 0.5}
    manifest = modelmerge.merge(small[0], small[1:], tmp_path / "ties", **behind)
    mixture = run(small, tmp_path / "mixture", script, disentangle=transforms)
    assert coefficients(manifest) == coefficients(mixture)
    assert manifest["adaptation"] == mixture["adaptation"]
    at = [
        f"{tensor}: {' '.join(f'{expert}.weight={c!r}' for expert, c in each.items())}"
        for tensor, each in coefficients(mixture).items()
    ]
    modelmerge.merge(
        small[0], small[1:], tmp_path / "by-hand", method="ties", density=0.5, disentangle=transforms, at=at
    )
    modelmerge.replay(tmp_path / "ties", tmp_path / "again")
    names = ("ties", "by-hand", "again", "mixture")
    ties, by_hand, again, sum_of = ((tmp_path / name / "model.safetensors").read_bytes() for name in names)
    assert ties == by_hand == again != sum_of
    assert "`adamerging`" in (tmp_path / "ties" / "README.md").read_text()


def test_a_layer_scale_is_part_of_the_task_vectors(small: list[Path], tmp_path: Path) -> None:
    def script(expert: Any) -> Any:
        return Network(), rows()

    plain = run(small, tmp_path / "plain", script)
    told = run(small, tmp_path / "told", script, at=["lower*: weight=0.5", "*: weight=2"])
    assert plain["adaptation"]["entropy"][0] != told["adaptation"]["entropy"][0]
    base, *others, merged = (load_file(p / "model.safetensors") for p in (*small, tmp_path / "told"))
    for key, factor in (("lower.weight", 0.5), ("upper.weight", 2.0)):
        own = coefficients(told)[key].values()
        sum_of = sum(factor * c * (other[key] - base[key]) for c, other in zip(own, others, strict=True))
        torch.testing.assert_close(merged[key], base[key] + sum_of)


def test_an_adapter_can_be_written(small: list[Path], tmp_path: Path) -> None:
    (small[0] / "config.json").write_text('{"model_type": "x"}')
    manifest = run(
        small, tmp_path / "out", lambda expert: (Network(), rows()), as_lora=4, exclude=["*.bias"], granularity="task"
    )
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    left, right = (next(t for n, t in factors.items() if "upper" in n and n.endswith(f"lora_{i}.weight")) for i in "BA")
    states = [load_file(path / "model.safetensors")["upper.weight"] for path in small]
    told = coefficients(manifest)["upper.weight"]
    merged = sum(c * (state - states[0]) for c, state in zip(told.values(), states[1:], strict=True))
    torch.testing.assert_close(left @ right, merged, rtol=1e-4, atol=1e-5)


def test_a_run_that_was_interrupted_is_not_searched_again(
    small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def script(expert: Any) -> Any:
        calls.append(expert.name)
        return Network(), rows()

    def full(*words: Any) -> Any:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("modelmerge.verbs.merge.run", full)
        with pytest.raises(OSError, match="the disk is full"):
            run(small, tmp_path / "out", script, resume=True)
    manifest = run(small, tmp_path / "out", script, resume=True)
    assert calls == list(EXPERTS)
    assert len(manifest["adaptation"]["entropy"]) == STEPS["steps"]
    # And an output that is complete is left as it is.
    assert run(small, tmp_path / "out", script, resume=True) == manifest
    assert coefficients(run(small, tmp_path / "anew", script)) == coefficients(manifest)
    assert calls == [*EXPERTS, *EXPERTS]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_finds_what_the_cpu_finds(small: list[Path], tmp_path: Path) -> None:
    def script(expert: Any) -> Any:
        return Network(), rows()

    cpu, cuda = (coefficients(run(small, tmp_path / name, script, device=name)) for name in ("cpu", "cuda"))
    for tensor, told in cpu.items():
        assert cuda[tensor] == pytest.approx(told, abs=1e-4)


# What is wrong is said.


class Odd(Network):
    """A network that gives something else of its logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(super().forward(x))


class Lone(nn.Module):
    """Half of the network."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.lower = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lower(x)


class Idle(Network):
    """A network that uses half of what it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lower(x)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Network(), Network()


@pytest.mark.parametrize(
    ("gives", "kind", "says"),
    [
        (lambda: Network(), ModelMergeError, "returned Network, which is not what was asked for"),
        (lambda: (rows(), Network()), ModelMergeError, "returned tuple, which is not what was asked for"),
        (lambda: 1 / 0, ModelMergeError, "failed on 'first': ZeroDivisionError"),
        (lambda: (Network(), rows(0)), ModelMergeError, "its inputs are 0 rows"),
        (lambda: (Network(), (rows(3), rows(4))), ModelMergeError, "its inputs are 3 and 4 rows"),
        (lambda: (Network(), []), ModelMergeError, "there are no inputs"),
        (lambda: (Network(), iter([rows(4)])), ModelMergeError, "could be iterated over once only"),
        (lambda: (Network(), 5), ModelMergeError, "its inputs cannot be read: TypeError"),
        (lambda: (Network(), rows()[:, :5]), ModelMergeError, "its module fails on its inputs: RuntimeError"),
        (lambda: (Odd(lambda x: "yes"), rows()), ModelMergeError, "its module returns str"),
        (lambda: (Odd(lambda x: x[:, 0]), rows()), ModelMergeError, r"gives a tensor of shape \[16\]"),
        (lambda: (Odd(lambda x: x[:, :1]), rows()), ModelMergeError, r"gives a tensor of shape \[16, 1\]"),
        (lambda: (Odd(lambda x: x / 0), rows()), CheckpointError, "gives NaN or Inf on the data of 'first'"),
        (lambda: (Lone(), rows()), PlanError, "the module of 'first' lacks 2 of the tensors.*'upper.bias', 'upper.w"),
        (lambda: (nn.Linear(6, 4), rows()), PlanError, "lacks 4 of the tensors"),
        (lambda: (Idle(), rows()), PlanError, "no prediction depends on 2 of the tensors"),
        (lambda: (Both(), rows()), PlanError, "has the checkpoint's tensors twice: behind 'one.' and 'other.'"),
    ],
)  # fmt: skip
def test_a_function_that_gives_something_else_is_refused(
    gives: Callable[[], Any], kind: type[Exception], says: str, small: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says):
        run(small, tmp_path / "out", lambda expert: gives())
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_module_of_another_width_is_refused(small: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"has 'lower.weight' of shape \[8, 5\], and the base has \[8, 6\]"):
        run(small, tmp_path / "out", lambda expert: (Lone(5), rows()), exclude=["upper*"])
    manifest = run(small, tmp_path / "out", lambda expert: (Lone(), rows()), exclude=["upper*"])
    assert coefficients(manifest).keys() == {"lower.weight", "lower.bias"}


def test_experts_that_are_the_base_have_no_coefficients(small: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="all experts are the same as the base"):
        run([small[0], small[0]], tmp_path / "out", lambda expert: (Network(), rows()))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "'adamerging' needs unlabelled data of each expert's task: first, second"),
        (["--script", "nothing.py:f"], 1, "nothing.py: no such file"),
        (["--script", "modelmerge.evaluation.digits:nothing"], 2, "has no function 'nothing'"),
        (["--script", "x.py:f", "--limit", "3"], 2, "--script brings its own data: --limit has no effect"),
        (["--script", "x.py:f", "--steps", "0"], 2, "--steps must be at least 1, not 0"),
        (["--script", "x.py:f", "--granularity", "tensor"], 2, "--granularity"),
        (["--script", "x.py:f", "--plot", "x.jpg"], 2, "--plot x.jpg: a chart cannot be written as '.jpg'"),
        (["--task", "nothing"], 2, "there is no task 'nothing'"),
        (["--data", "first=./c", "--data", "second=b"], 1, "no such file or directory"),
        (["--data", "first=a", "--data", "second=b", "--classes", "x"], 1, "x: cannot be read"),
        (["--task", "svhn"], 2, "the expert 'first' has no unlabelled data: there are those of svhn"),
        (["--data", "first=a", "--data", "second=b", "--task", "svhn"], 2, "no expert is for the data of 'svhn'"),
        (["--data", "first=a", "--data", "second=b"], 1, "'BASE' is a model without a config.json"),
        (["--data", "first=a", "--data", "b"], 2, "the expert 'second' has no unlabelled data"),
        (["--data", "first=a", "--data", "second=b", "--limit", "0"], 2, "--limit must be at least 1, not 0"),
        (["--disentangle", "awd", "--disentangle", "awb"], 2, "did you mean 'awd'"),
    ],
)
def test_words_and_exit_codes(
    words: list[str], code: int, says: str, small: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    clip_models.folder(tmp_path / "a", each=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert main(["merge", "adamerging", f"BASE={small[0]}", *map(str, small[1:]), "-o", "out", *words]) == code
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_what_was_found_is_shown(merged: tuple[Path, dict[str, Any]], experts: list[Path], tmp_path: Path) -> None:
    chart = of_coefficients(merged[1]["recipe"])
    assert chart.columns == TASKS
    assert len(chart.rows) == len(merged[1]["recipe"]["coefficients"])
    assert chart.centre == 0.3, "where they started"
    same = {**merged[1]["recipe"], "coefficients": {name: {"first": 0.2, "second": 0.4} for name in ("a", "b")}}
    assert (of_coefficients(same).rows, of_coefficients(same).values) == (("all tensors",), ((0.2, 0.4),))


def test_the_terminal_sees_the_entropy_and_the_coefficients(small: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    words = ["merge", "adamerging", *map(str, small), "-o", str(tmp_path / "out")]
    text, out, code = seen([*words, "--script", f"{tmp_path / 'mine.py'}:unlabelled", "--steps", "40"])
    assert code == 0
    assert "40 of 40 steps" in text
    assert "entropy 1." in text
    rows = [line.split() for line in out.splitlines() if line.startswith(EXPERTS)]
    assert len(rows) == len(EXPERTS)
    assert all(float(before) > float(after) > 0 for *_, before, after in rows)


def test_what_a_function_prints_is_no_result(
    small: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(f"print('once')\n{SCRIPT}".replace("return N", "print('twice'); return N"))
    words = ["--script", f"{tmp_path / 'mine.py'}:unlabelled", "--steps", "2", "--json"]
    assert main(["merge", "adamerging", *map(str, small), "-o", str(tmp_path / "out"), *words]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["manifest"]["recipe"]["method"] == "adamerging"
    assert err.split() == ["once", *["twice"] * len(EXPERTS)]


def test_coefficients_are_for_models_that_are_merged_in_one_way(small: list[Path], tmp_path: Path) -> None:
    for method in ("adamerging", "ties"):
        with pytest.raises(UsageError, match=f"'{method}' finds weights for all tensors on data, and no other"):
            modelmerge.merge(
                small[0], small[1:], tmp_path / "out", method=method, unlabelled={"script": "x.py:f"}, at=["u*: sce"]
            )
    with pytest.raises(UsageError, match="unlabelled data have no setting 'task'"):
        modelmerge.merge(small[0], small[1:], tmp_path / "out", method="adamerging", unlabelled={"task": ["svhn"]})


def test_models_that_do_not_fit_in_memory_together_are_refused(
    small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "merge",
        "adamerging",
        *map(str, small),
        "-o",
        str(tmp_path / "out"),
        "--script",
        "modelmerge.evaluation.digits:scores",
    ]
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    size = sum(w.nbytes for w in load_file(small[0] / "model.safetensors").values())
    assert plan["peak_memory"]["host"] == pytest.approx(memory.PROCESS_BYTES + (2 + 3) * size, rel=0.01)
    assert plan["unlabelled"] == {"script": "modelmerge.evaluation.digits:scores"}
    assert (plan["passes"], plan["bytes"]["read"]) == (2, 2 * (2 + 1) * size)
    monkeypatch.setattr("modelmerge.engine.memory.free_memory", lambda device: 1000)
    assert main([*words, "--dry-run"]) == 2
    assert "and 1,000 are free on cpu" in capsys.readouterr().err


def test_places_are_drawn_each_once_in_turn() -> None:
    drawn = draws(10, 4, 0, "a")
    first, second, third = next(drawn), next(drawn), next(drawn)
    assert len({*first, *second}) == 8
    assert len(third) == 4
    assert next(draws(10, 4, 0, "b")) != next(draws(10, 4, 1, "a")) != first == next(draws(10, 4, 0, "a"))
    assert sorted(next(draws(3, 4, 0, "a"))) == [0, 1, 2]
    found = batches(torch.arange(10), 4, 0, "a", "here")
    assert [next(found).tolist(), next(found).tolist()] == [first, second]


def test_names_are_found_behind_the_prefix_that_has_most() -> None:
    keys = ["encoder.a.w", "encoder.b.w", "b.w", "head.w"]
    assert names_in(keys, ["a.w", "b.w"], "x") == {"a.w": "encoder.a.w", "b.w": "encoder.b.w"}
    assert names_in(["b.w"], ["a.w", "b.w"], "x") == {"b.w": "b.w"}
    assert names_in(["c"], ["a.w"], "x") == {}


# CLIP models.


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A CLIP that knows the colours, and two vision towers beside it."""
    root = tmp_path_factory.mktemp("clips")
    paths = [clip_models.save(clip_models.trained(), root / "base")]
    generator = torch.Generator().manual_seed(4)
    for name in EXPERTS:
        other = clip_models.untrained()
        other.load_state_dict(clip_models.trained().state_dict())
        with torch.no_grad():
            for tensor in other.vision_model.parameters():
                tensor += 0.08 * torch.randn(tensor.shape, generator=generator)
        paths.append(clip_models.save_vision(other, root / name))
    return paths


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unlabelled")
    return {name: clip_models.folder(root / name, each=4, seed=i) for i, name in enumerate(EXPERTS)}


def entropy_by_transformers(base: Path, merged: State, folder: Path) -> float:
    from PIL import Image
    from transformers import CLIPModel, CLIPTokenizer

    whole = CLIPModel.from_pretrained(base)
    whole.load_state_dict({**whole.state_dict(), **merged})
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in sorted(clip_models.COLOURS)]
    text = CLIPTokenizer.from_pretrained(base)(prompts, padding=True, return_tensors="pt")
    pixels = clip_models.processor()([Image.open(file) for file in sorted(folder.rglob("*.png"))], return_tensors="pt")
    with torch.no_grad():
        logits = whole.eval()(**text, **pixels).logits_per_image
    return float(torch.distributions.Categorical(logits=logits).entropy().mean())


def test_clip_models_are_adapted_on_images(
    clips: list[Path], images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [word for name, place in images.items() for word in ("--data", f"{name}={place}")]
    # All images in every batch: the figures can be computed otherwise.
    words = [*told, "--batch-size", "24", "--steps", "8", "--lr", "0.02", "--plot", str(tmp_path / "c.svg")]
    assert main(["merge", "adamerging", *map(str, clips), "-o", str(tmp_path / "out"), *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    manifest = printed["manifest"]
    states = [load_file(path / "model.safetensors") for path in clips]
    at_first = {key: states[0][key] + 0.3 * sum(s[key] - states[0][key] for s in states[1:]) for key in states[1]}
    for name, place in images.items():
        assert manifest["adaptation"]["tasks"][name]["images"] == 24
        expected = entropy_by_transformers(clips[0], at_first, place)
        assert manifest["adaptation"]["tasks"][name]["entropy_before"] == pytest.approx(expected, abs=1e-4)
    assert manifest["adaptation"]["entropy"][-1] < manifest["adaptation"]["entropy"][0]
    found, merged = coefficients(manifest), load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {key for key in states[1] if states[1][key].is_floating_point()}
    drawn = Path(*printed["pictures"]).read_text()
    assert all(tensor in drawn for tensor in ("vision_model.encoder.layers.0.mlp.fc1.weight", *EXPERTS))
    assert len({value for each in found.values() for value in each.values()}) == 2 * len(found)
    assert torch.equal(merged["text_projection.weight"], states[0]["text_projection.weight"])
    # The words on the card make it again.
    assert main(["merge", "--recipe", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    out = capsys.readouterr().out
    assert "merged 2 experts with adamerging" in out


def test_what_is_published_names_no_paths(
    clips: list[Path], images: dict[str, Path], small: list[Path], tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(name.replace("_", " ") for name in clip_models.COLOURS))
    told = {"data": {"first": images["first"]}, "classes": {"first": names}, "heads": tmp_path / "heads"}
    once: dict[str, Any] = {"method": "adamerging", "steps": 1}
    one = modelmerge.merge(clips[0], clips[1:2], tmp_path / "out", unlabelled=told, **once)
    (tmp_path / "mine.py").write_text(SCRIPT)
    script = {"script": f"{tmp_path / 'mine.py'}:unlabelled"}
    two = modelmerge.merge(small[0], small[1:], tmp_path / "other", unlabelled=script, **once)
    for manifest in (one, two):
        assert str(tmp_path.parent) in json.dumps(manifest)
        assert str(tmp_path.parent.parent) not in json.dumps(published(manifest))
    assert "--data first=first --classes first=names.txt" in published(one)["command"]
    assert "--script mine.py:unlabelled" in published(two)["command"]


def test_images_without_labels_need_the_names_of_the_classes(
    clips: list[Path], images: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images in no folders, with the names in a file, and with labels: the same entropies."""
    flat, names = tmp_path / "flat", tmp_path / "names.txt"
    flat.mkdir()
    for file in sorted(images["first"].rglob("*.png")):
        shutil.copy(file, flat / f"{file.parent.name}-{file.name}")
    names.write_text("\n".join(name.replace("_", " ") for name in sorted(clip_models.COLOURS)))
    kept: dict[str, Any] = {"batch_size": 24, "steps": 2, "method": "adamerging"}
    told = {"data": {"first": flat}, "classes": names}
    bare = modelmerge.merge(clips[0], clips[1:2], tmp_path / "bare", unlabelled=told, **kept)
    told = {"data": {"first": images["first"]}}
    labelled = modelmerge.merge(clips[0], clips[1:2], tmp_path / "labelled", unlabelled=told, **kept)
    assert bare["adaptation"]["entropy"] == pytest.approx(labelled["adaptation"]["entropy"], abs=1e-4)
    with pytest.raises(ModelMergeError, match="no column of labels"):
        modelmerge.merge(clips[0], clips[1:2], tmp_path / "x", unlabelled={"data": {"first": flat}}, **kept)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelMergeError, match="it is empty"):
        modelmerge.merge(
            clips[0], clips[1:2], tmp_path / "x", unlabelled={"data": {"first": tmp_path / "empty"}}, **kept
        )


def test_a_text_tower_that_the_experts_changed_is_refused(
    clips: list[Path], images: dict[str, Path], tmp_path: Path
) -> None:
    state = load_file(clips[0] / "model.safetensors")
    changed = {name: w + 0.01 if w.is_floating_point() else w for name, w in state.items()}
    shutil.copytree(clips[0], tmp_path / "first")
    save_file(changed, tmp_path / "first" / "model.safetensors", metadata={"format": "pt"})
    told: dict[str, Any] = {"unlabelled": {"data": {"first": images["first"]}}, "method": "adamerging", "steps": 2}
    with pytest.raises(PlanError, match=r"the module of 'first' lacks .* of the tensors that the experts changed"):
        modelmerge.merge(clips[0], [tmp_path / "first"], tmp_path / "out", **told)
    left = ["text_model*", "text_projection*", "logit_scale"]
    manifest = modelmerge.merge(clips[0], [tmp_path / "first"], tmp_path / "out", exclude=left, **told)
    assert "visual_projection.weight" in coefficients(manifest)


def test_a_tower_alone_as_the_base_needs_a_head(clips: list[Path], images: dict[str, Path], tmp_path: Path) -> None:
    told: dict[str, Any] = {"method": "adamerging", "steps": 2}
    data = {"data": {"second": images["second"]}}
    with pytest.raises(UsageError, match="'first' has no text tower") as refused:
        modelmerge.merge(clips[1], [clips[2]], tmp_path / "out", unlabelled=data, **told)
    assert "heads DIR" in str(refused.value.hint)
    modelmerge.evaluate([clips[0]], suite="clip", data={"second": images["second"]}, heads=tmp_path / "heads")
    manifest = modelmerge.merge(
        clips[1], [clips[2]], tmp_path / "out", unlabelled={**data, "heads": tmp_path / "heads"}, **told
    )
    assert manifest["adaptation"]["tasks"]["second"]["classes"] == len(clip_models.COLOURS)
