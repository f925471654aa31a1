"""eval clip: figures equal transformers' own, classes go by their names, and nothing wrong passes in silence."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import modelmerge
from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.cli import main
from modelmerge.errors import CheckpointError, ModelMergeError, UsageError
from modelmerge.evaluation import clip as suite
from modelmerge.evaluation import clip_models as clip
from modelmerge.evaluation import image_data, image_tasks
from modelmerge.evaluation.image_data import Items
from modelmerge.evaluation.image_tasks import Task
from modelmerge.evaluation.model import Model
from tests.support import clip_models
from tests.support.checkpoints import base_state, write
from tests.support.hub_server import FakeHub

CPU = torch.device("cpu")
PROMPTED = [name.replace("_", " ") for name in clip_models.COLOURS]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return clip_models.trained()


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_models.save(model, tmp_path_factory.mktemp("clip") / "base")


@pytest.fixture(scope="module")
def worse(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a vision tower that errs on many images."""
    other = clip_models.untrained()
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in other.vision_model.parameters():
            tensor += 0.12 * torch.randn(tensor.shape, generator=generator)
    return clip_models.save(other, tmp_path_factory.mktemp("clip") / "worse")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_models.folder(tmp_path_factory.mktemp("images") / "colours")


def parts(directory: Path, name: str | None = None) -> clip.Parts:
    config = json.loads((directory / "config.json").read_bytes())
    tensors = load_file(directory / "model.safetensors")
    return clip.Parts(name=name or directory.name, tensors=tensors, config=config, directory=directory)


def scored(directory: Path, items: Items, head: clip.Head) -> Any:
    return suite.measure(
        clip.classifier(clip.read_tower(parts(directory)), head, CPU), head, items, directory.name, batch=7
    )


def by_transformers(directory: Path, files: list[Path], prompts: list[str]) -> Tensor:
    """Probabilities [N, C], by CLIPModel and its processor."""
    from PIL import Image
    from transformers import CLIPModel, CLIPTokenizer

    whole = CLIPModel.from_pretrained(directory).eval()
    text = CLIPTokenizer.from_pretrained(directory)(prompts, padding=True, return_tensors="pt")
    pixels = clip_models.processor()([Image.open(file) for file in files], return_tensors="pt")
    with torch.no_grad():
        return whole(**text, **pixels).logits_per_image.softmax(dim=-1)


def files_of(images: Path) -> tuple[list[Path], list[int]]:
    """The images in the order of the data set, and their classes' places in it: folders in alphabetical order."""
    folders = sorted(path for path in images.iterdir())
    files = [(file, i) for i, each in enumerate(folders) for file in sorted(each.iterdir())]
    return [file for file, _ in files], [label for _, label in files]


def test_the_fixture_is_far_above_chance(base: Path, images: Path) -> None:
    items = image_data.load(image_tasks.own_task(str(images)))
    head = clip.make_head(parts(base), items.classes, items.task.templates)
    score = scored(base, items, head)
    assert score.count == 6 * 8
    assert score.value > 0.9
    assert score.metric == "accuracy"


