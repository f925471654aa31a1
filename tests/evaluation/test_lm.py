"""eval lm: figures as transformers gives them; what the harness would take in silence is an error or n/a."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import modelmerge
from modelmerge.cli import main
from modelmerge.errors import CheckpointError, ModelMergeError, ReferenceNotFound, UsageError
from modelmerge.evaluation import lm, lm_tasks
from tests.support import chromium, language
from tests.support.commands import run, script
from tests.support.language import TASKS, World, local_task

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[lm]'")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return language.build(tmp_path_factory.mktemp("language"))


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MODELMERGE_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share out
    yield
    torch.set_num_threads(threads)


def scores(model: object, world: World, *tasks: str, **options: Any) -> dict[str, Any]:
    report = modelmerge.evaluate(
        [str(model)], suite="lm", tasks=tasks, **{"include_path": world.tasks, "cache": False, **options}
    )
    return report["models"][-1]["scores"]


def copy(
    source: Path, target: Path, change: Callable[[dict[str, Tensor]], object] | None = None, **config: Any
) -> Path:
    """A copy of a model with other weights, or another config."""
    shutil.copytree(source, target)
    told = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(told))
    if change is not None:
        state = load_file(target / "model.safetensors")
        change(state)
        save_file(
            {name: tensor.clone() for name, tensor in state.items()}, target / "model.safetensors", {"format": "pt"}
        )
    return target


def written(model: Any, folder: Path, prompts: list[str]) -> list[str]:
    """What a model writes, one prompt after the other, as the literature decodes it."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        outputs = [model.generate(**words(text, return_tensors="pt"), max_length=10)[0] for text in prompts]
    return [words.decode(output, skip_special_tokens=True) for output in outputs]


def t5(folder: Path) -> Any:
    from transformers import T5ForConditionalGeneration

    return T5ForConditionalGeneration.from_pretrained(folder)


def test_generated_words_are_scored_as_transformers_writes_them(world: World) -> None:
    from scipy.stats import spearmanr

    told = scores(world.t5, world, "flan_t5_glue_sst2", "flan_t5_glue_stsb")
    docs = world.docs["sst2"]
    texts = written(t5(world.t5), world.t5, [language.prompt_sst2(doc) for doc in docs])
    right = [float(text == ("negative", "positive")[doc["label"]]) for text, doc in zip(texts, docs, strict=True)]
    sst2 = told["flan_t5_glue_sst2"]
    assert 0.6 < sst2["score"] < 1.0
    assert (sst2["items"], sst2["count"], sst2["metric"]) == (right, 60, "exact_match")
    assert sst2["score"] == pytest.approx(statistics.fmean(right), abs=1e-12)
    assert sst2["stderr"] == pytest.approx(statistics.stdev(right) / math.sqrt(60))

    docs = world.docs["stsb"]
    texts = written(t5(world.t5), world.t5, [language.prompt_stsb(doc) for doc in docs])
    rho = spearmanr([float(text) for text in texts], [doc["label"] for doc in docs])[0]
    stsb = told["flan_t5_glue_stsb"]
    assert 0.5 < rho < 0.9
    assert (stsb["score"], stsb["metric"], stsb["count"]) == (pytest.approx(rho, abs=1e-12), "spearman", 60)
    # Bootstrapped; near what the normal approximation of rho gives (Bonett and Wright 2000).
    assert stsb["stderr"] == pytest.approx((1 - rho**2) * math.sqrt((1 + rho**2 / 2) / 57), rel=0.5)
    assert "items" not in stsb


def test_likelihoods_are_those_of_transformers(world: World) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    model, words = LlamaForCausalLM.from_pretrained(world.llama), AutoTokenizer.from_pretrained(world.llama)
    right, right_by_length = [], []
    for doc in world.docs["colours"]:
        prompt = words(f"{doc['text']} first", return_tensors="pt").input_ids
        with torch.no_grad():
            odds = model(prompt).logits[0, -1].log_softmax(-1)
        likelihoods = torch.stack([odds[words.convert_tokens_to_ids(choice)] for choice in doc["choices"]])
        lengths = torch.tensor([len(choice) for choice in doc["choices"]])
        right.append(float(likelihoods.argmax() == doc["gold"]))
        right_by_length.append(float((likelihoods / lengths).argmax() == doc["gold"]))
    told = scores(world.llama, world, "first_colour")["first_colour"]
    assert 0.5 < told["score"] < 1.0
    assert told["items"] == right
    assert told["figures"] == {
        "acc,none": pytest.approx(statistics.fmean(right)),
        "acc_norm,none": pytest.approx(statistics.fmean(right_by_length)),
    }
    other = scores(world.llama, world, "first_colour", metrics=["first_colour=acc_norm"])["first_colour"]
    assert (other["items"], other["metric"]) == (right_by_length, "acc_norm")


