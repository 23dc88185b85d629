"""What the compiler made of the kernels, read without a GPU: ``python -m benchmarks.codegen``.

Every kernel is compiled ahead of time for each target with the launcher's own plan of a typical tensor, and its
machine code is read: registers, spills, shared memory, width of global accesses, divisions and instructions per
element. Instructions are counted statically, so both sides of a branch count; where there is a loop, its body alone.
"""

import inspect
import itertools
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from meansparse_fx.kernels import elementwise, layout, moments, reference
from meansparse_fx.kernels.device_activations import ACTIVATIONS, activation_constexprs
from meansparse_fx.kernels.layout import Layout, layout_of
from meansparse_fx.kernels.moments import Tiles, tiles_of

from .harness import options, show

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {  # what it is called, and a shape of it: a vector has one channel, contiguous ones, or at most two
    "rows": (64, 256, 56, 56),
    "columns": (64, 256, 56, 56),
    "7x7": (256, 2048, 7, 7),
}
KERNELS = {
    "forward": elementwise.forward_kernel,
    "backward": elementwise.backward_kernel,
    "moments": moments.moments_kernel,
}
# Tensor-sized reads and writes of each case, and the pointers that it gives; all others are None, which compiles their
# code away.
INPUT_NORM, SUM_NORM = (
    tuple(f"{of}_{name}_ptr" for name in ("mean", "variance", "weight", "bias")) for of in ("input", "sum")
)
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "forward": (1, 1, ()),
    "forward+norm+residual": (2, 1, (*INPUT_NORM, "residual_ptr")),
    "forward+norm+residual+sum": (2, 2, (*INPUT_NORM, "residual_ptr", "sum_ptr")),
    "forward+residual+sum+norm": (2, 2, ("residual_ptr", "sum_ptr", *SUM_NORM)),
    "forward+layerscale+shortcut": (2, 1, ("layer_scale_ptr", "shortcut_ptr")),
    "backward": (2, 1, ()),
    "backward+norm+residual": (3, 2, (*INPUT_NORM, "residual_ptr", "grad_v_ptr")),
    "backward+sum+norm": (3, 1, ("grad_sum_ptr", *SUM_NORM)),
    "backward+layerscale": (2, 1, ("layer_scale_ptr",)),
    "moments": (1, 0, ()),
    "moments+activation": (1, 1, ("y_ptr",)),
}
TENSOR_POINTERS = {
    "x_ptr", "y_ptr", "sum_ptr", "residual_ptr", "shortcut_ptr", "grad_ptr", "grad_sum_ptr", "grad_x_ptr", "grad_v_ptr"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to compile."""

    kernel: str
    activation: str
    dtype: str
    layout: str
    target: str
    variant: str = "mean"
    backward: str = "exact"

    @property
    def plan(self) -> tuple[Layout | Tiles, dict[str, Any], int]:
        """How the kernel walks a tensor of this layout, compiler options, and elements of a program or loop."""
        shape = LAYOUTS[self.layout]
        order = torch.channels_last if self.layout == "columns" else torch.contiguous_format
        strides = torch.empty(shape, device="meta", memory_format=order).stride()
        given = (shape, strides, strides, 1, DTYPES[self.dtype].itemsize)
        if self.kernel.startswith("moments"):
            tiles = tiles_of(*given)
            return tiles, moments.OPTIONS, tiles.block_rows * tiles.block_cols
        return (found := layout_of(*given)), layout.OPTIONS, layout.VECTORS * found.vector


def compile_case(case: Case) -> triton.compiler.CompiledKernel:
    """Return the kernel compiled for the case's target, pointers aligned to 16 bytes as torch allocates them."""
    function, activation = KERNELS[case.kernel.split("+")[0]], reference.ACTIVATIONS[case.activation]
    (plan, options, _), (_, _, pointers) = case.plan, CASES[case.kernel]
    known = activation_constexprs(case.activation, [value for _, value in activation.constants], None)
    known |= {"WEIGHT_STRIDE": 1, "VARIANT": case.variant, "BACKWARD": case.backward}
    known |= {"FROM_SUM": "grad_sum_ptr" in pointers} | plan.constexprs
    given = {"x_ptr", "grad_ptr", "grad_x_ptr", "centre_ptr", "threshold_ptr", "parts_ptr", *pointers}
    given |= {"y_ptr"} if case.kernel.startswith("forward") else set()
    given |= {"weight_ptr"} if activation.weight_backward else set()
    signature, constexprs, attributes = {}, {}, {}
    for at, name in enumerate(inspect.signature(function.fn).parameters):
        if name in known or (name.endswith("_ptr") and name not in given):
            signature[name], constexprs[name] = "constexpr", known.get(name)
        elif name.endswith("_ptr"):
            signature[name] = "*" + (case.dtype if name in TENSOR_POINTERS else "fp32")
            attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            wide = name.endswith("_multiplier")
            signature[name] = "fp32" if name.endswith(("steepness", "_eps")) else "i64" if wide else "i32"
    source = ASTSource(function, signature, constexprs, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compute capabilities that a later Triton drops
        return triton.compile(source, target=TARGETS[case.target], options=options)


def read_code(case: Case) -> dict[str, Any]:
    """Return the case and what its machine code shows.

    Accesses are bits to how often, ``streams`` tensors read and written.
    """
    compiled, (_, options, elements) = compile_case(case), case.plan
    amd = case.target.startswith("gfx")
    read = _amd(compiled.asm["amdgcn"]) if amd else _nvidia(compiled.asm["cubin"])
    registers, spilled, loads, stores, reciprocals, instructions = read
    per_thread = elements // (options["num_warps"] * (64 if amd else 32))
    return asdict(case) | {
        "elements_per_thread": per_thread,
        "streams": CASES[case.kernel][:2],
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "loads": dict(Counter(loads)),
        "stores": dict(Counter(stores)),
        "reciprocals_per_element": round(reciprocals / per_thread, 2),
        "instructions_per_element": round(instructions / per_thread, 1),
    }


# Registers, spilled bytes, the widths of loads and of stores in bits, reciprocals, instructions.
Read = tuple[int, int, list[int], list[int], int, int]


def _nvidia(cubin: bytes) -> Read:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*);", dump, re.MULTILINE)
    operations = [name for _, name, _ in lines if name.split(".")[0] not in ("NOP", "BRA")]  # padding and its loop
    jumps = [(int(at, 16), re.search(r"(0x[0-9a-f]+)\s*$", rest)) for at, name, rest in lines if name.startswith("BRA")]
    back = ((at, int(goal[1], 16)) for at, goal in jumps if goal)
    end, start = max(back, key=lambda jump: jump[0] - jump[1], default=(0, 0))
    body = sum(start <= int(at, 16) <= end for at, _, _ in lines) if end > start else len(operations)

    def widths(verb: str) -> list[int]:
        named = (re.search(r"\.[US]?(8|16|64|128|256)\b", name) for name in operations if name.startswith(verb))
        return [int(match[1]) if match else 32 for match in named]

    reciprocals = sum(name.startswith("MUFU.RCP") for name in operations)
    spilled = resources["STACK"] + resources["LOCAL"]
    return resources["REG"], spilled, widths("LDG"), widths("STG"), reciprocals, body


def _amd(assembly: str) -> Read:
    operations = re.findall(r"^\t([svb][a-z]*_[a-z0-9_]+|global_[a-z0-9_]+|ds_[a-z0-9_]+)", assembly, re.MULTILINE)
    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}

    def widths(verb: str) -> list[int]:
        pattern = rf"(?:global|buffer)_{verb}_({'|'.join(bits)})"
        return [bits[match[1]] for name in operations if (match := re.match(pattern, name))]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    reciprocals = sum(name.startswith("v_rcp") for name in operations)
    body = sum(name not in ("s_nop", "s_code_end", "s_endpgm") for name in operations)
    return number("vgpr_count"), spilled, widths("load"), widths("store"), reciprocals, body


