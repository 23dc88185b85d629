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
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.capture import capture
from meansparse_fx.errors import ModelError

from .calibration import over
from .contenders import MODELS, WideResNet
from .contenders import build as build_model
from .harness import Call, in_turns, options, place, report

IMAGES = 1_000_000


@dataclass(frozen=True, slots=True)
class Scaling:
    """One measurement; the fields are the CSV's columns.

    Attributes:
        what: ``transform``, ``calibration`` or ``plan``, ``case`` of which model.
        size: What grows, in ``unit``: nodes of the graph; images; channels; devices.
        seconds: Of transform or of the pass, a median; of the plan, computed.
        beside: Seconds of the baseline: four forward passes on the example images; the plain pass over the same images.
        formula: What a plan was computed from.
    """

    what: str
    case: str
    size: int
    unit: str
    seconds: float
    beside: float | None
    formula: str
    repetitions: int
    device: str
    torch: str
    threads: int


Figures = tuple[str, str, int, str, float, float | None, str]  # the first columns
Timed = Callable[..., list[float]]  # returns the median seconds of each call that it is given


def transform_rows(timed: Timed, device: str, depths: list[int]) -> Iterator[Figures]:
    """Yield transform against nodes, one a depth."""
    images = torch.rand(2, 3, 32, 32, device=device)
    for depth in depths:
        torch.manual_seed(0)
        model = WideResNet(depth, 1).eval().to(device)
        nodes = len(capture(model, images).graph_module.graph.nodes)
        transform, beside = timed(lambda model=model: msfx.transform(model, images), over([images] * 4, model))
        yield "transform", f"WRN-{depth}-1", nodes, "nodes", transform, beside, ""


def calibration_rows(
    timed: Timed, device: str, images: list[int], channels: list[int], batch: int
) -> Iterator[Figures]:
    """Yield calibration against images at the least channels, and against channels at the least images."""
    sizes = [(count, min(channels), count, "images") for count in images]
    sizes += [(min(images), count, count, "channels") for count in channels]
    for count, width, size, unit in sizes:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()).eval().to(device)
        calls = passes(model, list(torch.rand(count, 3, 32, 32, device=device).split(batch)))
        yield "calibration", f"{count} images, {width} channels", size, unit, *timed(*calls), ""


def passes(model: nn.Module, batches: list[torch.Tensor]) -> tuple[Call, Call]:
    """Return calibration over the batches, and the plain pass over the same."""
    sparse = msfx.transform(model, batches[0][:2])
    return lambda: msfx.calibrate(sparse, batches, progress=False), over(batches, model)


def plan_rows(timed: Timed, device: str, name: str, batch: int, batches: int, devices: list[int]) -> Iterator[Figures]:
    """Yield a model's measured passes, and the plan that follows from them."""
    torch.manual_seed(0)
    side = MODELS[name][1]
    model = build_model(name).to(device)
    data = [torch.rand(batch, 3, side, side, device=device)] * batches
    (short, plain), (long, _) = passes(model, data), passes(model, data + data)
    half, whole, beside = timed(short, long, plain)
    count = batch * batches
    yield "calibration", name, count, "images", half, beside, ""
    yield "calibration", name, 2 * count, "images", whole, None, ""
    once = min(max(0.0, 2 * half - whole), whole / 2)  # noise must not make an image cost nothing
    each = (whole - once) / (2 * count)
    sparse = msfx.transform(model, data[0][:2])
    one, other = (msfx.calibrate(sparse, [part], progress=False) for part in (data[0], 1 - data[0][:1]))
    (merging,) = timed(lambda: one.merge(other))
    for number in devices:
        seconds = once + IMAGES / number * each + (number - 1) * merging
        formula = f"{once:.3g} s + {IMAGES:,} images / {number} * {1e3 * each:.3g} ms"
        formula += f" + {number - 1} merges * {1e3 * merging:.3g} ms"
        yield "plan", name, number, "devices", seconds, None, formula


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

    def timed(*calls: Call) -> list[float]:
        times = in_turns({str(i): call for i, call in enumerate(calls)}, args.device, args.repetitions, warm_up=1)
        return [statistics.median(own) / 1e3 for own in times.values()]

    found = [*transform_rows(timed, args.device, args.depth)]
    found += calibration_rows(timed, args.device, args.images, args.channels, args.batch)
    for name in args.plan:
        try:
            found += plan_rows(timed, args.device, name, args.batch, args.batches, args.devices)
        except ModelError as reason:
            print(f"skipped the plan for {name}: {reason}")
    rows = [Scaling(*figures, args.repetitions, **place(args.device)) for figures in found]
    shown = ("what", "case", "size", "unit", "seconds", "beside", "formula")
    report(rows, args.out, f"scaling on {rows[0].device}, {rows[0].threads} threads", shown)


if __name__ == "__main__":
    main()
