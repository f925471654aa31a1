"""eval clip: a tiny CLIP trained on the spot, on folders of images made on the spot; figures against CLIPModel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.cli import main
from modelmerge.errors import CheckpointError, ModelMergeError, UsageError
from modelmerge.suites import clip as suite
from tests.checkpoints import family

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")

# Colour and place of a bright bar: what a class looks like.
LOOKS = {"red_bar": (0, 0), "green_bar": (1, 1), "blue_bar": (2, 2), "white_bar": (slice(None), 3)}


def picture(label: str, generator: torch.Generator) -> torch.Tensor:
    """An image [16, 16, 3] of bytes."""
    channel, place = LOOKS[label]
    image = torch.randint(0, 120, (16, 16, 3), generator=generator)
    image[:, 4 * place : 4 * place + 4, channel] += 110
    return image.to(torch.uint8)


def draw(folder: Path, seed: int, count: int, labels: list[str] | None = None) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for label in labels or list(LOOKS):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(label, generator).numpy()).save(folder / label / f"{i:02}.png")
    return folder


def words(label: str) -> str:
    return f"a photo of a {label.replace('_', ' ')}."


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP model with tokenizer and processor, far above chance on such images."""
    import tokenizers

    directory = tmp_path_factory.mktemp("clip") / "base"
    vocabulary = ["<pad>", "<bos>", "<eos>", "a", "photo", "of", "the", ".", "bar", "red", "green", "blue", "white"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>")
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(directory)
    size = {"height": 16, "width": 16}
    processor: Any = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=size
    )
    processor.save_pretrained(directory)
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, "num_hidden_layers": 1, "vocab_size": len(vocabulary), "max_position_embeddings": 16,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**tower, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}, projection_dim=16,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    generator = torch.Generator().manual_seed(1)
    labels = [label for label in LOOKS for _ in range(24)]
    pixels = processor(
        images=[Image.fromarray(picture(label, generator).numpy()) for label in labels], return_tensors="pt"
    )["pixel_values"]
    texts = fast([words(label) for label in LOOKS], padding=True, return_tensors="pt")
    answers = torch.tensor([list(LOOKS).index(label) for label in labels])
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        logits = model(
            input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=pixels
        ).logits_per_image
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, answers).backward()
        optimiser.step()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / "model.safetensors"
    )
    config.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("images") / "bars", seed=7, count=12)


@pytest.fixture
def noisy(trained: Path, tmp_path: Path) -> Path:
    """The model with its vision tower disturbed, in a file of that tower alone."""
    generator = torch.Generator().manual_seed(3)
    vision = {n: t for n, t in load_file(trained / "model.safetensors").items() if n.startswith("vision_model.")}
    state = {name: tensor + 0.15 * torch.randn(tensor.shape, generator=generator) for name, tensor in vision.items()}
    (tmp_path / "noisy").mkdir()
    save_file(state, tmp_path / "noisy" / "model.safetensors")
    return tmp_path / "noisy"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMERGE_CACHE", str(tmp_path / "cache"))


def evaluate(models: list[Path | str], data: Path, base: Path, **options: Any) -> dict[str, Any]:
    return modelmerge.evaluate(models, suite="clip", data=[str(data)], base=base, **options)


def items(report: dict[str, Any], model: str, task: str = "bars") -> list[float]:
    return next(row for row in report["models"] if row["name"] == model)["scores"][task]["items"]


