"""Transform a fixed list of models, and write what became of each as a table.

    python -m benchmarks.zoo [--extra] [--only PATTERN] [--fresh] [--out FILE]

Every RobustBench architecture, the families of timm and of torchvision, with random weights, cut short; on one core
about a quarter of an hour. With --extra instead models of transformers, segmentation_models_pytorch and open_clip,
which have to be installed, and torchvision's for segmentation; some minutes. Whatever `transform` itself has checked,
each transformed model is run here, and compared with its base in numbers. Seconds are those of the processor: other
work on the machine lengthens them a little, and wall time a lot. The CSV is written model by model: what it holds is
not measured again unless --fresh. `python -m benchmarks.page` makes docs/zoo.md from both CSVs.

zoo.json lists the models. RobustBench has one entry an architecture or forward code: its others differ from one of
these in size or weights. ``depths`` and ``widths`` are the largest arguments that its constructors get, ``extra`` what
the models of other libraries are made from.
"""

import contextlib
import gc
import importlib
import inspect
import json
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import meansparse_fx
from meansparse_fx.capture import capture
from meansparse_fx.outputs import difference, flatten
from meansparse_fx.sites import Placement, find_sites
from meansparse_fx.zoo import input_shape, load_model
from meansparse_fx.zoo import robustbench as robustbench_zoo

from .harness import RESULTS, Row, environment, options, read, run

SMALL = 96  # pixels; models that insist on a size of their own get it
_LISTED = json.loads(Path(__file__).with_suffix(".json").read_text())
MODELS, EXTRA = tuple(_LISTED["models"]), tuple(_LISTED["extra"])
FULL_SIZE = " (full size)"  # once more in full, for the seconds
_WIDTHS_MATTER = ("Kang2021", "Bai2023")  # other parts of them count on it
# Constructor arguments for timm: an image of 518 pixels would take longest of all.
_OPTIONS = {"vit_small_patch14_dinov2": {"img_size": 98}}


def build(name: str) -> nn.Module:
    """Return the model, in eval mode, its norms and biases away from the zeros and ones they start with."""
    torch.manual_seed(0)
    source, _, rest = name.removesuffix(FULL_SIZE).partition(":")
    if name in EXTRA:
        model = _extra(source, rest, _LISTED["extra"][name])
    elif source == "robustbench":
        with contextlib.nullcontext() if name.endswith(FULL_SIZE) else _small(rest):
            model = robustbench_zoo.architecture(rest)
    elif rest in _OPTIONS:
        model = importlib.import_module("timm").create_model(rest, **_OPTIONS[rest]).eval()
        size = _OPTIONS[rest]["img_size"]
        model.default_cfg = model.default_cfg | {"input_size": (3, size, size)}
    else:
        model = load_model(f"{source}:{rest}")
    perturb(model)
    return model


def _extra(source: str, name: str, given: dict[str, Any]) -> nn.Module:
    """Return a model of another library, which says what images it takes as timm's do."""
    library = importlib.import_module(source)
    size = given.get("image_size", 64)
    if source == "transformers":
        config = re.sub(r"(For[A-Z]\w+|Model)$", "Config", name)
        model = getattr(library, name)(getattr(library, config)(**given))
    elif source == "open_clip":
        text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
        model = library.CLIP(embed_dim=32, vision_cfg=given, text_cfg=text).visual
    elif source == "segmentation_models_pytorch":
        model = getattr(library, name)("resnet18", encoder_weights=None, classes=4)
    else:
        model = getattr(library, name)(weights=None, weights_backbone=None, num_classes=5)
    model.default_cfg = {"input_size": (3, size, size)}
    return model.eval()


@contextlib.contextmanager
def _small(name: str) -> Iterator[None]:
    keep_widths = any(word in name for word in _WIDTHS_MATTER)
    robustbench_zoo.entries()  # the architectures are imported
    with contextlib.ExitStack() as stack:
        for path, limits in _LISTED["depths"].items():
            file, _, cls = path.partition(".")
            owner = getattr(importlib.import_module(f"robustbench.model_zoo.architectures.{file}"), cls)
            limits = limits if keep_widths else limits | _LISTED["widths"].get(path, {})
            stack.enter_context(mock.patch.object(owner, "__init__", _limited(owner.__init__, limits)))
        yield