def test_each_item_is_judged_as_transformers_does(worse: Path, images: Path) -> None:
    items = image_data.load(image_tasks.own_task(str(images)))
    head = clip.make_head(parts(worse), items.classes, items.task.templates)
    score = scored(worse, items, head)
    files, labels = files_of(images)
    prompts = [f"a photo of a {folder.replace('_', ' ')}." for folder in sorted(clip_models.COLOURS)]
    expected = by_transformers(worse, files, prompts)
    right = (expected.argmax(dim=-1) == torch.tensor(labels)).float()
    assert 0.2 < right.mean() < 0.95, "a test in which all is right or wrong tells little"
    assert score.items == tuple(right.tolist())
    assert score.value == pytest.approx(right.mean().item())
    assert score.stderr == pytest.approx(right.std().item() / len(right) ** 0.5)
    classifier = clip.classifier(clip.read_tower(parts(worse)), head, CPU)
    with torch.no_grad():
        ours = torch.cat([classifier(pixels).softmax(dim=-1) for pixels, _ in suite.batches(items, head, 7)])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_several_prompts_are_averaged_as_unit_vectors(base: Path) -> None:
    templates = ("a photo of a {}.", "a {} thing", "see the {}")
    head = clip.make_head(parts(base), PROMPTED, templates)
    from transformers import CLIPModel, CLIPTokenizer

    whole, tokenizer = CLIPModel.from_pretrained(base).eval(), CLIPTokenizer.from_pretrained(base)
    for i, name in enumerate(PROMPTED):
        embeddings = []
        for template in templates:
            with torch.no_grad():
                text = tokenizer(template.replace("{}", name), return_tensors="pt")
                embedding = whole.text_projection(whole.text_model(**text).pooler_output)[0]
            embeddings.append(embedding / embedding.norm())
        mean = torch.stack(embeddings).mean(dim=0)
        torch.testing.assert_close(head.weight[i], mean / mean.norm(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_vision_tower_alone_is_enough_once_the_head_is_kept(
    base: Path, worse: Path, images: Path, tmp_path: Path, prefixed: bool
) -> None:
    from transformers import CLIPModel

    tower = clip_models.save_vision(CLIPModel.from_pretrained(worse), tmp_path / "tower", prefixed=prefixed)
    items = image_data.load(image_tasks.own_task(str(images)))
    task = items.task
    with pytest.raises(UsageError, match="'tower' has no text tower to make the text head of 'colours' with"):
        clip.find_head(task, items.classes, parts(tower), tmp_path / "heads")
    made = clip.find_head(task, items.classes, parts(base), tmp_path / "heads")
    kept = clip.find_head(task, items.classes, None, tmp_path / "heads")
    assert torch.equal(kept.weight, made.weight)
    assert scored(tower, items, kept).items == scored(worse, items, made).items


def test_a_head_in_another_order_is_put_in_order(base: Path, images: Path, tmp_path: Path) -> None:
    items = image_data.load(image_tasks.own_task(str(images)))
    right = clip.make_head(parts(base), items.classes, items.task.templates)
    # The same classes, spelt otherwise, the other way round: by place every answer would be wrong.
    turned = dataclasses.replace(
        right, classes=tuple(name.upper().replace(" ", "_") for name in reversed(right.classes)),
        weight=right.weight.flip(0).contiguous(),
    )  # fmt: skip
    clip.write_head(turned, tmp_path / "colours.safetensors")
    found = clip.find_head(items.task, items.classes, None, tmp_path)
    assert torch.equal(found.weight, right.weight)
    assert scored(base, items, found).value == scored(base, items, right).value > 0.9


def test_a_head_of_other_classes_or_prompts_is_refused(base: Path, images: Path, tmp_path: Path) -> None:
    items = image_data.load(image_tasks.own_task(str(images)))
    clip.write_head(
        clip.make_head(parts(base), [*items.classes[:-1], "pink"], items.task.templates),
        tmp_path / "colours.safetensors",
    )
    with pytest.raises(ModelMergeError, match="only the task has 'yellow'; only the head has 'pink'"):
        clip.find_head(items.task, items.classes, None, tmp_path)
    clip.write_head(clip.make_head(parts(base), items.classes, ("a {}",)), tmp_path / "colours.safetensors")
    with pytest.raises(ModelMergeError, match="made with other prompts"):
        clip.find_head(items.task, items.classes, None, tmp_path)
    (tmp_path / "colours.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"colours.safetensors: no text head"):
        clip.find_head(items.task, items.classes, None, tmp_path)


def test_the_cache_knows_heads_by_their_source_classes_and_prompts(base: Path, worse: Path, images: Path) -> None:
    items = image_data.load(image_tasks.own_task(str(images)))
    one = clip.find_head(items.task, items.classes, parts(base), None, "one")
    again = clip.find_head(items.task, items.classes, None, None, "one")
    assert torch.equal(one.weight, again.weight)
    with pytest.raises(UsageError, match="there is no text tower"):
        clip.find_head(items.task, items.classes, None, None, "two")
    other = image_tasks.with_templates(items.task, ["the {}"])
    with pytest.raises(UsageError, match="there is no text tower"):
        clip.find_head(other, items.classes, None, None, "one")


def test_class_names_from_a_file_go_by_their_words(base: Path, images: Path, tmp_path: Path) -> None:
    plain = image_data.load(image_tasks.own_task(str(images)))
    names = tmp_path / "names.txt"
    names.write_text("White\nviolet\nGREEN-leaf\n\nred\nblue\nyellow\n")  # in no order
    items = image_data.load(image_tasks.own_task(str(images), classes=names))
    assert items.classes == ("blue", "GREEN-leaf", "red", "violet", "White", "yellow")
    assert torch.equal(items.labels, plain.labels)
    names.write_text(json.dumps({name: f"{name}ish" for name in clip_models.COLOURS}))
    assert image_data.load(image_tasks.own_task(str(images), classes=names)).classes[0] == "blueish"
    names.write_text("white\nviolet\nGREEN-leaf\tgrass green\nred\nblue\nyellow\n")
    assert image_data.load(image_tasks.own_task(str(images), classes=names)).classes[1] == "grass green"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("red\nblue\n", "only the data set has 'green_leaf', 'violet', 'white', 'yellow'"),
        ("red\nblue\nyellow\nviolet\nwhite\ngreen leaf\npink", "only the file has 'pink'"),
        ("red\nred\nblue\nyellow\nviolet\nwhite", "two classes of the file are called 'red'"),
        ('{"red": "red"}', "only the data set has 'blue'"),
        ("", "no list of names"),
        ("[1, 2]", "no list of names"),
        ("[1, 2", "not valid JSON"),
    ],
)
def test_class_names_that_are_not_the_data_sets_are_refused(
    content: str, says: str, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "names"
    file.write_text(content)
    with pytest.raises(ModelMergeError) as caught:
        image_data.load(image_tasks.own_task(str(images), classes=file))
    assert says in caught.value.message


def test_a_data_set_with_a_class_missing_is_refused(tmp_path: Path) -> None:
    images = clip_models.folder(tmp_path / "images", each=2, leave_out=("blue",))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(clip_models.COLOURS))
    with pytest.raises(ModelMergeError, match="only the file has 'blue'"):
        image_data.load(image_tasks.own_task(str(images), classes=names))


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelMergeError, match="it is empty"):
        image_data.load(image_tasks.own_task(str(empty)))
    import pandas

    pandas.DataFrame({"image": [], "label": []}).to_parquet(empty / "none.parquet")
    with pytest.raises(ModelMergeError, match="it is empty"):
        image_data.load(image_tasks.own_task(str(empty / "none.parquet")))


