"""Names of layers in files and in memory, experts stacked or one by one, and what nothing matches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import conversion_mapping

import modelmerge
from modelmerge.checkpoint import names
from modelmerge.checkpoint.experts import STYLES
from modelmerge.checkpoint.names import family_of
from modelmerge.errors import PlanError
from tests.support.checkpoints import State, read, write

_EXPERTS = {"gate": (3, 4), "up": (3, 4), "down": (4, 3)}


def draw(seed: int, **shapes: tuple[int, ...]) -> State:
    """Tensors by chance; a double underscore in a keyword is a dot."""
    generator = torch.Generator().manual_seed(seed)
    return {name.replace("__", "."): torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def renamed(state: State, change: Callable[[str], str]) -> State:
    """The same tensors by other names."""
    return {change(name): tensor.clone() for name, tensor in state.items()}


def vision_language(seed: int) -> State:
    """A language model and a vision tower with as many layers of the same shapes, under the Hub's names."""
    layers = {
        f"{front}.{i}.{part}.weight": (4, 4)
        for front in ("model.layers", "visual.blocks")
        for i in range(3)
        for part in ("attn.q_proj", "mlp.up_proj")
    }
    rest = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "visual.merger.weight": (4, 4)}
    return draw(seed, **{n.replace(".", "__"): s for n, s in {**layers, **rest, "lm_head.weight": (6, 4)}.items()})


def in_memory(name: str) -> str:
    """As a vision-language model has it in memory."""
    return re.sub("^visual", "model.visual", re.sub("^model", "model.language_model", name))


def flat(name: str) -> str:
    """As a tower saved by itself has it, beside the language model."""
    return re.sub("^model", "language_model.model", name)


@pytest.mark.parametrize("ours", [None, in_memory, flat])
@pytest.mark.parametrize("theirs", [None, in_memory, flat])
def test_towers_go_by_several_names(
    ours: Callable[[str], str] | None, theirs: Callable[[str], str] | None, tmp_path: Path
) -> None:
    states = [vision_language(seed) for seed in range(2)]
    base = write(tmp_path / "base", renamed(states[0], ours or str))
    expert = write(tmp_path / "expert", renamed(states[1], theirs or str))
    manifest = modelmerge.merge(base, [expert], tmp_path / "out", method="average")
    got = read(tmp_path / "out")
    assert got.keys() == {(ours or str)(name) for name in states[0]}
    assert all(torch.allclose(got[(ours or str)(name)], tensor, atol=1e-6) for name, tensor in states[1].items())
    assert any("are matched so" in note for note in manifest["notes"]) == (ours is not theirs)


def test_a_tower_that_fits_in_part_is_no_rival(tmp_path: Path) -> None:
    def tower(front: str, width: int) -> dict[str, tuple[int, ...]]:
        layers = {f"{front}layers__{i}__q__weight": (width, 4) for i in range(2)}
        return {**layers, **{f"{front}layers__{i}__norm__weight": (4,) for i in range(2)}}

    base = write(tmp_path / "base", draw(0, **tower("text__", 4), **tower("vision__", 6)))
    expert = draw(1, **tower("", 4))
    modelmerge.merge(base, [write(tmp_path / "expert", expert)], tmp_path / "out", method="average")
    got, origin = read(tmp_path / "out"), read(base)
    for name, tensor in got.items():
        want = expert[name.removeprefix("text.")] if name.startswith("text.") else origin[name]
        torch.testing.assert_close(tensor, want, rtol=0, atol=1e-6)


def one_by_one(seed: int, words: tuple[str, str, str], front: str = "model.layers.0.mlp.experts") -> State:
    """Three experts of a layer."""
    shapes = dict(zip(words, _EXPERTS.values(), strict=True))
    layer = {f"{front}.{e}.{word}": shape for e in range(3) for word, shape in shapes.items()}
    return draw(seed, **{name.replace(".", "__"): shape for name, shape in {**layer, "lm_head.weight": (5, 4)}.items()})


