"""A merge by fusion_bench, as its users write one, run by a Python that has it.

`PYTHON fusion_runs.py CLASS OPTIONS DTYPE OUT BASE EXPERT...`: the class of `fusion_bench.method` with these options
(as JSON) merges Llamas that transformers loads in that dtype, and transformers saves the result.
"""

from __future__ import annotations

import json
import sys

from fusion_bench import method
from fusion_bench.modelpool import CausalLMPool


def main(name: str, options: str, dtype: str, out: str, *models: str) -> None:
    names = ["_pretrained_", *(f"expert_{i}" for i in range(1, len(models)))]
    if name == "SlerpMergeAlgorithm":  # it takes two models, neither of them special
        names[0] = "base"
    pool = CausalLMPool(dict(zip(names, models, strict=True)), tokenizer=None, model_kwargs={"torch_dtype": dtype})
    getattr(method, name)(**json.loads(options)).run(pool).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