def test_what_is_no_data_set_is_refused(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ModelMergeError, match="no such file or directory"):
        image_data.load(image_tasks.own_task("./nowhere"))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ModelMergeError, match="it cannot be read"):
        image_data.load(image_tasks.own_task(str(tmp_path / "text.parquet")))
    with pytest.raises(ModelMergeError, match="has no split 'validation'") as caught:
        image_data.load(image_tasks.own_task(str(images), split="validation"))
    assert "train" in str(caught.value.hint)
    with pytest.raises(UsageError, match="limit must be at least 1, not 0"):
        image_data.load(image_tasks.own_task(str(images)), limit=0)


def test_an_image_that_cannot_be_decoded_is_named(base: Path, tmp_path: Path) -> None:
    images = clip_models.folder(tmp_path / "images", each=2)
    (images / "blue" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    items = image_data.load(image_tasks.own_task(str(images)))
    head = clip.make_head(parts(base), items.classes, items.task.templates)
    with pytest.raises(ModelMergeError, match="item 1 is no image"):
        scored(base, items, head)


def parquet(file: Path, images: Path, label: Any, **columns: Any) -> Path:
    """As another tool writes it: bytes of images, no word of what a column is."""
    import pandas

    files, places = files_of(images)
    names = sorted(clip_models.COLOURS)
    pandas.DataFrame(
        {
            "picture": [{"bytes": f.read_bytes(), "path": None} for f in files],
            "kind": [label(names[i], i) for i in places],
            **columns,
        }
    ).to_parquet(file)
    return file


def test_parquet_with_names_or_numbers_gives_the_same_figures(worse: Path, images: Path, tmp_path: Path) -> None:
    whole = image_data.load(image_tasks.own_task(str(images)))
    head = clip.make_head(parts(worse), whole.classes, whole.task.templates)
    expected = scored(worse, whole, head)
    named = image_data.load(
        image_tasks.own_task(str(parquet(tmp_path / "named.parquet", images, lambda name, i: name)))
    )
    assert named.classes == whole.classes
    assert scored(worse, named, head).items == expected.items
    file = parquet(tmp_path / "numbered.parquet", images, lambda name, i: i)
    with pytest.raises(ModelMergeError, match="numbers without names"):
        image_data.load(image_tasks.own_task(str(file)))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(sorted(clip_models.COLOURS)))
    numbered = image_data.load(image_tasks.own_task(str(file), classes=names))
    assert scored(worse, numbered, head).items == expected.items
    assert "taken for places" in numbered.notes[0]
    names.write_text("blue\nred")
    with pytest.raises(ModelMergeError, match="6 numbers from 0 to 5, and there are 2 class names"):
        image_data.load(image_tasks.own_task(str(file), classes=names))


