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

import math
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
        default: What it is there when it is not given, of its type; REQUIRED where mergekit insists on a number.
        per_model: It is one value for each model, not one for all.
        words: The option's value for each of the parameter's, where it is no number.
        ends: Numbers beyond these are as good as these.
        outcome: What becomes of it, where the above does not say it.
    """

    key: str
    option: str | None
    default: Any
    per_model: bool = False
    words: Mapping[Any, Any] | None = None
    ends: tuple[float, float] = (-math.inf, math.inf)
    outcome: str | None = None

    def bounded(self, value: Any) -> Any:
        """The value, or the end that it lies beyond."""
        return value if self.words is not None else type(value)(min(max(value, self.ends[0]), self.ends[1]))


@dataclass(frozen=True, slots=True)
class Row:
    """A method of mergekit: the method here, what is said to that besides, and its parameters.

    `inputs`: the models are experts of `base_model` (deltas), or stand side by side, the base among them if it is
    listed (members), or the former if there is a base and the latter with the options `alone` if there is none
    (either), or there is one in each slice (one). `experts`: the fewest and the most that mergekit takes. `remark` says
    where the numbers differ.
    """

    method: str
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    inputs: Literal["deltas", "members", "either", "one"] = "deltas"
    alone: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[int, int | None] = (1, None)
    remark: str | None = None

    @property
    def based(self) -> bool:
        """Whether task vectors are taken from a base, if there is one."""
        return self.inputs in ("deltas", "either")


_WEIGHT = Parameter("weight", WEIGHT, REQUIRED, per_model=True)
NOTHING = 1e-9  # a density of 0: what has it weighs 0
_DENSITY = Parameter("density", "density", 1.0, per_model=True, ends=(NOTHING, 1.0))
_LAMBDA = Parameter("lambda", "scale", 1.0)
_INT8_MASK = Parameter("int8_mask", None, False)
_MEANS: Mapping[Any, Any] = {True: "mean", False: "sum"}
_GAMMA = Parameter("gamma", "gamma", 0.01, per_model=True, ends=(-math.inf, 1.0))
_EPSILON = Parameter("epsilon", "epsilon", 0.15, per_model=True)
_CHANGE = Parameter("epsilon", "threshold", 1e-5)
_DRAWS = "mergekit draws other entries, others in every process."
_CHANCE = (
    f"{_DRAWS} With rescale it brings what is kept of a tensor to the L1 norm it had; here every entry is divided by "
    "its chance to be kept, which comes to the same but in tensors of few entries."
)
_POSITIVE = (0.0, math.inf)
# nuslerp's two parameters are one option: `nuslerp_row_wise` has an effect only without `nuslerp_flatten`.
FLATTEN = Parameter("nuslerp_flatten", "scope", True, words={True: "tensor", False: "line"})
ROW_WISE = Parameter(
    "nuslerp_row_wise", "scope", False, words={True: "column", False: "line"},
    outcome=f"without nuslerp_flatten, true is `{named('scope')} column`",
)  # fmt: skip


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "reduce", default, words=_MEANS)


def _rescale(true: str, default: bool) -> Parameter:
    return Parameter("rescale", "rescale", default, words={True: true, False: "none"})


def _trimmed(*more: Parameter, mean: bool, rescale: str = "norm", rescaled: bool = False) -> tuple[Parameter, ...]:
    """The parameters of a method that trims task vectors."""
    return (_WEIGHT, _DENSITY, *more, _LAMBDA, _normalize(mean), _INT8_MASK, _rescale(rescale, rescaled))


METHODS: Mapping[str, Row] = {
    "linear": Row("average", (_WEIGHT, _normalize(True)), inputs="members"),
    "task_arithmetic": Row(
        "task-arithmetic",
        (
            _WEIGHT,
            Parameter("density", None, 1.0, per_model=True),
            _LAMBDA,
            _normalize(False),
            _INT8_MASK,
            Parameter("rescale", None, False),
        ),
    ),
    "ties": Row("ties", _trimmed(mean=True), {"trim_scope": "tensor"}),
    "dare_linear": Row(
        "dare", _trimmed(mean=False, rescale="chance", rescaled=True), {"consensus": "linear"}, remark=_CHANCE
    ),
    "dare_ties": Row(
        "dare", _trimmed(mean=False, rescale="chance", rescaled=True), {"consensus": "ties"}, remark=_CHANCE
    ),
    "della": Row("della", _trimmed(_EPSILON, mean=True, rescaled=True), {"consensus": "ties"}, remark=_DRAWS),
    "della_linear": Row("della", _trimmed(_EPSILON, mean=False, rescaled=True), {"consensus": "linear"}, remark=_DRAWS),
    "breadcrumbs": Row("breadcrumbs", _trimmed(_GAMMA, mean=False), {"consensus": "linear", "scope": "tensor"}),
    "breadcrumbs_ties": Row("breadcrumbs", _trimmed(_GAMMA, mean=False), {"consensus": "ties", "scope": "tensor"}),
    "sce": Row(
        "sce",
        (Parameter("select_topk", "density", 1.0, ends=(0.0, 1.0)), _INT8_MASK),
        {"scale": 1.0, "equal_below": 1e-6},
    ),
    "model_stock": Row(
        "model-stock",
        (Parameter("filter_wise", "scope", False, words={True: "line", False: "tensor"}),),
        {"unbounded": True},
        experts=(2, None),
    ),
    "slerp": Row(
        "slerp",
        (Parameter("t", "t", REQUIRED),),
        {"points": "weights", "straight_above": 0.9995, "zeros": "right-angle"},
        experts=(1, 1),
    ),
    "nuslerp": Row(
        "slerp",
        (_WEIGHT, FLATTEN, ROW_WISE),
        {"t": 0.5, "points": "task-vectors", "zeros": "right-angle"},
        inputs="either",
        alone={"points": "weights"},
        experts=(2, 2),
    ),
    "karcher": Row(
        "karcher",
        (Parameter("max_iter", "steps", 10, ends=_POSITIVE), Parameter("tol", "tolerance", 1e-5, ends=_POSITIVE)),
        {"points": "weights"},
        inputs="members",
    ),
    "multislerp": Row(
        "multislerp",
        (_WEIGHT, Parameter("normalize_weights", "reduce", True, words=_MEANS), Parameter("eps", "soften", 1e-8)),
        inputs="either",
        alone={"points": "weights"},
    ),
    "arcee_fusion": Row("arcee-fusion", (), experts=(1, 1)),
    "ram": Row("ram", (_CHANGE,)),
    "ramplus_tl": Row("ramplus-tl", (Parameter("r", "gain", 0.1), Parameter("alpha", "limit", 0.2), _CHANGE)),
    "passthrough": Row("passthrough", (Parameter("scale", "factor", 1.0),), inputs="one", experts=(1, 1)),
    "nearswap": Row("nearswap", (Parameter("t", "t", REQUIRED, ends=_POSITIVE),), experts=(1, 1)),
}

# Every parameter of any method there: those of another method have no effect, which is worth a remark; any other is
# a slip of the pen.
KNOWN = frozenset(parameter.key for row in METHODS.values() for parameter in row.parameters)
# What becomes of the keys of the file itself.
KEYS: Mapping[str, str] = {
    "merge_method": "METHOD, see below",
    "base_model": "BASE; where a method needs none, the first model",
    "models": "EXPERT...; `model+adapter`, `{model, lora}` and `{path, revision}` are references",
    "slices": f"`{named('layers')}`; their parameters become `{named('at')}`",
    "parameters": f"see below; a list over the layers or a `filter` becomes `{named('at')}`",
    "dtype": f"`{named('dtype')}`; the arithmetic is float32 whatever it says",
    "out_dtype": f"`{named('dtype')}`",
    "tokenizer_source": "`base`, `union` or any model: whose tokens the tables have, see above",
    "tokenizer": "`source` as above, `union` where it is not given; `tokens` and `pad_to_multiple_of`: see above",
    "chat_template": "`auto`, `alpaca`, `chatml`, `exaone`, `llama3`, `mistral` or a Jinja template: see above",
    "modules": "what is said of a part of the models alone, see above",
    "name": "what other documents of the file call the result",
}