def stacked(state: State, *, turned: bool = False) -> State:
    """The experts of `one_by_one`, by the names of the first style, in two tensors."""
    front = "model.layers.0.mlp.experts"
    gate, up, down = ([state[f"{front}.{e}.{word}"] for e in range(3)] for word in STYLES[0])
    stacks = {
        f"{front}.gate_up_proj": torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)]),
        f"{front}.down_proj": torch.stack(down),
    }
    if turned:
        stacks = {name: stack.transpose(1, 2).contiguous() for name, stack in stacks.items()}
    return {**stacks, "lm_head.weight": state["lm_head.weight"]}


def words_of(style: int) -> Callable[[State], State]:
    """Experts one by one in the words of a style."""
    words = dict(zip(STYLES[0], STYLES[style], strict=True))
    return lambda state: renamed(state, lambda n: re.sub(r"(?<=\d\.)\w+\.weight$", lambda m: words[m[0]], n))


LAYOUTS: dict[str, Callable[[State], State]] = {
    "gate, up, down": dict, "w1, w3, w2": words_of(1), "fc1, fc3, fc2": words_of(2), "stacked": stacked,
    "stacked, transposed": lambda state: stacked(state, turned=True),
}  # fmt: skip


@pytest.mark.parametrize("ours", LAYOUTS)
@pytest.mark.parametrize("theirs", LAYOUTS)
def test_experts_come_in_the_layout_of_the_base(ours: str, theirs: str, tmp_path: Path) -> None:
    if ours == "stacked, transposed" and "stacked" not in theirs:
        pytest.skip("no family has these two layouts")
    states = [one_by_one(seed, STYLES[0]) for seed in range(3)]
    base = write(tmp_path / "base", LAYOUTS[ours](states[0]))
    experts = [write(tmp_path / f"e{i}", LAYOUTS[theirs](state)) for i, state in enumerate(states[1:])]
    modelmerge.merge(base, experts, tmp_path / "out", method="task-arithmetic", scale=0.5)
    mean = {name: t + 0.5 * (states[1][name] - t + states[2][name] - t) for name, t in states[0].items()}
    got, want = read(tmp_path / "out"), LAYOUTS[ours](mean)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)


def test_what_experts_have_beside_their_weights_is_said(tmp_path: Path) -> None:
    state, front = one_by_one(1, STYLES[0]), "model.layers.0.mlp.experts"
    base = write(tmp_path / "base", stacked(one_by_one(0, STYLES[0])))
    biases = {f"{front}.{e}.gate_proj.bias": torch.ones(3) for e in range(3)}
    manifest = modelmerge.merge(
        base, [write(tmp_path / "expert", {**state, **biases})], tmp_path / "out", method="average"
    )
    assert manifest["tensors"]["expert_only"].keys() == biases.keys()
    torch.testing.assert_close(read(tmp_path / "out")[f"{front}.down_proj"], stacked(state)[f"{front}.down_proj"])


def test_experts_of_a_pickle_may_lie_in_another_order(tmp_path: Path) -> None:
    state = one_by_one(1, STYLES[0])
    base = write(tmp_path / "base", stacked(one_by_one(0, STYLES[0])))
    plain = write(tmp_path / "plain", state)
    (tmp_path / "turned").mkdir()
    turned = {name: tensor.T.contiguous().T for name, tensor in state.items()}
    torch.save(turned, tmp_path / "turned" / "pytorch_model.bin")
    for folder in (plain, tmp_path / "turned"):
        modelmerge.merge(base, [folder], tmp_path / f"{folder.name} out", method="tsv-m")
    got, want = read(tmp_path / "turned out"), read(tmp_path / "plain out")
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_experts_that_fit_no_layout_are_an_error(tmp_path: Path) -> None:
    state = one_by_one(0, STYLES[0])
    base = write(tmp_path / "base", LAYOUTS["stacked, transposed"](state))
    expert = write(tmp_path / "expert", state)
    with pytest.raises(PlanError, match="disagree on 2 tensors"):
        modelmerge.merge(base, [expert], tmp_path / "out", method="average")
    part = {name: tensor for name, tensor in state.items() if ".2." not in name}
    few = write(tmp_path / "few", {**part, "model.layers.0.mlp.experts.4.up_proj.weight": torch.ones(3, 4)})
    straight = write(tmp_path / "straight", stacked(state))
    with pytest.raises(PlanError, match="have 2 tensors that look like one another") as caught:
        modelmerge.merge(straight, [few], tmp_path / "out", method="average")
    assert "'model.layers.0.mlp.experts.down_proj'" in caught.value.message
    assert "model.layers.0.mlp.experts.0." in caught.value.message
    modelmerge.merge(straight, [few], tmp_path / "out", method="average", exclude=["*experts*"])