def direct(base: Path, vision: Path | None, images: Path, names: list[str]) -> list[float]:
    """What CLIPModel itself answers, image by image."""
    state = load_file(base / "model.safetensors") | (load_file(vision / "model.safetensors") if vision else {})
    model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(base))
    model.load_state_dict(state)
    tokens = transformers.AutoTokenizer.from_pretrained(base)(
        [words(name) for name in names], padding=True, return_tensors="pt"
    )
    processor = transformers.AutoImageProcessor.from_pretrained(base)
    right = []
    for label in sorted(LOOKS):
        for file in sorted((images / label).iterdir()):
            pixels = processor(images=Image.open(file), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                logits = model.eval()(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
                ).logits_per_image
            right.append(float(names[int(logits.argmax())] == label))
    return right


def test_figures_are_those_of_the_model_itself(trained: Path, noisy: Path, images: Path) -> None:
    report = evaluate([noisy], images, trained, batch_size=5)
    assert items(report, "base") == direct(trained, None, images, list(LOOKS))
    assert items(report, "noisy") == direct(trained, noisy, images, list(LOOKS))
    base, other = report["models"]
    assert base["average"] > 0.9  # chance is 0.25
    assert other["average"] < base["average"]
    assert base["scores"]["bars"]["count"] == 48
    assert base["scores"]["bars"]["ids"][0] == "blue_bar/00.png"
    assert report["data"]["bars"]["classes"] == 4


def test_classes_go_by_their_names_and_not_by_their_places(trained: Path, images: Path, tmp_path: Path) -> None:
    by_folder = evaluate([trained], images, trained)
    (tmp_path / "classes.txt").write_text("White bar\nred-bar\tred bar\nGREEN_BAR\tgreen bar\nblue bar\n\n")
    listed = evaluate([trained], images, trained, classes={"bars": tmp_path / "classes.txt"})
    assert listed["models"][0]["average"] == by_folder["models"][0]["average"] > 0.9
    # A class without images is still an answer that can be given; a wrong name is one that is wrong.
    fewer = draw(tmp_path / "fewer", seed=7, count=12, labels=["red_bar", "blue_bar"])
    report = evaluate([trained], fewer, trained, classes=[f"fewer={tmp_path / 'classes.txt'}"])
    assert (report["data"]["fewer"]["classes"], report["data"]["fewer"]["images"]) == (4, 24)
    (tmp_path / "swapped.txt").write_text("red_bar\tblue bar\nblue_bar\tred bar\n")
    swapped = evaluate([trained], fewer, trained, classes={"fewer": tmp_path / "swapped.txt"})
    assert swapped["models"][0]["average"] < 0.1


def test_templates_are_averaged(trained: Path, images: Path) -> None:
    templates = ["a photo of a {}.", "the {}"]
    report = evaluate([trained], images, trained, templates=templates)
    model = transformers.CLIPModel.from_pretrained(trained).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    processor = transformers.AutoImageProcessor.from_pretrained(trained)
    rows = []
    for label in sorted(LOOKS):
        tokens = tokenizer([t.format(label.replace("_", " ")) for t in templates], padding=True, return_tensors="pt")
        with torch.no_grad():
            both = model.text_projection(
                model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
            )
        rows.append((both / both.norm(dim=1, keepdim=True)).mean(0))
    head = torch.stack(rows)
    head = head / head.norm(dim=1, keepdim=True)
    right = []
    for i, label in enumerate(sorted(LOOKS)):
        for file in sorted((images / label).iterdir()):
            pixels = processor(images=Image.open(file), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            right.append(float(int((head @ seen).argmax()) == i))
    assert items(report, "base") == right


def test_a_merge_knows_its_base_and_an_adapter_is_evaluated_as_it_is(
    trained: Path, noisy: Path, images: Path, tmp_path: Path
) -> None:
    linear = {"method": "task-arithmetic", "scale": 0.8, "include": ["vision_model.*proj.weight"]}
    modelmerge.merge(trained, [noisy], tmp_path / "merged", **linear)
    modelmerge.merge(trained, [noisy], tmp_path / "adapter", as_lora=32, **linear)
    report = modelmerge.evaluate(
        [tmp_path / "merged", tmp_path / "adapter"], suite="clip", data={"noisy": images}, experts={"noisy": noisy}
    )
    rows = {row["name"]: row for row in report["models"]}
    assert [row["role"] for row in report["models"]] == ["base", "expert", "model", "model"]
    assert rows["merged"]["scores"]["noisy"]["items"] == rows["adapter"]["scores"]["noisy"]["items"]
    assert rows["merged"]["normalised"] == pytest.approx(rows["merged"]["average"] / rows["noisy"]["average"])


def test_a_limit_draws_by_the_seed_and_reports_are_paired(
    trained: Path, noisy: Path, images: Path, tmp_path: Path
) -> None:
    def drawn(seed: int) -> list[str]:
        report = evaluate([trained], images, trained, limit=10, seed=seed)
        return report["models"][0]["scores"]["bars"]["ids"]

    assert drawn(0) == drawn(0)
    assert len(drawn(0)) == 10
    assert drawn(0) != drawn(1)
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(evaluate([f"m={trained}"], images, trained, limit=20)))
    report = evaluate([f"m={noisy}"], images, trained, limit=20, compare=earlier)
    pairs = {pair["model"]: pair["tasks"]["bars"] for pair in report["comparison"]["models"]}
    assert pairs["m"]["paired"]
    assert pairs["m"]["difference"] <= 0.0 == pairs["base"]["difference"]


def test_what_was_seen_is_not_looked_at_again_unless_an_image_changes(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    before = suite.Classifier.measure

    def counted(self: suite.Classifier, model: Any, data: Any) -> Any:
        looked.append(model.name)
        return before(self, model, data)

    monkeypatch.setattr(suite.Classifier, "measure", counted)
    own = tmp_path / "bars"
    shutil.copytree(images, own)
    evaluate([f"m={trained}"], own, trained)
    assert looked == ["base"]  # the same model by another name
    evaluate([f"m={trained}"], own, trained)
    assert looked == ["base"]
    shutil.copy(own / "red_bar" / "00.png", own / "blue_bar" / "00.png")
    evaluate([f"m={trained}"], own, trained)
    assert looked == ["base", "base"]
    evaluate([f"m={trained}"], own, trained, templates=["the {}"])
    assert looked == ["base"] * 3


def test_the_split_for_testing_is_taken(trained: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "data" / "test")
    draw(tmp_path / "data" / "train", seed=9, count=1)
    report = evaluate([trained], tmp_path / "data", trained)
    assert report["data"]["data"]["images"] == 48


def test_the_command(trained: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "clip", f"m={trained}", "--base", str(trained), "--data", str(images)]
    assert main([*line, "--fail-under", "avg=0.9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Accuracy, per cent, ± standard error")
    assert main([*line, "-q", "--fail-under", "bars=1.01"]) == 1
    assert float(capsys.readouterr().out) > 0.9


def test_what_cannot_be_evaluated_is_said(trained: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMergeError, match="no such directory"):
        evaluate([trained], tmp_path / "gone", trained)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="it holds no folders"):
        evaluate([trained], tmp_path / "empty", trained)
    (tmp_path / "empty" / "red_bar").mkdir()
    with pytest.raises(ModelMergeError, match="red_bar: no image is in it"):
        evaluate([trained], tmp_path / "empty", trained)
    broken = draw(tmp_path / "broken", seed=1, count=1)
    (broken / "red_bar" / "00.png").write_bytes(b"no image")
    with pytest.raises(ModelMergeError, match=r"red_bar/00\.png: not an image that can be read"):
        evaluate([trained], broken, trained)
    (tmp_path / "classes.txt").write_text("red bar\nblue bar\nwhite bar\n")
    with pytest.raises(ModelMergeError, match="no class is called 'green_bar'"):
        evaluate([trained], images, trained, classes=[f"bars={tmp_path / 'classes.txt'}"])
    with pytest.raises(UsageError, match="--classes names 'baz', which is no data set"):
        evaluate([trained], images, trained, classes=[f"baz={tmp_path / 'classes.txt'}"])
    with pytest.raises(UsageError, match=r"needs one \{\}"):
        evaluate([trained], images, trained, templates=["a photo"])
    with pytest.raises(UsageError, match="--limit must be at least 1"):
        evaluate([trained], images, trained, limit=0)
    with pytest.raises(UsageError, match=r"^--base must be named"):
        modelmerge.evaluate([trained], suite="clip", data=[images])
    llama = family(tmp_path / "models")[0]
    with pytest.raises(ModelMergeError, match="cannot be loaded"):
        evaluate([llama], images, llama)
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(trained / "model.safetensors", lone)
    with pytest.raises(ModelMergeError, match="cannot be loaded"):
        evaluate([lone], images, lone)
    part = tmp_path / "part"
    shutil.copytree(trained, part)
    state = load_file(trained / "model.safetensors")
    save_file({name: t for name, t in state.items() if name.startswith("vision_model.")}, part / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not the CLIP model that its config\.json tells"):
        evaluate([part], images, part)


def test_answers_that_are_not_finite_are_an_error(trained: Path, images: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(trained, huge)
    state = load_file(trained / "model.safetensors")
    state["visual_projection.weight"] = torch.full_like(state["visual_projection.weight"], 3e38)
    save_file(state, huge / "model.safetensors")
    with pytest.raises(ModelMergeError, match="'huge' gives answers that are not finite"):
        evaluate([huge], images, trained)
