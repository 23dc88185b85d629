"""Time how transform grows with a model, and calibration with its data; and plan for a million images.

    python -m benchmarks.scaling [--depth 16 28 40 70] [--device cuda] [--out FILE]

- `transform`: WideResNets of growing depth, one image channel wide, so that time goes into the graph and not into
  convolutions. The baseline is four forward passes on the two example images.
- `calibration`: one convolution and one site, for growing numbers of images and of channels, beside the plain pass.
- `plan`: seconds that calibration on a million images takes on N devices. Two passes are measured, over B and over 2 B
  images; from them come the seconds that an image costs, and those that a pass costs once. Then

      seconds(N) = once + 1,000,000 / N * seconds an image costs + merging N statistics
"""

import statistics
from argparse import Namespace
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


def seconds_of(args: Namespace, *calls: Call) -> list[float]:
    """Return the median seconds of each call, timed in turns."""
    times = in_turns({str(i): call for i, call in enumerate(calls)}, args.device, args.repetitions, warm_up=1)
    return [statistics.median(own) / 1e3 for own in times.values()]


def row(args: Namespace, what: str, case: str, size: int, unit: str, seconds: float, **more: Any) -> Row:
    """Return a row: ``size``, in ``unit``, is what grows."""
    known: dict[str, Any] = {"what": what, "case": case, "size": size, "unit": unit, "seconds": seconds}
    return Row(**known, **more, repetitions=args.repetitions, **environment(args.device))


def random_images(args: Namespace, *shape: int) -> Tensor:
    """Return random images, after a seed for the model that is built next."""
    torch.manual_seed(0)
    return torch.rand(shape, device=args.device)


def passes(model: nn.Module, batches: list[Tensor]) -> tuple[Call, Call]:
    """Return calibration over the batches, and the plain pass over the same."""
    sparse = msfx.transform(model, batches[0][:2])
    return lambda: msfx.calibrate(sparse, batches, progress=False), over(batches, model)


def transform(args: Namespace, depth: int) -> list[Row]:
    """Return transform against nodes."""
    images = random_images(args, 2, 3, 32, 32)
    model = WideResNet(depth, 1).eval().to(args.device)
    nodes = len(capture(model, images).graph_module.graph.nodes)
    seconds, beside = seconds_of(args, lambda: msfx.transform(model, images), over([images] * 4, model))
    return [row(args, "transform", f"WRN-{depth}-1", nodes, "nodes", seconds, beside=beside)]


def calibration(args: Namespace, count: int, width: int, unit: str) -> list[Row]:
    """Return calibration on so many images, of one site of so many channels; ``unit`` is which of them grows."""
    batches = list(random_images(args, count, 3, 32, 32).split(args.batch))
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()).eval().to(args.device)
    size = count if unit == "images" else width
    seconds, beside = seconds_of(args, *passes(model, batches))
    return [row(args, "calibration", f"{count} images, {width} channels", size, unit, seconds, beside=beside)]


def plan(args: Namespace, name: str) -> list[Row]:
    """Return a model's measured passes, and the plan that follows from them."""
    data = [random_images(args, args.batch, 3, MODELS[name][1], MODELS[name][1])] * args.batches
    model = build(name).to(args.device)
    (short, plain), (long, _) = passes(model, data), passes(model, data + data)
    half, whole, beside = seconds_of(args, short, long, plain)
    count = args.batch * args.batches
    rows = [row(args, "calibration", name, count, "images", half, beside=beside)]
    rows.append(row(args, "calibration", name, 2 * count, "images", whole))
    once = min(max(0.0, 2 * half - whole), whole / 2)  # noise must not make an image cost nothing
    each = (whole - once) / (2 * count)
    sparse = msfx.transform(model, data[0][:2])
    one, other = (msfx.calibrate(sparse, [part], progress=False) for part in (data[0], 1 - data[0][:1]))
    (merging,) = seconds_of(args, lambda: one.merge(other))
    for number in args.devices:
        seconds = once + IMAGES / number * each + (number - 1) * merging
        formula = f"{once:.3g} s + {IMAGES:,} images / {number} * {1e3 * each:.3g} ms"
        formula += f" + {number - 1} merges * {1e3 * merging:.3g} ms"
        rows.append(row(args, "plan", name, number, "devices", seconds, formula=formula))
    return rows


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
    fewest, narrowest = min(args.images), min(args.channels)
    cases = {f"transform {depth}": partial(transform, args, depth) for depth in args.depth}
    cases |= {f"{count} images": partial(calibration, args, count, narrowest, "images") for count in args.images}
    cases |= {f"{width} channels": partial(calibration, args, fewest, width, "channels") for width in args.channels}
    run(cases | {f"plan {name}": partial(plan, args, name) for name in args.plan}, args.out)


if __name__ == "__main__":
    main()