def test_layers_of_no_match_are_an_error_that_names_both(tmp_path: Path) -> None:
    state = vision_language(0)
    base = write(tmp_path / "base", state)
    odd = renamed(state, lambda name: name.replace("visual.blocks", "tower.stages"))
    expert = write(tmp_path / "expert", odd)
    with pytest.raises(PlanError) as caught:
        modelmerge.merge(base, [expert], tmp_path / "out", method="average")
    assert "6 tensors that look like one another" in caught.value.message
    assert "'visual.blocks.0." in caught.value.message
    assert "'tower.stages.0." in caught.value.message
    assert not (tmp_path / "out").exists()
    manifest = modelmerge.merge(base, [expert], tmp_path / "out", method="average", exclude=["visual.blocks.*"])
    assert len(manifest["tensors"]["expert_only"]) == 6


def transformer(seed: int, words: dict[str, str]) -> State:
    """Layers of a vision transformer, in these words."""
    parts = {"q": (4, 4), "k": (4, 4), "v": (4, 4), "up": (6, 4), "down": (4, 6)}
    layers = {f"{words['layers']}.{i}.{words[part]}.weight": shape for i in range(2) for part, shape in parts.items()}
    return draw(seed, **{name.replace(".", "__"): shape for name, shape in {**layers, "norm.weight": (4,)}.items()})


FILES = {"layers": "encoder.layer", "q": "attention.attention.query", "k": "attention.attention.key",
         "v": "attention.attention.value", "up": "intermediate.dense", "down": "output.dense"}  # fmt: skip
