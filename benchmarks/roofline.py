"""Count what each form of the operator must move in whole models; nothing is timed.

    python -m benchmarks.roofline [--model WRN-16-4 ResNet-50] [--out benchmarks/results/roofline.csv]

The counts are `meansparse_fx.cost`'s, whose documentation has the rules: they depend on shapes alone, so the file is
the same from every machine. benchmarks.performance sets them beside what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import meansparse_fx as msfx
from meansparse_fx.errors import ModelError

from .contenders import MODELS, build
from .harness import options, report


@dataclass(frozen=True, slots=True)
class Count:
    """One form of the operator in one model, float32; the fields are the CSV's columns.

    Attributes:
        sites: How many the model has.
        forward_calls, backward_calls: Of operators, at all sites together.
        forward_bytes, backward_bytes: Read and written there, for one image.
    """

    model: str
    form: str
    sites: int
    forward_calls: int
    forward_bytes: int
    backward_calls: int
    backward_bytes: int


def counts(name: str) -> list[Count]:
    """Return the counts of one model, a form a row."""
    torch.manual_seed(0)
    found = msfx.cost(build(name), torch.rand(2, 3, MODELS[name][1], MODELS[name][1]))
    rows = []
    for form, total in found.total.items():
        passes = (n for each in (total.forward, total.backward) for n in (each.calls, each.bytes // found.images))
        rows.append(Count(name, form, len(found), *passes))
    return rows


def main() -> None:
    parser = options(__doc__)
    default = ["WRN-16-4", "WRN-28-10", "RaWRN-small", "ResNet-50", "ConvNeXt-T", "Swin-T"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=default)
    args = parser.parse_args()
    rows: list[Count] = []
    for name in args.model:
        try:
            rows += counts(name)
        except ModelError as reason:
            print(f"skipped {name}: {reason}")
    report(rows, args.out, "bytes an image, float32")


if __name__ == "__main__":
    main()