def cases(targets: list[str], activations: list[str], dtypes: list[str]) -> Iterator[Case]:
    """Yield every kernel with every activation, then the other cases with ReLU."""
    for target, dtype, form in itertools.product(targets, dtypes, LAYOUTS):
        for activation, kernel in itertools.product(activations, ("forward", "backward")):
            yield Case(kernel, activation, dtype, form, target)
        for kernel in CASES:
            if kernel not in ("forward", "backward") and not (form == "7x7" and kernel.startswith("moments")):
                yield Case(kernel, "relu", dtype, form, target)
        for variant in ("edge", "smooth"):
            yield Case("forward", "relu", dtype, form, target, variant)
        for backward in ("identity", "smooth"):
            yield Case("backward", "relu", dtype, form, target, "mean", backward)


def cell(value: Any) -> str:
    """Return a fact as a cell of a table; accesses are written bits x count."""
    if isinstance(value, dict):
        return " ".join(f"{bits}x{count}" for bits, count in sorted(value.items(), reverse=True))
    return str(value)


def main() -> None:
    parser = options(__doc__, out="")
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--activation", nargs="*", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--dtype", nargs="*", default=["fp32", "bf16"], choices=list(DTYPES))
    args = parser.parse_args()
    codes = [read_code(case) for case in cases(args.target, args.activation, args.dtype)]
    heads = [name.replace("_", " ") for name in codes[0]]
    show(heads, (map(cell, code.values()) for code in codes), width=230, box=None)


if __name__ == "__main__":
    main()