MEMORY = {"layers": "layers", "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
          "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), [(FILES, MEMORY), (MEMORY, FILES)], ids=["files", "memory"])
def test_lone_files_of_a_family_are_told_by_their_names(
    ours: dict[str, str], theirs: dict[str, str], tmp_path: Path
) -> None:
    base = write(tmp_path / "base", transformer(0, ours))
    expert = write(tmp_path / "expert", transformer(1, theirs))
    files = [folder / "model.safetensors" for folder in (base, expert)]
    modelmerge.merge(files[0], [files[1]], tmp_path / "out", method="average")
    for name, tensor in transformer(1, ours).items():
        torch.testing.assert_close(read(tmp_path / "out")[name], tensor, rtol=0, atol=1e-6)


def test_layers_under_names_that_nobody_knows_are_an_error(tmp_path: Path) -> None:
    odd = {"layers": "trunk", "q": "a.one", "k": "a.two", "v": "a.three", "up": "b.wide", "down": "b.narrow"}
    base, expert = write(tmp_path / "base", transformer(0, FILES)), write(tmp_path / "expert", transformer(1, odd))
    with pytest.raises(PlanError, match="have 10 tensors that look like one another under other names"):
        modelmerge.merge(base, [expert], tmp_path / "out", method="average")


@pytest.mark.parametrize("extra", [
    {"score.weight": (2, 4)}, {"v_head.summary.weight": (1, 4)}, {"mtp.layers.0.attn.q_proj.weight": (4, 4)},
    {"model.pooler.dense.weight": (4, 4)},
])  # fmt: skip
@pytest.mark.parametrize("whose", ["base", "expert"])
def test_what_one_side_has_alone_is_said(extra: dict[str, tuple[int, ...]], whose: str, tmp_path: Path) -> None:
    more = draw(9, **{name.replace(".", "__"): shape for name, shape in extra.items()})
    states = {"base": vision_language(0), "expert": vision_language(1)}
    states[whose] |= more
    base, expert = (write(tmp_path / name, state) for name, state in states.items())
    manifest = modelmerge.merge(base, [expert], tmp_path / "out", method="average")
    name = next(iter(extra))
    assert any(f"'{name}'" in note for note in manifest["notes"])
    assert (name in read(tmp_path / "out")) == (whose == "base")
    assert torch.equal(read(tmp_path / "out")["model.norm.weight"], states["expert"]["model.norm.weight"])


def test_the_weight_norm_of_older_torch_is_the_parametrisation_of_newer(tmp_path: Path) -> None:
    new = draw(
        0, conv__parametrizations__weight__original0=(1, 1, 3), conv__parametrizations__weight__original1=(4, 4, 3)
    )
    old = renamed(new, lambda n: f"conv.weight_{'g' if n.endswith('0') else 'v'}")
    for i, (ours, theirs) in enumerate(((new, old), (old, new))):
        base, expert = write(tmp_path / f"b{i}", ours), write(tmp_path / f"e{i}", {n: t + 1 for n, t in theirs.items()})
        modelmerge.merge(base, [expert], tmp_path / f"o{i}", method="average")
        assert all(torch.equal(t, ours[n] + 1) for n, t in read(tmp_path / f"o{i}").items())


# --- the table of families ---


def _plain(pattern: str, *, is_target: bool = False) -> str:
    """A pattern of transformers in the words of the table."""
    text = pattern.replace("\\.", ".")
    return re.sub(r"\\[0-9]", "#", text) if is_target else re.sub(r"\(\\d\+\)|\\d\+", "#", text)


def _listed(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _facts(transform: Any) -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """What a transform of transformers says of names: one in the place of another, or several in one."""
    sources = _listed(getattr(transform, "_original_source_patterns", None) or transform.source_patterns)
    targets = _listed(getattr(transform, "_original_target_patterns", None) or transform.target_patterns)
    operations = [type(each).__name__ for each in getattr(transform, "operations", [])]
    if not operations:
        yield from ((_plain(source), _plain(targets[0], is_target=True)) for source in sources)
    elif operations in (["Chunk"], ["Split"]):
        yield _plain(sources[0]), tuple(map(_plain, targets))
    elif operations == ["Concatenate"]:
        yield _plain(targets[0]), tuple(map(_plain, sources))


def conversions() -> dict[str, list[Any]]:
    """transformers' own mapping of names, in a version that has what the table has."""
    mapping: dict[str, list[Any]] = conversion_mapping._build_checkpoint_conversion_mapping()
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip(f"the table is of transformers 5.24, and here it is {transformers.__version__}")
    return mapping


def test_the_table_says_what_transformers_says() -> None:
    """Every name and join in the table is in transformers' own mapping of that family, or of one of its classes."""
    mapping = conversions()
    facts = {key: {fact for each in transforms for fact in _facts(each)} for key, transforms in mapping.items()}
    of_classes = {fact for key, each in facts.items() if key[0].isupper() for fact in each}
    table = json.loads(Path(names.__file__).with_name("families.json").read_bytes())
    assert sum(len(row["families"]) for row in table) > 100
    for row in table:
        said = {
            *row.get("names", {}).items(),
            *((whole, tuple(parts)) for whole, parts in row.get("joins", {}).items()),
        }
        for family in row["families"]:
            assert said <= facts.get(family, set()) | of_classes, family


def test_every_way_to_stack_experts_in_transformers_is_read() -> None:
    mapping = conversions()
    seen = set()
    for transforms in mapping.values():
        for transform in transforms:
            if [type(each).__name__ for each in getattr(transform, "operations", [])][:1] == ["MergeModulelist"]:
                words = tuple(source.rpartition("*.")[2].replace("\\", "") for source in transform.source_patterns)
                seen.add(words)
    singles = {(word,) for style in STYLES for word in style}
    assert len(seen) >= 6
    assert seen <= {style[:2] for style in STYLES} | singles


def test_names_in_memory_are_names_of_the_family_already() -> None:
    for row in json.loads(Path(names.__file__).with_name("families.json").read_bytes()):
        for family in row["families"]:
            kind = family_of({"model_type": family})
            for old in row.get("names", {}):
                name = kind.name(f"{'' if old.startswith('^') else 'x.'}{old.strip('^').replace('#', '3')}y.weight")
                assert kind.name(name) == name, (family, old)
