"""The site plans of real models, as they were: a change of plan shows by the names of model and site.

`zoo_plans.txt.xz` has a line a site and a blank line between models. Where a plan is meant to change, or a library
changed its model: `python tests/test_zoo_plans.py [PATTERN]` writes the plans of the models that match, and says which
changed.
"""

from __future__ import annotations

import importlib.util
import lzma
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from meansparse_fx.errors import MeanSparseError

KEPT = Path(__file__).with_name("zoo_plans.txt.xz")
# The quickest of those kept: 10 s on one core for 30, 71 s for all 117. The others of benchmarks.zoo take 8 minutes.
FAST = 30


def lines_of(plan) -> list[str]:
    """Return a plan as lines: name, what, channels @ dimension, maker of the input, and the reason if it is skipped."""
    what = ((s.activation.name if s.activation else s.kind) for s in plan)
    return [
        f"{s.name} {name} {s.channels} @ {s.channel_dim} {s.producer} {s.refusal.kind if s.refusal else ''}".rstrip()
        for s, name in zip(plan, what, strict=True)
    ]


def rows_of(path) -> dict:
    """Return the rows of benchmarks.zoo by model."""
    from benchmarks.harness import read

    return {row.model: row for row in read(path)}


def plan_of(model: str) -> list[str]:
    import meansparse_fx as msfx
    from benchmarks.harness import RESULTS
    from benchmarks.zoo import SMALL, build

    size = rows_of(RESULTS / "zoo.csv")[model].image or SMALL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        net = build(model)
        try:
            return lines_of(msfx.inspect(net, torch.rand(2, 3, size, size)))
        except MeanSparseError as error:
            return [type(error).__name__]


def kept() -> dict[str, list[str]]:
    """Return the plans by model, the quickest first."""
    if not KEPT.is_file():
        return {}
    parts = lzma.decompress(KEPT.read_bytes()).decode().split("\n\n")
    return {model: lines for model, *lines in (part.splitlines() for part in parts)}


def difference(before: list[str], now: list[str]) -> list[str]:
    return [f"- {line}" for line in before if line not in now] + [f"+ {line}" for line in now if line not in before]


PLANS = kept()
MARKS = [() if number < FAST else pytest.mark.slow for number in range(len(PLANS))]


@pytest.mark.parametrize("model", [pytest.param(m, marks=mark) for m, mark in zip(PLANS, MARKS, strict=True)])
def test_plan(model):
    library = model.partition(":")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    now = plan_of(model)
    assert now == PLANS[model], "\n".join([f"the plan of {model} changed:", *difference(PLANS[model], now)])


def main() -> None:
    """Write the plans of the models that match, in the order of the seconds they took."""
    sys.path.insert(0, str(KEPT.parents[1]))
    from benchmarks.harness import RESULTS
    from benchmarks.zoo import MODELS

    torch.set_grad_enabled(False)
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = rows_of(RESULTS / "zoo.csv")
    plans = kept()
    order = sorted(MODELS, key=lambda m: rows[m].forward_cpu_s + rows[m].capture_cpu_s + rows[m].find_cpu_s)
    for model in (m for m in order if re.search(pattern, m)):
        began = time.process_time()
        now = plan_of(model)
        changed = difference(plans.get(model, []), now) if model in plans else ["new"]
        print(f"{model}: {len(now)} sites, {time.process_time() - began:.1f} s", *changed, sep="\n  ", flush=True)
        plans[model] = now
        text = "\n\n".join("\n".join([m, *plans[m]]) for m in order if m in plans)
        KEPT.write_bytes(lzma.compress(text.encode(), preset=9))


if __name__ == "__main__":
    main()
