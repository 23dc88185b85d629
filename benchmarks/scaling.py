"""Time how transform grows with a model, and calibration with its data; and plan for a million images.

    python -m benchmarks.scaling [--depth 16 28 40 70] [--device cuda] [--out FILE]

- `transform`: WideResNets of growing depth, one image channel wide, so that time goes into the graph and not into
  convolutions. The baseline is four forward passes on the two example images.
- `calibration`: one convolution and one site, for growing numbers of images and of channels, beside the plain pass.
- `plan`: seconds that calibration on a million images takes on N devices. Two passes are measured, over B and over 2 B
  images; from them come the seconds that an image costs, and those that a pass costs once. Then

      seconds(N) = once + 1,000,000 / N * seconds an image costs + merging N statistics
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import meansparse_fx as msfx
from meansparse_fx.capture import capture

from .calibration import over
from .contenders import MODELS, WideResNet, build
from .harness import Call, Row, environment, in_turns, options, run

IMAGES = 1_000_000


class Clock:
    """What times calls in turns, and makes rows."""

    def __init__(self, device: str, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions

    def __call__(self, *calls: Call) -> list[float]:
        """Return the median seconds of each call."""
        times = in_turns({str(i): call for i, call in enumerate(calls)}, self.device, self.repetitions, warm_up=1)
        return [statistics.median(own) / 1e3 for own in times.values()]

    def row(self, what: str, case: str, size: int, unit: str, seconds: float, **more: Any) -> Row:
        """Return a row: ``size``, in ``unit``, is what grows."""
        known = {"what": what, "case": case, "size": size, "unit": unit, "seconds": seconds}
        return Row(**known, **more, repetitions=self.repetitions, **environment(self.device))

    def images(self, *shape: int) -> Tensor:
        """Return random images, after a seed for the model that is built next."""
        torch.manual_seed(0)
        return torch.rand(shape, device=self.device)


def passes(model: nn.Module, batches: list[Tensor]) -> tuple[Call, Call]:
    """Return calibration over the batches, and the plain pass over the same."""
    sparse = msfx.transform(model, batches[0][:2])
    return lambda: msfx.calibrate(sparse, batches, progress=False), over(batches, model)


def transform(clock: Clock, depth: int) -> Iterator[Row]:
    """Yield transform against nodes."""
    images = clock.images(2, 3, 32, 32)
    model = WideResNet(depth, 1).eval().to(clock.device)
    nodes = len(capture(model, images).graph_module.graph.nodes)
    seconds, beside = clock(lambda: msfx.transform(model, images), over([images] * 4, model))
    yield clock.row("transform", f"WRN-{depth}-1", nodes, "nodes", seconds, beside=beside)


def calibration(clock: Clock, count: int, width: int, unit: str, batch: int) -> Iterator[Row]:
    """Yield calibration on so many images, of one site of so many channels; ``unit`` is which of them grows."""
    batches = list(clock.images(count, 3, 32, 32).split(batch))
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()).eval().to(clock.device)
    size = count if unit == "images" else width
    seconds, beside = clock(*passes(model, batches))
    yield clock.row("calibration", f"{count} images, {width} channels", size, unit, seconds, beside=beside)


def plan(clock: Clock, name: str, batch: int, batches: int, devices: list[int]) -> Iterator[Row]:
    """Yield a model's measured passes, and the plan that follows from them."""
    side = MODELS[name][1]
    data = [clock.images(batch, 3, side, side)] * batches
    model = build(name).to(clock.device)
    (short, plain), (long, _) = passes(model, data), passes(model, data + data)
    half, whole, beside = clock(short, long, plain)
    count = batch * batches
    yield clock.row("calibration", name, count, "images", half, beside=beside)
    yield clock.row("calibration", name, 2 * count, "images", whole)
    once = min(max(0.0, 2 * half - whole), whole / 2)  # noise must not make an image cost nothing
    each = (whole - once) / (2 * count)
    sparse = msfx.transform(model, data[0][:2])
    one, other = (msfx.calibrate(sparse, [part], progress=False) for part in (data[0], 1 - data[0][:1]))
    (merging,) = clock(lambda: one.merge(other))
    for number in devices:
        seconds = once + IMAGES / number * each + (number - 1) * merging
        formula = f"{once:.3g} s + {IMAGES:,} images / {number} * {1e3 * each:.3g} ms"
        formula += f" + {number - 1} merges * {1e3 * merging:.3g} ms"
        yield clock.row("plan", name, number, "devices", seconds, formula=formula)


def main() -> None:
    parser = options(__doc__, repetitions=5)
    parser.add_argument("--depth", nargs="+", type=int, default=[16, 40, 94, 202, 286])
    parser.add_argument("--images", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--channels", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--plan", nargs="*", choices=MODELS, default=["WRN-16-4", "ResNet-50"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=1, help="of the plan's shorter pass")
    args = parser.parse_args()
    clock, fewest, narrowest = Clock(args.device, args.repetitions), min(args.images), min(args.channels)
    cases = {f"transform {depth}": partial(transform, clock, depth) for depth in args.depth}
    for count in args.images:
        cases[f"{count} images"] = partial(calibration, clock, count, narrowest, "images", args.batch)
    for width in args.channels:
        cases[f"{width} channels"] = partial(calibration, clock, fewest, width, "channels", args.batch)
    for name in args.plan:
        cases[f"plan {name}"] = partial(plan, clock, name, args.batch, args.batches, args.devices)
    run({name: lambda case=case: list(case()) for name, case in cases.items()}, args.out)


if __name__ == "__main__":
    main()
