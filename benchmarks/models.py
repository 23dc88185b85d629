"""Time whole models with operators beside their base, and beside the operator as others write it.

    python -m benchmarks.models [--model WRN-16-4 ResNet-50] [--batch 8] [--mode forward] [--out FILE]

Contenders: the base and the base compiled; the published module, and the same without its branch, in the place of
our operators, eager and compiled; ours, eager, eager and fused, and compiled by the plug-in. Ratios are to the base for
what runs eagerly, to the compiled base for what is compiled. A model whose package is not installed is skipped.
"""

import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import meansparse_fx as msfx

from .contenders import MODELS, with_form
from .contenders import build as build_model
from .facts import facts_of
from .harness import Row, measure, on_gpu, options, run

# What is computed: the images' gradient is what an attack asks for, the parameters' what training asks for.
MODES = ("forward", "images' gradient", "all gradients")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALPHA = 0.25
EXACT = 1e-6  # relative error allowed in float64, where no rounding moves a value across a band's edge
# The same in float32. What rounds otherwise moves a few values across a band's edge or a kink, and one such value in a
# late layer is 1 % of an image's gradient. A wrong mask or backward mode would be an error of 30 % and more.
TOLERANCE = {"forward": 1e-3, "images' gradient": 0.1, "all gradients": 0.1}

# Contender -> what its ratio refers to, and which contender's results it must reproduce.
CONTENDERS = {
    "base": ("base", "base"),
    "published module": ("base", "branch-free module"),
    "branch-free module": ("base", "branch-free module"),
    "ours": ("base", "branch-free module"),
    "ours, fused": ("base", "branch-free module"),
    "base compiled": ("base compiled", "base"),
    "published module compiled": ("base compiled", "branch-free module"),
    "branch-free module compiled": ("base compiled", "branch-free module"),
    "ours compiled": ("base compiled", "branch-free module"),
    "base reduce-overhead": ("base reduce-overhead", "base"),
    "ours reduce-overhead": ("base reduce-overhead", "branch-free module"),
}
COMPILED = {name for name, (base, _) in CONTENDERS.items() if base != "base"}


@dataclass(frozen=True, slots=True)
class Case:
    """What is run; as text it is the rows' case, and that text can be read again.

    Example:
        >>> text = "WRN-16-4 8x3x32x32 images' gradient channels_last"
        >>> Case.read(text).mode, str(Case.read(text)) == text
        ("images' gradient", True)
    """

    model: str
    batch: int
    side: int
    mode: str
    channels_last: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        words = [self.model, f"{self.batch}x3x{self.side}x{self.side}", self.mode]
        words += ["channels_last"] * self.channels_last + [self.dtype] * (self.dtype != "float32")
        return " ".join(words)

    @classmethod
    def read(cls, text: str) -> "Case":
        """Return the case of a row."""
        found = re.fullmatch(rf"(\S+) (\d+)x3x(\d+)x\d+ ({'|'.join(MODES)})( channels_last)?( bfloat16)?", text)
        if found is None:
            raise ValueError(f"{text!r} is no case of benchmarks.models")
        model, batch, side, mode, layout, dtype = found.groups()
        return cls(model, int(batch), int(side), mode, layout is not None, "bfloat16" if dtype else "float32")


def build(
    case: Case, device: str, dtype: torch.dtype, batch: int, compiled: bool
) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """Return the contenders, compiled ones not yet compiled, their images, and a gradient of their logits."""
    torch.manual_seed(0)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    model = build_model(case.model).to(device, dtype, memory_format=layout)
    images = torch.rand(batch, 3, case.side, case.side, device=device, dtype=dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        upstream = torch.randn_like(model(images))
    sparse = msfx.transform(model, images)
    settings = {"statistics": msfx.calibrate(sparse, [images], progress=False), "alpha": ALPHA}
    msfx.set_alpha(sparse, ALPHA)
    published, branch_free = with_form(sparse, "published"), with_form(sparse, "branch-free")
    contenders = {"base": model, "published module": published, "branch-free module": branch_free, "ours": sparse}
    if case.mode != "all gradients":  # the norms of the fused one are frozen
        frozen = copy.deepcopy(model).requires_grad_(False)
        contenders["ours, fused"] = msfx.transform(frozen, images, **settings, fuse="all")
    if compiled:
        for name in ("base", "published module", "branch-free module"):
            contenders[f"{name} compiled"] = torch.compile(contenders[name])
        contenders["ours compiled"] = torch.compile(model, backend="meansparse", options=settings)
    if compiled and images.is_cuda:  # CUDA graphs; of what `transform` returns, for a plug-in takes options, no mode
        for name in ("base", "ours"):
            contenders[f"{name} reduce-overhead"] = torch.compile(contenders[name], mode="reduce-overhead")
    return contenders, images, upstream


def calls_of(
    contender: nn.Module, images: Tensor, upstream: Tensor, mode: str
) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], Tensor] | None]:
    """Return the call to time, and the part of it that makes the graph for backward, if there is one.

    The call returns the logits, or the gradients of their product with ``upstream``.
    """
    parameters = {name.removeprefix("_orig_mod."): p for name, p in contender.named_parameters()}
    for parameter in parameters.values():
        parameter.requires_grad_(mode == "all gradients")
    if mode == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (contender(images),)

        return forward, None
    leaves = [images.clone().requires_grad_()]
    if mode == "all gradients":
        leaves += [parameters[name] for name in sorted(parameters)]
    return lambda: torch.autograd.grad(contender(leaves[0]), leaves, upstream), lambda: contender(leaves[0])