def test_columns_are_found_or_named(images: Path, tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", images, lambda name, i: name, shade=["a"] * 48)
    with pytest.raises(ModelMergeError, match="more than one column of labels") as caught:
        image_data.load(image_tasks.own_task(str(file)))
    assert "label_column" in str(caught.value.hint)
    assert len(image_data.load(image_tasks.own_task(str(file), label="kind")).classes) == 6
    with pytest.raises(ModelMergeError, match="no column 'sort'"):
        image_data.load(image_tasks.own_task(str(file), label="sort"))


def test_items_without_a_label_are_refused(images: Path, tmp_path: Path) -> None:
    file = parquet(tmp_path / "x.parquet", images, lambda name, i: -1 if i == 0 else i)
    with pytest.raises(ModelMergeError, match="item 0 has no label"):
        image_data.load(image_tasks.own_task(str(file)))


def test_a_limit_draws_by_the_seed(images: Path) -> None:
    task = image_tasks.own_task(str(images))
    some, again, other = (image_data.load(task, limit=10, seed=seed) for seed in (0, 0, 1))
    whole = image_data.load(task)
    assert some.ids == again.ids != other.ids
    assert len(some.ids) == len(set(some.ids)) == len(some.labels) == 10
    assert some.total == whole.total == 48
    for place in range(10):
        assert some.labels[place] == whole.labels[int(some.ids[place])]
        assert some.image(place).tobytes() == whole.image(int(some.ids[place])).tobytes()


def test_classes_without_items_are_told(tmp_path: Path, images: Path) -> None:
    file = parquet(tmp_path / "x.parquet", images, lambda name, i: min(i, 3))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(sorted(clip_models.COLOURS)))
    items = image_data.load(image_tasks.own_task(str(file), classes=names))
    assert len(items.classes) == 6
    assert any("no item of 2 of its 6 classes: 'white', 'yellow'" in note for note in items.notes)


def test_models_that_are_not_clip_or_not_whole_are_refused(base: Path, images: Path, tmp_path: Path) -> None:
    items = image_data.load(image_tasks.own_task(str(images)))
    head = clip.make_head(parts(base), items.classes, items.task.templates)
    whole = parts(base)
    other = dataclasses.replace(whole, config={"model_type": "llama"})
    with pytest.raises(ModelMergeError, match="'base' is a llama model, not CLIP"):
        clip.classifier(clip.read_tower(other), head, CPU)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    lacking = {n: t for n, t in whole.tensors.items() if n != name}
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{name}'"):
        clip.classifier(clip.read_tower(dataclasses.replace(whole, tensors=lacking)), head, CPU)
    odd = dict(whole.tensors) | {name: torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match="its config says"):
        clip.classifier(clip.read_tower(dataclasses.replace(whole, tensors=odd)), head, CPU)
    broken = dict(whole.tensors) | {name: whole.tensors[name] * float("nan")}
    model = clip.classifier(clip.read_tower(dataclasses.replace(whole, tensors=broken)), head, CPU)
    with pytest.raises(CheckpointError, match="gives NaN or Inf"):
        suite.measure(model, head, items, "base", batch=64)
    narrow = dataclasses.replace(head, weight=head.weight[:, :8], projection=head.projection[:8])
    with pytest.raises(ModelMergeError, match="is for a tower of 32 in a space of 8"):
        clip.classifier(clip.read_tower(whole), narrow, CPU)
    large = dataclasses.replace(head, processor={**head.processor, "crop_size": {"height": 32, "width": 32}})
    with pytest.raises(ModelMergeError, match="takes images of 16 pixels"):
        clip.classifier(clip.read_tower(whole), large, CPU)
    with pytest.raises(ModelMergeError, match=r"no tokenizer\.json"):
        clip.make_head(dataclasses.replace(whole, directory=tmp_path), items.classes, items.task.templates)
    with pytest.raises(ModelMergeError, match=r"has \d+ tokens, and 'base' reads 40"):
        clip.make_head(whole, ["word " * 20], items.task.templates)


# Through the command line and the verb.


def evaluate(models: list[Any], **options: Any) -> dict[str, Any]:
    return modelmerge.evaluate([str(model) for model in models], suite="clip", device="cpu", **options)


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{row['role']} {row['name']}": row for row in report["models"]}


