"""Count what each form of the operator must move in whole models; nothing is timed.

    python -m benchmarks.roofline [--model WRN-16-4 ResNet-50] [--out benchmarks/results/roofline.csv]

The counts are `meansparse_fx.cost`'s, whose documentation has the rules: they depend on shapes alone, so the file is
the same from every machine. The page of performance sets them beside what was measured.
"""

from __future__ import annotations

from functools import partial

import torch

import meansparse_fx as msfx

from .contenders import MODELS, build
from .harness import Row, options, run


def counts(name: str) -> list[Row]:
    """Return the counts of one model, a form a row."""
    torch.manual_seed(0)
    found = msfx.cost(build(name), torch.rand(2, 3, MODELS[name][1], MODELS[name][1]))
    return [
        Row(
            benchmark="roofline", case=name, contender=form, sites=len(found),
            forward_calls=total.forward.calls, forward_bytes=total.forward.bytes // found.images,
            backward_calls=total.backward.calls, backward_bytes=total.backward.bytes // found.images,
        )
        for form, total in found.total.items()
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    default = ["WRN-16-4", "WRN-28-10", "RaWRN-small", "ResNet-50", "ConvNeXt-T", "Swin-T"]
    parser.add_argument("--model", nargs="+", choices=MODELS, default=default)
    args = parser.parse_args()
    run({name: partial(counts, name) for name in args.model}, args.out)


if __name__ == "__main__":
    main()