def _limited(init: Any, limits: dict[str, Any]) -> Any:
    signature = inspect.signature(init)

    def limited(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        for name, most in limits.items():
            value = bound.arguments[name]
            many = isinstance(most, list)
            bound.arguments[name] = [*map(min, value, most)] if many else min(value, most)
        init(*bound.args, **bound.kwargs)

    return limited


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move what starts at 0 or 1, or next to it: a branch that is scaled by zero hides every mistake made in it."""
    for parameter in model.parameters():
        if 1 < parameter.numel() == max(parameter.shape):
            parameter += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        held = module._buffers
        if isinstance(held.get("running_var"), torch.Tensor):
            held["running_mean"].normal_(std=0.1)
            held["running_var"].uniform_(0.5, 1.5)
            if "threshold" in held:  # a published operator; at 0 it would do nothing
                held["threshold"].fill_(0.2)


def measure(name: str) -> Row:
    """Return the row of one model: what became of it, or its error."""
    gc.collect()  # of the model before
    row, package = Row(model=name, **environment("cpu")), name.partition(":")[0].partition(".")[0]
    if name in EXTRA:
        row["torch"] += f" with {package} {importlib.import_module(package).__version__}"
    try:
        model = build(name)
        images, expected, forward = _first_forward(model)
        row |= {"image": images.shape[-1], "forward_cpu_s": forward}
        captured, row["capture_cpu_s"] = _timed(lambda: capture(model, images))
        given = (captured.graph_module, captured.route, images, Placement())
        _, row["find_cpu_s"] = _timed(lambda: find_sites(*given))
        sparse, row["transform_cpu_s"] = _timed(lambda: meansparse_fx.transform(model, images))
        plan = meansparse_fx.inspect(sparse)
        return row.but(
            route=plan.route,
            checked=captured.checked,
            rewritten=_counts(site.kind for site in plan.active),
            skipped=_counts(site.refusal.kind for site in plan if site.refusal),
            nodes=len(sparse.graph.nodes),
            equal=_difference(sparse(images), expected),
            gradient=_difference(_gradient(sparse, images), _gradient(model, images)),
        )
    except Exception as error:  # a row with its error, whatever it is
        text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
        # Paths of one machine mean nothing on another.
        return row.but(error=re.sub(r"/\S*/(?:site-packages|lib/python[\d.]+)/", "", text)[:600])


def _first_forward(model: nn.Module) -> tuple[Tensor, Any, float]:
    """Return images that the model takes, what it makes of them, and the seconds it takes for that."""
    own = input_shape(model)
    sizes = [own[-1]] if own[-1] < SMALL else [SMALL, own[-1]]
    while True:
        size = sizes.pop(0)
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            return images, *_timed(lambda images=images: model(images))
        except Exception:
            if not sizes:
                raise


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and the processor's seconds that it took."""
    start = time.process_time()
    return call(), round(time.process_time() - start, 3)


def _counts(words: Any) -> str:
    return " ".join(f"{word.replace(' ', '-')}:{count}" for word, count in Counter(words).items())


def _gradient(model: nn.Module, images: Tensor) -> Tensor | None:
    """Return the gradient of a combination of all that a model returns with respect to the images; None if none."""
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        parts = [t for t in flatten(model(images.clone()))[0] if isinstance(t, Tensor)]
        total = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in parts)
    return torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None


def _difference(actual: Any, expected: Any) -> str:
    if expected is None:
        return "none"
    if (words := difference(actual, expected)) != "computes something else than the model":
        return words or "bitwise"
    pairs = zip(flatten(actual)[0], flatten(expected)[0], strict=True)
    return f"{max(float((a - b).abs().max()) for a, b in pairs if isinstance(b, Tensor)):.1e}"


def main() -> None:
    parser = options(__doc__, out="[zoo.csv or zoo-extra.csv in benchmarks/results]")
    parser.add_argument("--extra", action="store_true", help="models of other libraries")
    parser.add_argument("--only", default="", metavar="PATTERN", help="models whose name matches this expression")
    parser.add_argument("--fresh", action="store_true", help="measure also what the CSV holds")
    args = parser.parse_args()
    os.environ["MEANSPARSE_FX_LOWERING"] = "eager"
    torch.backends.mha.set_fastpath_enabled(False)  # rounds differently, and transform turns it off, too
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")  # the libraries' own
    names = list(EXTRA if args.extra else MODELS)
    out = args.out or RESULTS / ("zoo-extra.csv" if args.extra else "zoo.csv")
    known = set() if args.fresh else {row.model for row in read(out)}
    asked = [name for name in names if re.search(args.only, name) and name not in known]
    calls = {name: lambda name=name: [measure(name)] for name in asked}
    run(calls, out)


if __name__ == "__main__":
    main()