def test_the_command_prints_the_figures_of_the_core(
    base: Path, worse: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = image_data.load(image_tasks.own_task(str(images)))
    head = clip.make_head(parts(worse), items.classes, items.task.templates)
    expected = scored(worse, items, head)
    words = ["eval", "clip", str(worse), str(base), "--data", str(images), "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    row = rows_of(report)["model worse"]
    assert row["scores"]["colours"]["items"] == list(expected.items)
    assert row["scores"]["colours"]["count"] == 48
    assert report["data"]["colours"]["classes"] == list(items.classes)
    assert report["versions"]["transformers"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "Accuracy, per cent, ± standard error" in out
    assert f"{100 * expected.value:.1f} ±{100 * expected.stderr:.1f}" in out
    assert "2 of 2 scores were measured before" in err
    assert main([*words, "-q", "--no-cache", "--fail-under", "avg=0.9"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_towers_and_adapters_are_completed_by_the_base(base: Path, worse: Path, images: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import CLIPModel

    tower = clip_models.save_vision(CLIPModel.from_pretrained(worse), tmp_path / "tower", prefixed=False)
    torch.manual_seed(4)
    config = LoraConfig(r=4, lora_alpha=40, target_modules=r"vision_model.*(q_proj|fc1)", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for what it renamed
        get_peft_model(CLIPModel.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
        merged = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), tmp_path / "adapter").merge_and_unload()
    report = evaluate([tower, tmp_path / "adapter", worse], base=base, data=[images])
    rows = rows_of(report)
    assert rows["model tower"]["scores"]["colours"]["items"] == rows["model worse"]["scores"]["colours"]["items"]
    assert rows["base base"]["scores"]["colours"]["score"] > 0.9
    clip_models.save(merged, tmp_path / "merged")
    files, labels = files_of(images)
    prompts = [f"a photo of a {folder.replace('_', ' ')}." for folder in sorted(clip_models.COLOURS)]
    right = by_transformers(tmp_path / "merged", files, prompts).argmax(dim=-1) == torch.tensor(labels)
    assert 0.1 < right.float().mean() < 0.98
    assert rows["model adapter"]["scores"]["colours"]["items"] == right.float().tolist()
    with pytest.raises(UsageError, match="'tower' has no text tower"):
        evaluate([tower], data=[images])
    with pytest.raises(UsageError, match="its base must be named"):
        evaluate([tmp_path / "adapter"], data=[images])


def test_kept_heads_make_a_tower_enough_and_are_not_taken_for_another_text_tower(
    base: Path, worse: Path, images: Path, tmp_path: Path
) -> None:
    from transformers import CLIPModel

    heads = tmp_path / "heads"
    whole = evaluate([worse], data=[images], heads=heads)
    assert [file.name for file in heads.iterdir()] == ["colours.safetensors"]
    tower = clip_models.save_vision(CLIPModel.from_pretrained(worse), tmp_path / "tower")
    alone = evaluate([tower], data=[images], heads=heads)
    items = [report["models"][0]["scores"]["colours"]["items"] for report in (whole, alone)]
    assert items[0] == items[1]
    other = clip_models.save(clip_models.untrained(7), tmp_path / "other")
    with pytest.raises(ModelMergeError, match="made with the text tower of 'worse', which is not that of 'other'"):
        evaluate([other], data=[images], heads=heads)


def test_experts_normalise_by_the_task_at_the_end_of_their_names(
    base: Path, worse: Path, images: Path, tmp_path: Path
) -> None:
    expert = shutil.copytree(base, tmp_path / "clip-vit-tiny_colours")
    report = evaluate([worse], data=[images], experts=[str(expert)], fail_under=["normalized=0.99"])
    row = rows_of(report)["model worse"]
    own, best = (r["scores"]["colours"]["score"] for r in (row, rows_of(report)[f"expert {expert.name}"]))
    assert row["normalised"] == pytest.approx(own / best)
    assert not report["gate"]["passed"]


def test_tasks_that_no_expert_is_for_are_marked_unseen(base: Path, worse: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    modelmerge.merge(base, {"colours": worse}, out, method="task-arithmetic", scale=0.5)
    other = clip_models.folder(tmp_path / "others", each=2, seed=9)
    report = evaluate([out], data=[images, other])
    row = report["models"][0]
    assert row["unseen"] == ["others"]
    assert row["average_seen"] == row["scores"]["colours"]["score"]
    assert row["average_unseen"] == row["scores"]["others"]["score"]
    assert any("those it has not seen: others" in note for note in report["notes"])


def test_a_copy_of_a_published_task_has_its_classes_and_prompts_and_published_figures(
    model: Any, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "land"
    official = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    )
    generator = torch.Generator().manual_seed(8)
    for name, colour in zip(official.split(), [*clip_models.COLOURS] * 2, strict=False):
        (folder / name).mkdir(parents=True)
        clip_models.image(colour, generator).save(folder / name / "0.png")
    long = clip_models.untrained(longest=120)
    base = clip_models.save(long, tmp_path / "clip-vit-base-patch32")
    report = evaluate([f"again={base}"], base=base, data=[f"eurosat={folder}", images])
    told = report["data"]["eurosat"]
    assert told["classes"][0] == "annual crop land"
    assert told["classes"][-1] == "lake or sea"
    assert told["templates"] == list(image_tasks.published_tasks(["eurosat"])[0].templates)
    row = rows_of(report)["model again"]
    assert row["normalised_by_published"] == pytest.approx(row["scores"]["eurosat"]["score"] / 0.99)
    assert report["published"]["zero-shot"]["eurosat"] == 0.46
    assert any("not measured here" in note for note in report["notes"])
    assert row["normalised"] is None


def test_the_cache_sees_other_images_classes_prompts_and_limits(base: Path, tmp_path: Path) -> None:
    images = clip_models.folder(tmp_path / "images", each=2, seed=11)

    def known(**options: Any) -> bool:
        return bool(evaluate([base], data=[images], **options)["models"][0]["cached"])

    assert not known()
    assert known()
    assert known(batch_size=3)
    assert not known(limit=5)
    assert not known(limit=5, seed=1)
    assert not known(templates=["the {}"])
    names = tmp_path / "names.json"
    names.write_text(json.dumps({name: name.upper() for name in clip_models.COLOURS}))
    assert not known(classes=names)
    assert not known(cache=False)
    clip_models.image("red", torch.Generator().manual_seed(12)).save(images / "red" / "1.png")
    assert not known()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["MODEL"], 2, "no task is named"),
        (["MODEL", "--task", "sun379"], 2, "did you mean 'sun397'"),
        (["MODEL", "--data", "IMAGES", "--data", "IMAGES"], 2, "two tasks are called 'colours'"),
        (["MODEL", "--task", "mnist", "--split", "test"], 2, "--split has no effect without --data"),
        (["MODEL", "--data", "IMAGES", "--classes", "x=y.txt"], 2, "--classes names 'x', which is no data"),
        (["MODEL", "--data", "IMAGES", "--limit", "0"], 2, "--limit must be at least 1, not 0"),
        (["MODEL", "--data", "IMAGES", "--batch-size", "0"], 2, "--batch-size"),
        (["MODEL", "--data", "IMAGES", "--template", "a photo"], 2, "must hold {} once"),
        (["MODEL", "--data", "./nothing"], 1, "no such file or directory"),
        (["OTHER", "--data", "IMAGES"], 1, "is a tiny model, not CLIP"),
    ],
)
def test_words_and_exit_codes(
    words: list[str], code: int, says: str, base: Path, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = write(tmp_path / "other", base_state())
    places = {"MODEL": str(base), "IMAGES": str(images), "OTHER": str(other)}
    assert main(["eval", "clip", *(places.get(word, word) for word in words)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err


def test_a_merge_of_adapters_or_towers_names_its_base(base: Path, worse: Path, images: Path, tmp_path: Path) -> None:
    linear = {"method": "task-arithmetic", "scale": 0.8, "include": ["vision_model.*proj.weight"]}
    modelmerge.merge(base, [worse], tmp_path / "merged", **linear)
    modelmerge.merge(base, [worse], tmp_path / "adapter", as_lora=32, **linear)
    report = evaluate([tmp_path / "merged", tmp_path / "adapter"], data={"worse": images}, experts={"worse": worse})
    assert [row["role"] for row in report["models"]] == ["base", "expert", "model", "model"]
    rows = rows_of(report)
    told = [rows[f"model {name}"]["scores"]["worse"] for name in ("merged", "adapter")]
    assert told[0]["items"] == told[1]["items"]
    assert told[0]["normalised"] == pytest.approx(told[0]["score"] / rows["expert worse"]["scores"]["worse"]["score"])
    assert [row["role"] for row in evaluate([tmp_path / "merged"], data=[images])["models"]] == ["model"]


def test_reports_on_the_same_items_are_paired(base: Path, worse: Path, images: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(evaluate([f"m={base}"], data=[images], limit=20)))
    report = evaluate([f"m={worse}"], data=[images], limit=20, compare=earlier)
    told = report["comparison"]["models"][0]["tasks"]["colours"]
    assert told["paired"]
    assert told["difference"] < 0.0


def test_of_splits_the_one_for_testing_is_taken(base: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "data" / "test")
    clip_models.folder(tmp_path / "data" / "train", each=1, seed=9)
    assert evaluate([base], data=[tmp_path / "data"])["data"]["data"]["images"] == 48
    assert evaluate([base], data=[tmp_path / "data"], split="train")["data"]["data"]["images"] == 6


@pytest.mark.parametrize("names", [("test_{}.png", "train_{}.png"), ("{}_test.png", "{}_other.png")], ids=str)
def test_a_folder_that_file_names_split_says_so(names: tuple[str, str], images: Path, tmp_path: Path) -> None:
    for file in sorted(images.rglob("*.png")):
        place = tmp_path / "latest" / file.parent.name / names[int(file.stem) > 2].format(file.stem)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    items = image_data.load(image_tasks.own_task(str(tmp_path / "latest")))
    assert items.total == 6 * 3
    assert any(note.endswith("split by the names of its files: 18 of its 48 images are 'test'") for note in items.notes)
    assert not image_data.load(image_tasks.own_task(str(images))).notes


@pytest.mark.parametrize("extra", ["train_0.png", "test.txt"])
def test_a_folder_without_folders_of_classes_is_told_how_folders_are_read(
    extra: str, images: Path, tmp_path: Path
) -> None:
    (tmp_path / extra).write_bytes(b"red/0.png\n" if extra == "test.txt" else (images / "red" / "0.png").read_bytes())
    (tmp_path / "test_1.png").write_bytes((images / "red" / "1.png").read_bytes())
    with pytest.raises(ModelMergeError, match=r"no column of (images|labels)") as caught:
        image_data.load(image_tasks.own_task(str(tmp_path)))
    assert "CLASS/IMAGE or SPLIT/CLASS/IMAGE" in str(caught.value.hint)


def test_settings_of_the_image_processor_are_found_with_those_of_the_whole(base: Path, tmp_path: Path) -> None:
    from transformers import CLIPProcessor

    alone = clip.make_head(parts(base), ["red", "blue"], ["a photo of a {}."])
    newer = shutil.copytree(base, tmp_path / "newer")
    (newer / "preprocessor_config.json").unlink()
    CLIPProcessor(clip_models.processor(), clip_models.tokenizer()).save_pretrained(newer)
    assert not (newer / "preprocessor_config.json").exists()
    whole = clip.make_head(parts(newer), ["red", "blue"], ["a photo of a {}."])
    assert whole.processor == alone.processor
    assert whole.weight.equal(alone.weight)
    # Where both are there, transformers takes the newer one.
    (newer / "preprocessor_config.json").write_text('{"crop_size": 99}')
    assert clip.make_head(parts(newer), ["red"], ["{}"]).processor == alone.processor
    (newer / "processor_config.json").write_text("{}")
    assert clip.make_head(parts(newer), ["red"], ["{}"]).processor == {"crop_size": 99}
    (newer / "preprocessor_config.json").unlink()
    with pytest.raises(ModelMergeError, match=r"processor_config\.json has no image processor"):
        clip.make_head(parts(newer), ["red"], ["{}"])
    (newer / "processor_config.json").unlink()
    with pytest.raises(ModelMergeError, match=r"no preprocessor_config\.json or processor_config\.json beside"):
        clip.make_head(parts(newer), ["red"], ["{}"])


def test_the_figures_do_not_depend_on_where_the_image_processor_is_kept(
    base: Path, worse: Path, images: Path, tmp_path: Path
) -> None:
    from transformers import CLIPProcessor

    newer = shutil.copytree(base, tmp_path / "newer")
    (newer / "preprocessor_config.json").unlink()
    CLIPProcessor(clip_models.processor(), clip_models.tokenizer()).save_pretrained(newer)
    figures = [evaluate([f"m={place}"], data=[images], cache=False)["models"] for place in (base, newer)]
    assert [row["scores"] for row in figures[0]] == [row["scores"] for row in figures[1]]


def test_a_base_in_another_precision_does_not_round_the_model(base: Path, worse: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    half = clip_models.save(CLIPModel.from_pretrained(base).bfloat16(), tmp_path / "half")
    origin, opened = (open_checkpoint(parse(str(place))) for place in (half, worse))
    seen = Model(opened, origin, CPU, onto_base=True)
    for name, tensor in load_file(worse / "model.safetensors").items():
        assert torch.equal(seen[name], tensor), name


def test_data_on_the_hub_are_taken_at_a_commit(
    hub: FakeHub, base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", images, lambda name, i: name)
    commit = hub.add("org/colours", tmp_path)
    first = evaluate([base], data=["org/colours"])
    assert first["data"]["colours"]["images"] == 48
    assert commit in first["data"]["colours"]["identity"]
    fewer = clip_models.folder(tmp_path / "fewer", each=2)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", fewer, lambda name, i: name)
    hub.add("org/colours", {"data/test-00000-of-00001.parquet": next((tmp_path / "data").iterdir()).read_bytes()})
    assert evaluate([base], data=["org/colours"])["data"]["colours"]["images"] == 12
    again = evaluate([base], data=[f"org/colours@{commit}"])
    assert again["models"][0]["scores"] == first["models"][0]["scores"]
    assert again["models"][0]["cached"] == ["colours"]
    with pytest.raises(ModelMergeError, match="data set 'org/nothing'"):
        evaluate([base], data=["org/nothing"])
    with pytest.raises(ModelMergeError, match="has no split 'validation'"):
        evaluate([base], data=["org/colours"], split="validation")


# The published tasks.


def test_the_papers_tasks_have_their_classes_and_prompts() -> None:
    tasks = image_tasks.published_tasks(["clip8"])
    assert [len(task.classes or ()) for task in tasks] == [397, 196, 45, 10, 10, 43, 10, 47]
    assert [len(task.templates) for task in tasks] == [2, 8, 18, 3, 1, 3, 1, 8]
    assert all(text.count("{}") == 1 for task in tasks for text in task.templates)
    assert len(image_tasks.published_tasks(["clip8-ood"])) == 4 * 7
    assert {task.split for task in image_tasks.published_tasks(["eurosat", "eurosat:spatter"])} == {"test", "spatter"}
    assert image_tasks.published_tasks(["tanganke/stanford_cars"]) == image_tasks.published_tasks(["Stanford_Cars"])
    with pytest.raises(UsageError, match="no task 'eurosta'") as caught:
        image_tasks.published_tasks(["eurosta"])
    assert "did you mean 'eurosat'" in str(caught.value.hint)
    with pytest.raises(UsageError, match="named twice"):
        image_tasks.published_tasks(["clip8", "dtd"])


def named(task: str, own: list[str], *, has_names: bool = True) -> tuple[tuple[str, ...], list[str]]:
    (found,) = image_tasks.published_tasks([task])
    return image_tasks.name_classes(found, own, are_names=has_names)


def test_published_names_are_found_however_the_data_set_spells_them() -> None:
    (eurosat,) = image_tasks.published_tasks(["eurosat"])
    published = list(eurosat.classes or ())
    official = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    )
    backwards = official.split()[::-1]
    assert named("eurosat", backwards) == (tuple(published[::-1]), [])
    assert named("eurosat", published[3:] + published[:3])[0] == tuple(published[3:] + published[:3])
    names, notes = named("eurosat", ["Wood", *official.split()[:1], *official.split()[2:]])
    assert names[:2] == ("Wood", "annual crop land")
    assert "prompted by its own names" in notes[0]
    assert "'Wood'" in notes[0]
    (gtsrb,) = image_tasks.published_tasks(["gtsrb"])
    signs = list(gtsrb.classes or ())
    as_text = sorted(map(str, range(43)))  # 0, 1, 10, 11, ...
    assert named("gtsrb", as_text)[0] == tuple(signs[int(name)] for name in as_text)
    assert named("gtsrb", list(map(str, range(43))), has_names=False)[0] == tuple(signs)
    assert named("mnist", list("9876543210"))[0] == tuple("9876543210")
    with pytest.raises(ModelMergeError, match="it has 9 classes, and the task 'eurosat' has 10"):
        named("eurosat", official.split()[:9])
    with pytest.raises(ModelMergeError, match="two of its classes are called 'forest'"):
        named("eurosat", ["Forest", "forest", *official.split()[2:]])


def test_letters_that_differ_in_case_are_different_classes() -> None:
    task = Task(name="letters", data="letters", classes=("b", "A", "a", "B"))
    assert image_tasks.name_classes(task, ["a", "b", "A", "B"], are_names=True)[0] == ("a", "b", "A", "B")


def test_templates_must_hold_the_class() -> None:
    with pytest.raises(UsageError, match=r"must hold \{\} once"):
        image_tasks.own_task("x", templates=["a photo"])


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModelMergeError, match=r"^eval clip needs datasets, which is not installed$") as refused:
        suite.require_extra()
    assert refused.value.hint == 'pip install "datasets>=4" "transformers>=5" pillow'
