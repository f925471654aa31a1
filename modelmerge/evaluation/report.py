"""The report of a suite, as plain data: what `evaluate` returns and `eval SUITE --json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from typing_extensions import NotRequired

Role = Literal["base", "expert", "model"]


class Input(TypedDict):
    """A model that was read, as manifests have it too."""

    name: str
    reference: str
    path: str
    files: dict[str, dict[str, Any]]  # by name, their `sha256` and `bytes`


class ScoreEntry(TypedDict):
    """A model's score at a task; `lower` and `figures` are there only where they say something."""

    score: float | None
    count: int | None
    stderr: float | None
    metric: str
    items: NotRequired[list[float]]
    ids: NotRequired[list[str]]
    lower: NotRequired[bool]
    figures: NotRequired[dict[str, float | None]]
    normalised: NotRequired[float | None]


class ModelRow(Input):
    """A model with its scores by task; suite `clip` adds what a merge's experts have not seen."""

    role: Role
    digest: str
    scores: dict[str, ScoreEntry]
    cached: list[str]
    average: NotRequired[float | None]
    average_stderr: NotRequired[float | None]
    normalised: NotRequired[float | None]
    normalised_by_published: NotRequired[float | None]
    unseen: NotRequired[list[str]]
    average_seen: NotRequired[float]
    average_unseen: NotRequired[float]


class Difference(TypedDict):
    """The difference of two scores, or of two averages; `paired`: item by item."""

    difference: float | None
    stderr: float | None
    p: float | None
    paired: NotRequired[bool]


class ModelDifferences(TypedDict):
    """The differences of a model to one of an earlier report."""

    model: str
    other: str
    tasks: dict[str, Difference]
    average: Difference


Comparison = TypedDict("Comparison", {"with": str, "models": list[ModelDifferences]})


class GateResult(TypedDict):
    """Whether all models reach all gates."""

    gates: list[str]
    passed: bool
    failures: list[dict[str, Any]]  # `model`, `gate`, and the `value` that is too small or None


class _Stamp(TypedDict):
    format: int
    device: str
    created: str
    versions: dict[str, str]
    notes: list[str]


class ScoreReport(_Stamp):
    """The report of a suite of scores."""

    suite: Literal["clip", "custom", "lm"]
    seed: int | None
    tasks: list[str]
    models: list[ModelRow]
    own_experts: NotRequired[dict[str, str]]
    comparison: NotRequired[Comparison]
    gate: NotRequired[GateResult]
    published: NotRequired[dict[str, Any]]
    metric: NotRequired[dict[str, str | None]]  # of custom
    data: NotRequired[dict[str, dict[str, Any]]]  # of clip, as are the next two
    limit: NotRequired[int | None]
    heads: NotRequired[str | None]
    settings: NotRequired[dict[str, Any]]  # of lm, as is the next
    harness: NotRequired[dict[str, Any]]


class ExpertFigures(TypedDict):
    """The experts' task vectors, by name, and their conflicts."""

    norms: dict[str, float]
    relative_norms: dict[str, float | None]
    cosines: list[list[float | None]]
    sign_conflict: float | None
    minority_sign_share: float | None
    singular_task_interference: dict[str, float] | None
    awd_orthogonality: dict[str, float] | None
    apgd_gap: dict[str, float] | None


class Closeness(TypedDict):
    """How close a merged task vector is to an expert's."""

    cosine: float | None
    distance: float
    relative_distance: float | None
    subspace_alignment: float | None


class ModelFigures(TypedDict):
    """A merged task vector, and how close it is to each expert's."""

    norm: float
    relative_norm: float | None
    expected_rounding: float | None
    apgd_gap: float | None
    experts: dict[str, Closeness]


class Figures(TypedDict):
    """The figures of the whole model, of a type of layer, or of a tensor."""

    entries: int
    matrices: int
    experts: ExpertFigures
    models: dict[str, ModelFigures]


class MergedInput(Input):
    """A model of suite `weights`, and what its merge measured of rounding."""

    measured_rounding: float | None


class FigureTables(TypedDict):
    """All figures of suite `weights`; `tensors` only where they are asked for."""

    model: Figures
    layer_types: dict[str, Figures]
    tensors: NotRequired[dict[str, Figures]]


class WeightReport(_Stamp, FigureTables):
    """The report of suite `weights`."""

    suite: Literal["weights"]
    base: Input
    experts: list[Input]
    models: list[MergedInput]
    remark: str
    left_out: dict[str, str]


Report = ScoreReport | WeightReport