def state_of(name: str, contender: nn.Module) -> Iterable[Tensor]:
    """Return parameters and buffers, those that the plug-in holds too."""
    found = [*contender.parameters(), *contender.buffers()]
    if name == "ours compiled":
        found += [b for operator in msfx.compile_report(contender).operators.values() for b in operator.buffers()]
    return found


def check(results: dict[str, tuple[Tensor, ...]], what: str, tolerance: float, amplified: bool = False) -> None:
    """Raise unless every contender computed what its model computes, and the operators show in it.

    Args:
        amplified: Half of what leaving out all operators changes is allowed, if it is more: with random weights a deep
            network multiplies one moved value, to 2 % of the logits in ResNet-50, where leaving them out changes 7 %.
    """
    flat = {name: torch.cat([t.detach().flatten().double() for t in tensors]) for name, tensors in results.items()}

    def error(own: str, expected: str) -> float:
        return float((flat[own] - flat[expected]).norm() / flat[expected].norm())

    without = error("base", "branch-free module")
    if not without > 1e-4:
        raise AssertionError(f"{what}: operators change the result by {without:.1e} only: nothing would be seen")
    for name in flat:
        expected = CONTENDERS[name][1]
        if not (found := error(name, expected)) <= (max(tolerance, without / 2) if amplified else tolerance):
            raise AssertionError(f"{name}, {what}: relative error {found:.1e} against {expected}")


def check_exactly(case: Case, device: str) -> None:
    """Raise unless every eager contender computes in float64 what its model computes, and the operators show in it."""
    contenders, *given = build(case, device, torch.float64, 2, compiled=False)
    results = {name: calls_of(net, *given, case.mode)[0]() for name, net in contenders.items()}
    check(results, f"{case} in float64", EXACT)


def rows_of(case: Case, device: str, repetitions: int, compiled: bool = True, cold: bool = False) -> list[Row]:
    """Return the rows of one case, one a contender.

    Args:
        compiled: Compiled contenders take part.
        cold: Caches on disk are off, and the seconds of compiling are noted.
    """
    torch.compiler.reset()  # each case is compiled afresh
    check_exactly(case, device)
    contenders, *given = build(case, device, DTYPES[case.dtype], case.batch, compiled)
    calls, facts = {}, {}
    for name, contender in contenders.items():
        calls[name], graph = calls_of(contender, *given, case.mode)
        state = functools.partial(state_of, name, contender)
        facts[name] = facts_of(calls[name], graph, state, device, name in COMPILED, cold)
    if case.dtype == "float32":  # bfloat16 rounds ResNet-50's logits by 7 %, as much as operators change them
        # Without TF32, whose 10 bits would hide what is checked; what is timed runs as torch has it.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            results = {name: call() for name, call in calls.items()}
        check(results, case.mode, TOLERANCE[case.mode], amplified=True)
    baselines = {name: CONTENDERS[name][0] for name in calls}
    if device == "cuda":  # no graph holds the published module, which asks the device, or another graph
        makes = {name: (lambda call=call: call) for name, call in calls.items()}
        for name, own in on_gpu(makes, baselines, skip=("published module", *COMPILED)).items():
            facts[name] |= own
    return measure("models", str(case), calls, baselines, device, repetitions, facts)


def main() -> None:
    parser = options(__doc__, repetitions=21)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["WRN-16-4", "ResNet-50", "ConvNeXt-T", "Swin-T"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES[:2]))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--eager", action="store_true", help="leave the compiled contenders out")
    parser.add_argument("--cold", action="store_true", help="compile without caches on disk, and note the seconds")
    args = parser.parse_args()
    torch.compiler.config.force_disable_caches = args.cold
    cases = (
        Case(name, batch, MODELS[name][1], mode, args.channels_last, dtype)
        for name, batch, mode, dtype in itertools.product(args.model, args.batch, args.mode, args.dtype)
    )
    how = (args.device, args.repetitions, not args.eager, args.cold)
    calls = {str(case): functools.partial(rows_of, case, *how) for case in cases}
    run(calls, args.out)


if __name__ == "__main__":
    main()
