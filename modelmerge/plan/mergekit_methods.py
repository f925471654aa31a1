"""mergekit's methods, their parameters and the keys of its configurations, and what each is here: tables.

The result is mergekit's, to rounding in float32, with exceptions where its number depends on storage or on chance:

- `dtype: bfloat16` or `float16` makes it round every model before it subtracts, and compute in that dtype: half of a
  small task vector can be rounding. (Earlier versions cast the experts to the base's dtype whatever was said.) Here
  the arithmetic is float32 on the models as they are stored, and the result is rounded once.
- Entries whose task vectors cancel exactly go to the positive side there; here they stay at the base, as in the paper.
- Of entries that are equal in size at a threshold, common in 16 bits, it keeps some and drops others to make the count;
  here all are kept.
- Of a tensor of fewer than 1 / density entries, its breadcrumbs keep nothing; here one entry stays.
- Where entries are dropped at random the draws are other ones.

What becomes of a key is for the guide, with options by `errors.named`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modelmerge.errors import named
from modelmerge.plan.overrides import WEIGHT

REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of mergekit's parameters of a method.

    Args:
        key: Its name there.
        option: The option here, `weight` for the experts' weights, None for one that changes no number.
        default: What it is there when it is not given; REQUIRED where mergekit insists.
        per_model: It is one value for each model, not one for all.
        words: The option's value for each of the parameter's, where it is no number.
        only: The one value that can be honoured, where there is no option.
        outcome: What becomes of it, where the above does not say it.
    """

    key: str
    option: str | None
    default: Any
    per_model: bool = False
    words: Mapping[Any, Any] | None = None
    only: Any = None
    outcome: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A method of mergekit: the method here, what is said to that besides, and its parameters.

    `inputs`: the models are experts of `base_model` (deltas), or stand side by side, the base among them if it is
    listed (members), or the former if there is a base and the latter with the options `alone` if there is none
    (either). `experts`: the fewest and the most that mergekit takes. `remark` says where the numbers differ.
    """

    method: str
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    inputs: Literal["deltas", "members", "either"] = "deltas"
    alone: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[int, int | None] = (1, None)
    remark: str | None = None


_WEIGHT = Parameter("weight", WEIGHT, REQUIRED, per_model=True)
_DENSITY = Parameter("density", "density", 1.0, per_model=True)
_LAMBDA = Parameter("lambda", "scale", 1.0)
_INT8_MASK = Parameter("int8_mask", None, False)
_MEANS: Mapping[Any, Any] = {True: "mean", False: "sum"}
_GAMMA = Parameter("gamma", "gamma", 0.01, per_model=True)
_EPSILON = Parameter("epsilon", "epsilon", 0.15, per_model=True)
_CHANGE = Parameter("epsilon", "threshold", 1e-5)
_SUM_ONLY = Parameter("normalize", None, False, only=False)
_RESCALED = Parameter("rescale", None, True, only=True)
_AS_IT_IS = Parameter("rescale", None, False, only=False)
_BANDS = (_WEIGHT, _DENSITY, _GAMMA, _LAMBDA, _SUM_ONLY, _INT8_MASK, _AS_IT_IS)
_DRAWN = (
    "mergekit draws other entries, others in every process; it scales what is kept of a tensor to the L1 norm it had, "
    "and here every entry is divided by its chance to be kept."
)
_TO_THE_END = "has no effect: it iterates until it stands still"


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "reduce", default, words=_MEANS)


def _drawn(method: str, consensus: str, normalize: Parameter, *more: Parameter) -> Row:
    parameters = (_WEIGHT, _DENSITY, *more, _LAMBDA, normalize, _INT8_MASK, _RESCALED)
    return Row(method, parameters, {"consensus": consensus}, remark=_DRAWN)


METHODS: Mapping[str, Row] = {
    "linear": Row(
        "average",
        (_WEIGHT, Parameter("normalize", None, True, outcome="true, or false with weights that add up to 1")),
        inputs="members",
    ),
    "task_arithmetic": Row("task-arithmetic", (_WEIGHT, _LAMBDA, _normalize(False), _INT8_MASK)),
    "ties": Row(
        "ties", (_WEIGHT, _DENSITY, _LAMBDA, _normalize(True), _INT8_MASK, _AS_IT_IS), fixed={"trim_scope": "tensor"}
    ),
    "dare_linear": _drawn("dare", "linear", _SUM_ONLY),
    "dare_ties": _drawn("dare", "ties", _normalize(False)),
    "della": _drawn("della", "ties", _normalize(True), _EPSILON),
    "della_linear": _drawn("della", "linear", _SUM_ONLY, _EPSILON),
    "breadcrumbs": Row("breadcrumbs", _BANDS, {"consensus": "linear", "scope": "tensor"}),
    "breadcrumbs_ties": Row("breadcrumbs", _BANDS, {"consensus": "ties", "scope": "tensor"}),
    "sce": Row("sce", (Parameter("select_topk", "density", 1.0), _INT8_MASK), {"scale": 1.0}),
    "model_stock": Row(
        "model-stock",
        (Parameter("filter_wise", "scope", False, words={True: "row", False: "tensor"}),),
        experts=(2, None),
    ),
    "slerp": Row("slerp", (Parameter("t", "t", REQUIRED),), {"points": "weights"}, experts=(1, 1)),
    "nuslerp": Row(
        "slerp",
        (
            _WEIGHT,
            Parameter("nuslerp_flatten", None, True, only=True),
            Parameter("nuslerp_row_wise", None, False, outcome="has no effect with nuslerp_flatten"),
        ),
        {"t": 0.5, "points": "task-vectors"},
        inputs="either",
        alone={"points": "weights"},
        experts=(2, 2),
    ),
    "karcher": Row(
        "karcher",
        (Parameter("max_iter", None, 10.0, outcome=_TO_THE_END), Parameter("tol", None, 1e-5, outcome=_TO_THE_END)),
        {"points": "weights"},
        inputs="members",
    ),
    "multislerp": Row(
        "multislerp",
        (
            _WEIGHT,
            Parameter("normalize_weights", "reduce", True, words=_MEANS),
            Parameter("eps", None, 1e-8, outcome="has no effect: nothing is divided by zero here"),
        ),
        inputs="either",
        alone={"points": "weights"},
    ),
    "arcee_fusion": Row("arcee-fusion", (), experts=(1, 1)),
    "ram": Row("ram", (_CHANGE,)),
    "ramplus_tl": Row("ramplus-tl", (Parameter("r", "gain", 0.1), Parameter("alpha", "limit", 0.2), _CHANGE)),
    "nearswap": Row("nearswap", (Parameter("t", "t", REQUIRED),), experts=(1, 1)),
}

# Every parameter of any method there: those of another method have no effect, which is worth a remark; any other is
# a slip of the pen.
KNOWN = {
    "weight", "density", "lambda", "normalize", "rescale", "int8_mask", "gamma", "epsilon", "t", "select_topk",
    "filter_wise", "max_iter", "tol", "eps", "normalize_weights", "nuslerp_row_wise", "nuslerp_flatten", "scale", "r",
    "alpha",
}  # fmt: skip
# What becomes of the keys of the file itself.
KEYS: Mapping[str, str] = {
    "merge_method": "METHOD, see below",
    "base_model": "BASE; where a method needs none, the first model",
    "models": "EXPERT...; an adapter on the base, `base+adapter`, is the adapter",
    "slices": "one, over all layers: as `models`",
    "parameters": f"see below; a list over the layers or a `filter` becomes `{named('at')}`",
    "dtype": f"`{named('dtype')}`; the arithmetic is float32 whatever it says",
    "out_dtype": f"`{named('dtype')}`",
    "tokenizer_source": "`base` only: the base's files are copied",
    "tokenizer": "`source: base` only",
    "chat_template": "cannot be honoured",
    "modules": "cannot be honoured",
}
