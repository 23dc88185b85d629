"""Count what each form of the operator must move in whole models; nothing is timed.

    python -m benchmarks.roofline [--model WRN-16-4 ResNet-50] [--out benchmarks/results/roofline.csv]

The counts are `meansparse_fx.cost`'s, whose documentation has the rules: they depend on shapes alone, so the file is
the same from every machine. benchmarks.performance sets them beside what was measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import meansparse_fx as msfx

from .architectures import MODELS, Unavailable, build
from .harness import print_rows, write


@dataclass(frozen=True, slots=True)
class Count:
    """One form of the operator in one model, float32; the fields are the CSV's columns.

    Attributes:
        model, form: What was counted.
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
    side = MODELS[name][1]
    found = msfx.cost(build(name), torch.rand(2, 3, side, side))
    return [
        Count(
            name, form, len(found),
            c.forward.calls, c.forward.bytes // found.images,
            c.backward.calls, c.backward.bytes // found.images,
        )
        for form, c in found.total.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["WRN-16-4", "WRN-28-10", "RaWRN-small", "ResNet-50", "ConvNeXt-T", "Swin-T"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[Count] = []
    for name in args.model:
        try:
            rows += counts(name)
        except Unavailable as reason:
            print(f"skipped {name}: {reason}")
    print_rows(rows, Count.__slots__, "bytes an image, float32")
    if args.out is not None:
        write(rows, args.out)


if __name__ == "__main__":
    main()
