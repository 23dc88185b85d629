"""Do the fast tests notice a fault? Plants one at a time and runs the tests of its room until the first fails.

    make mutants MODULE=meansparse_fx/sites/gates.py              # all faults
    make mutants MODULE=meansparse_fx/sites/axis.py SAMPLE=40     # some, drawn by a fixed seed

Prints the survivors; those known to change nothing are in tests/mutants.md. A mutant runs in a fork of a process that
has torch loaded and nothing of this package, so that it costs its tests and not the imports.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 300  # of a mutant's tests; one that hangs is killed, in both senses

# Where a file's name begins so: the test files, the quickest to notice first.
TESTS = {
    "meansparse_fx/sites/dynamo": "backend",
    "meansparse_fx/sites/entrances": "backend",
    "meansparse_fx/sites/composites": "formulas sites",
    "meansparse_fx/sites/pointwise": "formulas sites",
    "meansparse_fx/sites": "sites fuse formulas transform fuzz_graphs",
    "meansparse_fx/passes/lower": "backend",
    "meansparse_fx/passes/inline": "backend",
    "meansparse_fx/passes/instrument": "backend",
    "meansparse_fx/passes/write_back": "backend",
    "meansparse_fx/passes/fuse": "fuse",
    "meansparse_fx/passes/surroundings": "fuse fuzz_graphs",
    "meansparse_fx/passes/overwrites": "fuse fuzz_graphs",
    "meansparse_fx/passes": "transform calibrate hooks fuse published",
    "meansparse_fx/statistics": "statistics fuzz_files calibrate transform",
    "meansparse_fx/calibrate": "calibrate fuzz_files distributed",
    "meansparse_fx/evaluate": "evaluate judge adaptive fuzz_files",
    "meansparse_fx/alpha": "alpha",
    "kernels/reference": "semantics operator_derivatives fused",
    "kernels/operator": "semantics operator_derivatives transform fused",
}

COMPARISONS = {
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
ARITHMETIC = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv},
}


def faults(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what could be in a node's place, with a word for it."""
    constant = ast.Constant
    match node:
        case ast.Compare(ops=[op, *rest]):
            new = COMPARISONS[type(op)]
            yield new.__name__, ast.Compare(node.left, [new(), *rest], node.comparators)
        case ast.BoolOp(values=values):
            for k in range(len(values)):
                rest = values[:k] + values[k + 1 :]
                yield f"without operand {k}", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        case ast.UnaryOp(op=ast.Not()):
            yield "without not", node.operand
        case ast.Constant(value=bool()):
            yield "other", constant(not node.value)
        case ast.Constant(value=int()):
            yield "one more", constant(node.value + 1)
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            yield "other arithmetic", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
        case ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break() | ast.Expr(value=ast.Call()):
            yield "dropped", ast.Pass()
        case ast.Call(args=[a, b, *rest]) if not any(isinstance(x, ast.Starred) for x in (a, b)):
            yield "arguments swapped", ast.Call(node.func, [b, a, *rest], node.keywords)
        case ast.If() | ast.IfExp() | ast.While():
            for value in (True, False) if not isinstance(node, ast.While) else (False,):
                changed = copy.copy(node)
                changed.test = constant(value)
                yield f"condition {value}", changed
        case ast.comprehension(ifs=[_, *_]):
            yield "without its if", ast.comprehension(node.target, node.iter, [], node.is_async)


def mutants(source: str) -> list[tuple[int, str, str]]:
    """Return (line, what, mutated source) of every fault; annotations, docstrings and decorators are left alone."""
    tree = ast.parse(source)
    left = {
        inner
        for node in ast.walk(tree)
        for outer in (
            *(getattr(node, "decorator_list", ())),
            *(a for a in (getattr(node, "annotation", None), getattr(node, "returns", None)) if a is not None),
            *([node] if isinstance(node, ast.JoinedStr | ast.Assert) else []),
        )
        for inner in ast.walk(outer)
    }
    found = []
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            for position, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or node in left:
                    continue
                for what, new in faults(node):
                    if isinstance(value, list):
                        value[position] = new
                    else:
                        setattr(parent, name, new)
                    line = getattr(node, "lineno", None) or node.target.lineno  # type: ignore[attr-defined]
                    found.append((line, what, ast.unparse(ast.fix_missing_locations(tree))))
                    if isinstance(value, list):
                        value[position] = node
                    else:
                        setattr(parent, name, node)
    return found


class Planted(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a source of its own."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_data(self, path):
        return self.source.encode()

    def get_filename(self, name):
        return str(self.path)


def noticed(path: Path, source: str, tests: list[str], quiet: bool = True) -> bool:
    """Return whether the tests fail, in a fork of this process, with ``source`` as the module at ``path``."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    name = re.sub(r"^kernels", "meansparse_fx.kernels", name)
    child = os.fork()
    if child == 0:
        os.setsid()
        if quiet:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1), os.dup2(silence, 2)
        sys.dont_write_bytecode = True
        sys.meta_path.insert(0, Planted(name, path, source))
        import pytest

        flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-m", "not slow"]
        try:
            failed = int(pytest.main([*flags, *tests])) != 0
        except BaseException:
            traceback.print_exc()
            failed = True
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(failed)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, default=0, help="how many faults of each module; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tests", default="", help="names of test files instead of the table's")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_MAX_EXAMPLES": "20"}
    os.chdir(ROOT)
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch.fx  # noqa: F401
    import torchvision  # noqa: F401

    for module in args.modules:
        path = (ROOT / module).resolve()
        planted = mutants(path.read_text())
        if 0 < args.sample < len(planted):
            planted = sorted(random.Random(str(module)).sample(planted, args.sample))
        row = next(names for start, names in TESTS.items() if str(module).startswith(start))
        tests = [f"tests/test_{name}.py" for name in (args.tests or row).split()]
        assert not noticed(path, path.read_text(), tests, quiet=False), f"{module}: the tests fail without a fault"
        began, killed = time.monotonic(), 0
        with ThreadPoolExecutor(args.workers) as pool:
            results = pool.map(lambda m, path=path, tests=tests: noticed(path, m[2], tests), planted)
            for (line, what, _), found in zip(planted, results, strict=True):
                killed += found
                if not found:
                    print(f"{module}:{line}: {what}: survives", flush=True)
        spent = time.monotonic() - began
        print(f"{module}: {killed} of {len(planted)} noticed in {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