def test_batches_do_not_matter(world: World) -> None:
    """An item's answer is its own, whatever it is padded beside."""
    for model, task in ((world.t5, "flan_t5_glue_sst2"), (world.llama, "first_colour")):
        alone, together = (scores(model, world, task, batch_size=size, limit=20)[task]["items"] for size in (1, 20))
        assert alone == together


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
def test_adapters_are_measured_as_peft_merges_them(world: World, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    made = get_peft_model(t5(world.t5), LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.mul_(4)
    made.save_pretrained(tmp_path / "lora")
    merged = PeftModel.from_pretrained(t5(world.t5), tmp_path / "lora").merge_and_unload()
    docs = world.docs["sst2"]
    texts = written(merged, world.t5, [language.prompt_sst2(doc) for doc in docs])
    right = [float(text == ("negative", "positive")[doc["label"]]) for text, doc in zip(texts, docs, strict=True)]
    told = scores(tmp_path / "lora", world, "flan_t5_glue_sst2", base=world.t5)["flan_t5_glue_sst2"]
    assert told["items"] == right
    assert told["items"] != scores(world.t5, world, "flan_t5_glue_sst2")["flan_t5_glue_sst2"]["items"]
    with pytest.raises(UsageError, match="is a PEFT adapter: its base must be named"):
        scores(tmp_path / "lora", world, "flan_t5_glue_sst2")


def test_a_merge_as_an_adapter_is_measured_like_the_merge(world: World, tmp_path: Path) -> None:
    expert = copy(world.t5, tmp_path / "expert", lambda s: s["encoder.block.0.layer.0.SelfAttention.v.weight"].mul_(-1))
    for words in ([], ["--as-lora", "0.9999"]):
        out = tmp_path / f"merged{len(words)}"
        common = ["--scale", "1", "--include", "*SelfAttention.v.weight", "-q", "-o", str(out)]
        assert main(["merge", "task-arithmetic", str(world.t5), str(expert), *common, *words]) == 0
    report = modelmerge.evaluate(
        [tmp_path / "merged0", tmp_path / "merged2"], suite="lm", tasks=["flan_t5_glue_sst2"], base=world.t5,
        include_path=world.tasks,
    )  # fmt: skip
    base, whole, adapter = (model["scores"]["flan_t5_glue_sst2"]["items"] for model in report["models"])
    assert whole == adapter != base


# The published templates, with the columns in the order of their places, and the labels' words.
PUBLISHED: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "cola": (
        ("sentence",),
        'Indicate if the following sentence is grammatically correct or not: "{}". '
        "Answere 'acceptable' or 'unacceptable'.",
        ("unacceptable", "acceptable"),
    ),
    "mnli": (
        ("premise", "hypothesis"),
        "Does the premise: '{}' logically imply, contradict, or is neutral to the hypothesis: '{}'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'.",
        ("entailment", "neutral", "contradiction"),
    ),
    "mrpc": (
        ("sentence1", "sentence2"),
        "Are the following sentences '{}' and '{}' conveying the same meaning? Answere with 'yes' or 'no'.",
        ("no", "yes"),
    ),
    "qnli": (
        ("sentence", "question"),
        "Given the context: '{}', does the question '{}' have an answer based on the information provided? "
        "Answer with 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "qqp": (
        ("question1", "question2"),
        "Do the questions '{}' and '{}' have the same intent? Answere with 'yes' or 'no'.",
        ("no", "yes"),
    ),
    "rte": (
        ("sentence1", "sentence2"),
        "Does the text: '{}' entail that '{}' is true? Provide 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "sst2": (
        ("sentence",),
        "Given the sentence '{}', determine the sentiment. Is it positive or negative?",
        ("negative", "positive"),
    ),
    "stsb": (
        ("sentence1", "sentence2"),
        "Consider the sentences '{}' and '{}'. On a scale from 1 (completely different) to 5 (completely similar), "
        "rate the similarity.",
        ("0.0", "3.8", "5.0"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_and_labels_of_glue(name: str, tmp_path: Path) -> None:
    """Quotes, braces and lines of a sentence stay as they are."""
    columns, template, words = PUBLISHED[name]
    texts = ['It\'s "odd" &amp; {{braces}}\n  in <two> lines ', "B"][: len(columns)]
    labels = range(len(words)) if name != "stsb" else (0.0, 3.799999952316284, 5.0)
    docs = [dict(zip(columns, texts, strict=True)) | {"label": label} for label in labels]
    local_task(
        tmp_path / "tasks", name, docs, include=f"flan_t5_glue_{name}.yaml", dataset_name=None,
        validation_split="validation",
    )  # fmt: skip
    (task,) = lm.load_tasks([name], lm.Settings(include_path=tmp_path / "tasks", metrics={}), _Silent())
    (part,) = task.parts
    assert [part.doc_to_text(each) for each in part.eval_docs] == [template.format(*texts)] * len(docs)
    assert tuple(map(part.doc_to_target, part.eval_docs)) == words


def test_the_group_of_glue(tmp_path: Path) -> None:
    for name, (columns, _, words) in PUBLISHED.items():
        docs = [dict.fromkeys(columns, "A") | {"label": 1.0 if name == "stsb" else len(words) - 1}]
        own = f"flan_t5_glue_{name}"
        local_task(tmp_path, own, docs, include=f"{own}.yaml", dataset_name=None, validation_split="validation")
    settings = lm.Settings(include_path=tmp_path, metrics={})
    harness = lm.Harness(lm.load_tasks(["flan_t5_glue"], settings, _Silent()), settings, "cpu", _Silent())
    assert harness.experts() == {f"flan_t5_glue_{name}": name for name in PUBLISHED}
    assert [harness.items(task) for task in harness.tasks] == [1] * 8


class _Silent:
    """A progress that keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = 0

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        self.total = total

    def begin(self, item: str) -> None:
        pass

    def advance(self, amount: int, item: str) -> None:
        self.done += amount

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_data_of_glue_are_those_of_the_harness() -> None:
    """The data set, subset and split that its own tasks of that name read; stsb, which it lacks, like the others."""
    import lm_eval

    for name in PUBLISHED:
        ours = yaml.safe_load((TASKS / f"flan_t5_glue_{name}.yaml").read_text().replace("!function ", ""))
        ours = yaml.safe_load((TASKS / ours["include"]).read_text()) | ours
        file = Path(lm_eval.__file__).parent / "tasks" / "glue" / name / "default.yaml"
        theirs = (
            yaml.safe_load(file.read_text().replace("!function ", ""))
            if name != "stsb"
            else {"dataset_path": "nyu-mll/glue", "dataset_name": "stsb", "validation_split": "validation"}
        )
        for key in ("dataset_path", "dataset_name", "validation_split"):
            assert ours[key] == theirs[key], name
    group = yaml.safe_load((TASKS / "flan_t5_glue.yaml").read_text())
    assert group["task"] == [f"flan_t5_glue_{name}" for name in PUBLISHED]


def test_one_report_for_all(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def forget(state: dict[str, Tensor]) -> None:
        state["encoder.block.1.layer.1.DenseReluDense.wo.weight"].mul_(-2)

    worse = copy(world.t5, tmp_path / "worse", forget)
    words = [worse, "--include-path", world.tasks, "--tasks", "flan_t5_glue_sst2,flan_t5_glue_stsb"]
    words += ["--expert", f"sst2={world.t5}", "--expert", f"stsb={world.t5}"]
    code, out, err = run(capsys, "eval", "lm", *words, "--json")
    report = json.loads(out)
    assert code == 0
    assert err.startswith("note: 2 of 6 scores were measured before"), "the second expert is the first again"
    assert err.count("\n") == 1
    assert report["tasks"] == ["flan_t5_glue_sst2", "flan_t5_glue_stsb"]
    assert report["versions"]["lm_eval"]
    expert, _, merged = report["models"]
    for task in report["tasks"]:
        share = merged["scores"][task]["score"] / expert["scores"][task]["score"]
        assert merged["scores"][task]["normalised"] == pytest.approx(share)
    assert merged["normalised"] < 1.0
    assert report["harness"]["flan_t5_glue_sst2"]["tasks"]["flan_t5_glue_sst2"]["there"] == 60

    (tmp_path / "before.json").write_text(out)
    code, out, err = run(
        capsys, "eval", "lm", *words, "--compare", tmp_path / "before.json", "--fail-under", "normalized=0.999"
    )
    assert code == 1
    assert "--fail-under asks for normalized=0.999" in err
    assert "6 of 6 scores were measured before" in err
    assert "Differences to" in out
    assert "Exact_match, spearman, per cent" in out


@pytest.mark.parametrize(("expert", "by"), [("cola", 0.936), ("cola_lora-16", 0.929)])
def test_without_experts_the_published_ones_serve(
    expert: str, by: float, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy(world.t5, tmp_path / "flan-t5-base")
    copy(world.t5, tmp_path / expert)
    out = tmp_path / "merged"
    assert main(["merge", "average", str(base), str(tmp_path / expert), "-q", "-o", str(out)]) == 0
    capsys.readouterr()
    words = [out, "--include-path", world.tasks, "--json", "--tasks"]
    report = json.loads(run(capsys, "eval", "lm", *words, "flan_t5_glue_sst2,first_colour")[1])
    merged = report["models"][0]
    assert merged["normalised_by_published"] == pytest.approx(merged["scores"]["flan_t5_glue_sst2"]["score"] / by)
    assert report["published"]["model"] == "flan-t5-base"
    assert "not measured here; over flan_t5_glue_sst2" in report["notes"][0]
    report = json.loads(run(capsys, "eval", "lm", *words, "flan_t5_glue_sst2", "--expert", f"sst2={world.t5}")[1])
    assert "published" not in report
    assert "published" not in json.loads(run(capsys, "eval", "lm", *words, "first_colour")[1])


def test_published_scores_are_whole() -> None:
    for base, kinds in lm.publication().items():
        assert {"zero-shot", "lora-experts"} <= kinds.keys(), base
        for scores_ in kinds.values():
            assert list(scores_) == list(PUBLISHED)
            assert all(0.5 < score < 1.0 for score in scores_.values())


def test_the_cache_knows_data_and_settings(world: World, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(world.tasks, tasks)
    config = (tasks / "first_colour.yaml").read_text()
    (tasks / "first_colour.yaml").write_text(config.replace(str(world.tasks), str(tasks)))

    def known(**options: Any) -> bool:
        told = {"include_path": tasks, "tasks": ["first_colour"], **options}
        report = modelmerge.evaluate([world.llama], suite="lm", **told)
        return bool(report["models"][0]["cached"])

    assert not known()
    assert known()
    for options in ({"limit": 10}, {"num_fewshot": 2}, {"metrics": ["acc_norm"]}, {"seed": 3}, {"dtype": "bfloat16"}):
        assert not known(**options), options
        assert known(**options)
    lines = (tasks / "first_colour.jsonl").read_text().splitlines()
    (tasks / "first_colour.jsonl").write_text("\n".join([*lines[1:], lines[0].replace('"gold": ', '"gold":  ')]) + "\n")
    assert not known()
    text = (tasks / "first_colour.yaml").read_text()
    (tasks / "first_colour.yaml").write_text(text.replace("{{text}} first", "{{text}}  first"))
    assert not known()
    (tasks / "beside.py").write_text("")
    assert not known()


def test_items_and_examples_do_not_depend_on_what_ran_before(world: World) -> None:
    options = {"num_fewshot": 2, "limit": 20, "include_path": world.tasks, "cache": False, "tasks": ["first_colour"]}
    alone = modelmerge.evaluate([world.llama], suite="lm", **options)["models"][0]["scores"]
    twice = modelmerge.evaluate([world.llama, f"again={world.llama}"], suite="lm", **options)["models"]
    assert alone == twice[0]["scores"] == twice[1]["scores"]
    other = modelmerge.evaluate([world.llama], suite="lm", seed=5, **options)["models"][0]["scores"]
    assert other != alone, "the seed draws the examples"
    assert len(alone["first_colour"]["items"]) == 20


def test_examples_stand_in_front(world: World) -> None:
    progress = _Silent()
    settings = lm.Settings(include_path=world.tasks, num_fewshot=2, limit=0.05, metrics={})
    (task,) = lm.load_tasks(["first_colour"], settings, progress)
    harness = lm.Harness([task], settings, "cpu", progress)
    from modelmerge.checkpoint.reader import open_checkpoint
    from modelmerge.checkpoint.reference import parse
    from modelmerge.evaluation.model import Model

    seen = Model(open_checkpoint(parse(str(world.llama))), None, torch.device("cpu"))
    assert harness.measure(harness.open(seen), "first_colour").count == 3
    assert harness.items("first_colour") == 9 == progress.done
    prompts = {instance.args[0] for instance in task.parts[0].instances}
    assert {prompt.count("first") for prompt in prompts} == {3}


def group(folder: Path, name: str, tasks: list[str], **told: Any) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": tasks, **told}))


def test_groups_and_tags(world: World, tmp_path: Path) -> None:
    for name, docs in (("small", world.docs["colours"][:10]), ("large", world.docs["colours"][10:50])):
        local_task(
            tmp_path, name, docs, include=str(world.tasks / "first_colour.yaml"), tag="colours"
        )  # fmt: skip
    group(tmp_path, "both", ["small", "large"])
    by_size = {"metric": "acc", "weight_by_size": True}
    group(tmp_path, "pooled", ["small", "large"], aggregate_metric_list=[by_size])
    group(tmp_path, "plain", ["small", "large"], aggregate_metric_list=[by_size | {"weight_by_size": False}])
    group(tmp_path, "nested", ["pooled", "large"])
    told = {"include_path": tmp_path}
    small, large = (scores(world.llama, world, name, **told)[name]["score"] for name in ("small", "large"))
    assert small != large
    assert list(scores(world.llama, world, "both", **told)) == ["small", "large"]
    assert list(scores(world.llama, world, "colours", **told)) == ["large", "small"]
    assert list(scores(world.llama, world, "nested", **told)) == ["pooled", "large"]
    pooled = scores(world.llama, world, "pooled", **told)["pooled"]
    assert (pooled["score"], pooled["count"]) == (pytest.approx((10 * small + 40 * large) / 50), 50)
    assert len(pooled["items"]) == 50
    plain = scores(world.llama, world, "plain", **told)["plain"]
    assert plain["score"] == pytest.approx((small + large) / 2)
    assert plain["stderr"] is None
    assert "items" not in plain
    assert sorted(scores(world.llama, world, "l*", "sm?ll", **told)) == ["large", "small"]
    everything = modelmerge.evaluate([world.llama], suite="lm", include_path=tmp_path)
    assert sorted(everything["tasks"]) == ["large", "small"]


def test_less_is_better_of_perplexity(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    texts = [f"{doc['text']} first {doc['first']}" for doc in world.docs["colours"][:8]]
    metrics = [
        {"metric": name, "aggregation": how, "higher_is_better": False}
        for name, how in (("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))
    ]
    local_task(
        tmp_path, "texts", [{"text": text} for text in texts], output_type="loglikelihood_rolling",
        validation_split="validation", doc_to_text="", doc_to_target="{{text}}", metric_list=metrics,
    )  # fmt: skip
    model, words = LlamaForCausalLM.from_pretrained(world.llama), AutoTokenizer.from_pretrained(world.llama)
    total = 0.0
    for text in texts:
        rows = torch.tensor([[words.eos_token_id, *words(text).input_ids]])
        with torch.no_grad():
            odds = model(rows).logits[0, :-1].log_softmax(-1)
        total += float(odds.gather(1, rows[0, 1:, None]).sum())
    code, out, _ = run(capsys, "eval", "lm", world.llama, "--include-path", tmp_path, "--json")
    told = json.loads(out)["models"][0]
    assert code == 0
    assert told["scores"]["texts"]["score"] == pytest.approx(math.exp(-total / (5 * 8)), rel=1e-5)
    assert told["scores"]["texts"]["lower"] is True
    assert told["average"] is None
    code, out, _ = run(capsys, "eval", "lm", world.llama, "--include-path", tmp_path)
    assert "texts (less is better)" in out


def test_a_correlation_with_what_is_constant_is_none(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def silence(state: dict[str, Tensor]) -> None:
        state["shared.weight"].zero_()

    mute = copy(world.t5, tmp_path / "mute", silence)
    words = [mute, "--include-path", world.tasks, "--tasks", "flan_t5_glue_stsb"]
    code, out, _ = run(capsys, "eval", "lm", *words, "--json")
    told = json.loads(out)["models"][0]
    assert code == 0
    assert told["scores"]["flan_t5_glue_stsb"]["score"] is None
    assert told["scores"]["flan_t5_glue_stsb"]["figures"] == {"spearman,none": None}
    assert told["average"] is None
    code, out, err = run(capsys, "eval", "lm", *words, "--fail-under", "avg=0.1")
    assert code == 1
    assert "n/a" in out
    assert "'mute' has n/a" in err


def test_numbers_are_read_from_text() -> None:
    from modelmerge.evaluation.spearman import pair, rho

    texts = ["3.8", " 2", "four", "nan", "inf", ""]
    pairs = [pair({"label": 1.26}, [text])["spearman"] for text in texts]
    assert [number for number, _ in pairs] == [3.8, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert {label for _, label in pairs} == {1.3}
    assert rho([(1.0, 2.0), (5.0, 3.0), (5.0, 9.0)]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(rho(pairs))
    with pytest.raises(ValueError, match="hidden"):
        pair({"label": -1.0}, ["1"])


def test_a_model_that_gives_nan_is_an_error(world: World, tmp_path: Path) -> None:
    def overflow(state: dict[str, Tensor]) -> None:
        state["model.norm.weight"].fill_(float("inf"))
        state["model.norm.weight"][0] = -float("inf")

    broken = copy(world.llama, tmp_path / "broken", overflow)
    with pytest.raises(CheckpointError, match="'broken' gives NaN"):
        scores(broken, world, "first_colour")


def _wrong(world: World, tmp_path: Path) -> dict[str, tuple[Path, str, str]]:
    """By what is wrong: the model, the task, what the error says."""
    llama = world.llama
    (tmp_path / "bare").mkdir()
    shutil.copy(llama / "model.safetensors", tmp_path / "bare")
    untold = copy(llama, tmp_path / "untold")
    for file in untold.glob("token*"):
        file.unlink()

    def lose(state: dict[str, Tensor]) -> None:
        del state["model.layers.1.mlp.up_proj.weight"]

    def widen(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 32)

    def add(state: dict[str, Tensor]) -> None:
        state["score.weight"] = torch.zeros(2, 32)

    def cut(state: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][:5].clone()

    colour, up = "first_colour", "'model.layers.1.mlp.up_proj.weight'"
    vision = copy(llama, tmp_path / "v", model_type="clip", architectures=["CLIPModel"])
    classifier = copy(llama, tmp_path / "c", architectures=["LlamaForSequenceClassification"])
    few_words = copy(llama, tmp_path / "t", cut, vocab_size=5)
    return {
        "no encoder": (llama, "flan_t5_glue_sst2", "is for encoder-decoder models such as Flan-T5"),
        "vision": (vision, colour, "CLIPModel, model_type 'clip'"),
        "classifier": (classifier, colour, "is no language model"),
        "no config": (tmp_path / "bare", colour, "of no architecture"),
        "lone file": (llama / "model.safetensors", colour, "is no directory with a config"),
        "missing": (copy(llama, tmp_path / "m", lose), colour, f"on random weights: the checkpoint lacks {up}"),
        "shape": (copy(llama, tmp_path / "s", widen), colour, f"has another shape for {up}"),
        "extra": (copy(llama, tmp_path / "e", add), colour, "has no place for 'score.weight'"),
        "tokenizer": (few_words, colour, "its tokenizer has 10 words, and its embedding 5 rows"),
        "no tokenizer": (untold, colour, "holds no tokenizer"),
    }


WRONG = (
    "no encoder", "vision", "classifier", "no config", "lone file", "missing", "shape", "extra", "tokenizer",
    "no tokenizer",
)  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_model_is_an_error(what: str, world: World, tmp_path: Path) -> None:
    model, task, says = _wrong(world, tmp_path)[what]
    with pytest.raises((UsageError, ReferenceNotFound, CheckpointError)) as caught:
        scores(model, world, task)
    assert says in str(caught.value)
    assert caught.value.hint


def test_the_tokenizer_of_the_base_serves(world: World, tmp_path: Path) -> None:
    untold = copy(world.llama, tmp_path / "untold")
    for file in untold.glob("token*"):
        file.unlink()
    report = modelmerge.evaluate(
        [untold], suite="lm", tasks=["first_colour"], include_path=world.tasks, base=world.llama
    )  # fmt: skip
    base, own = (model["scores"]["first_colour"] for model in report["models"])
    assert base["items"] == own["items"]


CHOICE = {
    "output_type": "multiple_choice", "validation_split": "validation", "doc_to_text": "{{text}} first",
    "doc_to_choice": "choices", "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


def test_a_wrong_task_is_an_error(world: World, tmp_path: Path) -> None:
    doc = world.docs["colours"][0]
    local_task(tmp_path, "empty", [], **CHOICE)
    local_task(tmp_path, "hidden", [doc, doc | {"gold": -1}], **CHOICE)
    local_task(tmp_path, "beyond", [doc, doc | {"gold": 3}], **CHOICE)
    local_task(tmp_path, "columns", [doc], **CHOICE | {"doc_to_text": "{{prompt}} first"})
    local_task(tmp_path, "split", [doc], **CHOICE | {"validation_split": "test"})
    local_task(
        tmp_path, "masked", [{"sentence": "a", "label": -1}], include="flan_t5_glue_sst2.yaml", dataset_name=None
    )
    local_task(tmp_path, "gone", [doc], **CHOICE)
    (tmp_path / "gone.jsonl").unlink()
    told = {
        "empty": "task 'empty'", "hidden": "the label of item 1 is -1, of 3 choices",
        "beyond": "the label of item 1 is 3, of 3 choices", "columns": "'prompt' is undefined",
        "split": "task 'split' cannot be loaded: KeyError: 'test'", "masked": "'hidden_label' is undefined",
        "gone": "task 'gone' cannot be loaded: FileNotFoundError", "first_color": "there is no task 'first_color'",
    }  # fmt: skip
    for name, says in told.items():
        if name == "first_color":
            continue
        with pytest.raises(ModelMergeError) as caught:
            scores(world.t5 if name == "masked" else world.llama, world, name, include_path=tmp_path)
        assert says in str(caught.value), name
        assert caught.value.hint


def test_a_task_whose_items_are_all_left_out_is_an_error(world: World, tmp_path: Path) -> None:
    (tmp_path / "filters.py").write_text("def none(docs):\n    return docs.filter(lambda doc: False)\n")
    local_task(tmp_path, "filtered", world.docs["colours"], **CHOICE)
    file = tmp_path / "filtered.yaml"
    file.write_text(file.read_text() + "process_docs: !function filters.none\n")
    with pytest.raises(ModelMergeError, match="task 'filtered' has no items"):
        scores(world.llama, world, "filtered", include_path=tmp_path)


def test_code_runs_only_when_it_is_asked_for(world: World, tmp_path: Path) -> None:
    """Not the model's code, and not the task's own either."""
    trace = tmp_path / "trace"
    (tmp_path / "judge.py").write_text(
        f"open({str(trace)!r}, 'a').write('imported ')\n"
        f"def judge(doc, results):\n    open({str(trace)!r}, 'a').write('ran ')\n    return {{'acc': 1.0}}\n"
    )
    local_task(tmp_path, "coding", world.docs["colours"][:2], **CHOICE | {"unsafe_code": True, "tag": "code"})
    file = tmp_path / "coding.yaml"
    file.write_text(file.read_text() + "process_results: !function judge.judge\n")
    group(tmp_path, "all_code", ["coding"])
    for name in ("coding", "code", "all_code", "cod*"):
        with pytest.raises(UsageError, match="task 'coding' runs code that the model writes") as caught:
            scores(world.llama, world, name, include_path=tmp_path)
        assert "confirm_run_unsafe_code" in str(caught.value.hint)
        assert not trace.exists()
    told = scores(world.llama, world, "all_code", include_path=tmp_path, confirm_run_unsafe_code=True)
    assert told["coding"]["score"] == 1.0
    assert trace.read_text() == "imported ran ran "


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--limit", "0"], "--limit 0 is no number of items"),
        (["--limit", "2.5"], "--limit 2.5 is no number of items"),
        (["--num-fewshot", "-1"], "--num-fewshot must be at least 0, not -1"),
        (["--batch-size", "many"], "--batch-size 'many' is no batch size"),
        (["--metric", "first_colour="], "names no metric"),
        (["--metric", "f1"], "task 'first_colour' has no 'f1'"),
        (["--include-path", "nowhere"], "nowhere is no directory"),
    ],
)
def test_wrong_options(words: list[str], says: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "eval", "lm", world.llama, "--include-path", world.tasks, "--tasks", "first_colour", *words
    )
    assert (code, out) == (2, "")
    assert says in err
    assert "hint:" in err or "must be at least" in err


def test_a_file_that_is_no_task_is_named(world: World, tmp_path: Path) -> None:
    local_task(tmp_path, "fine", world.docs["colours"][:3], **CHOICE)
    (tmp_path / "broken.yaml").write_text("task: [broken\n")
    assert list(scores(world.llama, world, "fine", include_path=tmp_path)) == ["fine"]
    with pytest.raises(ModelMergeError, match=r"there is no task 'broken', and .*broken\.yaml cannot be read"):
        _without_stock(tmp_path, "broken")


def _without_stock(folder: Path, name: str) -> None:
    """Ask for a task that is nowhere, without the seconds that reading the harness's own takes."""
    index = lm_tasks._Index(folder)
    index._whole = True
    index.resolve([name])


def test_a_misspelt_task_is_told_its_likes(world: World) -> None:
    with pytest.raises(UsageError, match="there is no task 'first_color'") as caught:
        _without_stock(world.tasks, "first_color")
    assert str(caught.value.hint).startswith("did you mean first_colour")
    with pytest.raises(UsageError, match="no task is named"):
        modelmerge.evaluate([world.llama], suite="lm")


def test_what_is_cut_off_is_said(world: World, tmp_path: Path) -> None:
    long = [doc | {"text": " ".join([doc["text"]] * 40)} for doc in world.docs["colours"][:4]]
    local_task(tmp_path, "long", long, **CHOICE)
    progress = _Silent()
    scores(world.llama, world, "long", include_path=tmp_path, progress=progress)
    assert any("lm-evaluation-harness: " in note and "truncat" in note.lower() for note in progress.notes)
    quiet = _Silent()
    scores(world.llama, world, "first_colour", progress=quiet)
    assert quiet.notes == []


def test_the_terminal_gets_the_report_and_nothing_else(world: World, tmp_path: Path) -> None:
    """In a process of its own: nothing that libraries print, on either stream."""
    words = ["eval", "lm", str(world.t5), "--include-path", str(world.tasks), "--tasks", "flan_t5_glue_sst2", "-q"]
    done = subprocess.run([sys.executable, "-m", "modelmerge", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert 0.6 < float(done.stdout) < 1.0


def test_without_the_extra_it_is_named(world: World) -> None:
    done = script(
        "import sys\n"
        "sys.modules['lm_eval'] = None\n"
        "from modelmerge.cli import main\n"
        f"sys.exit(main(['eval', 'lm', {str(world.t5)!r}, '--tasks', 'flan_t5_glue']))\n"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: eval lm needs lm_eval, which is not installed")
    assert 'pip install "lm-eval[hf]>=0.4.12"' in done.stderr


@pytest.mark.slow  # reading the harness's 14,000 tasks takes it ten seconds
def test_tasks_of_the_harness_by_name(world: World) -> None:
    with pytest.raises(ModelMergeError, match="task 'arc_easy' cannot be loaded"):
        scores(world.llama, world, "arc_easy")  # its data are on the Hub, and this one has none
    with pytest.raises(UsageError, match="task 'humaneval' runs code that the model writes"):
        scores(world.llama, world, "humaneval")
    with pytest.raises(UsageError, match="there is no task 'hellaswagg'") as caught:
        scores(world.llama, world, "hellaswagg")
    assert "hellaswag" in str(caught.value.hint)


def test_the_page_of_a_run_shows_its_scores(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a real browser."""
    if chromium.PROGRAM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    words = [
        world.llama,
        f"again={world.llama}",
        "--tasks",
        "first_colour",
        "--include-path",
        world.tasks,
        "--limit",
        20,
    ]
    files = ["--report", tmp_path / "run.html", "--report", tmp_path / "run.md", "--json"]
    code, out, _ = run(capsys, "eval", "lm", *words, *files)
    assert code == 0
    score = json.loads(out)["models"][0]["scores"]["first_colour"]
    text = f"{100 * score['score']:.1f} ±{100 * score['stderr']:.1f}"
    with chromium.browser() as browser:
        browser.open(tmp_path / "run.html")
        assert browser.complaints() == []
        head = browser.ask("document.querySelector('h1').textContent")
        assert head == f"llama {text} % is the best of 2 at first_colour"
        assert "again" in browser.ask("document.querySelector('.conclusion').textContent"), "which is as good"
        assert browser.ask("[...document.querySelectorAll('.bars .value')].map(v => v.textContent)") == [text] * 2
        settings = browser.ask("document.querySelector('dl').textContent")
        assert "harness" in settings
    assert f"| **{text}** |" in (tmp_path / "run.md").read_text()
