"""Do the fast tests notice a fault? Plants one at a time and runs the tests that reach its line until one fails.

    make mutants MODULE=meansparse_fx/sites/gates.py              # all faults
    make mutants MODULE=meansparse_fx/sites/axis.py SAMPLE=40     # some, drawn by a fixed seed; SEED=1 draws others
    make mutants MODULE=meansparse_fx/sites/axis.py AGAIN=log     # those that survived the run that printed this

Prints the survivors; what is known of them is in tests/mutants.md. One process imports torch, the package and the tests
of its room and notes which test runs which lines, and how long it takes. A mutant is a fork of it in which functions
have the code of the mutated source, so that it costs its tests alone, the quickest first. What is not inside a function
(a table, a default) takes effect on import: such a mutant is a fork of a process with nothing of this package.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib.abc
import importlib.util
import mmap
import os
import pickle
import random
import re
import resource
import signal
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest

ROOT = Path(__file__).parent.parent
SECONDS = 40  # of a mutant's tests, as long as they take without a fault; one that takes four times that is killed

# Where a file's name begins so: the test files, the quickest to notice first.
TESTS = {
    "meansparse_fx/sites/aliases": "sites fuse formulas transform backend",
    "meansparse_fx/sites/dynamo": "backend",
    "meansparse_fx/sites/inlined": "backend",
    "meansparse_fx/sites/residual": "published",
    "meansparse_fx/sites/composites": "formulas sites",
    "meansparse_fx/sites/pointwise": "formulas sites",
    "meansparse_fx/sites/find": "sites published activations fuse formulas transform",
    "meansparse_fx/sites/plan": "alpha sites published formulas transform arguments",
    "meansparse_fx/sites/placements": "sites published arguments",
    "meansparse_fx/sites/ops": "sites fuse activations formulas published transform hooks",
    "meansparse_fx/sites/candidates": "sites published formulas",
    "meansparse_fx/sites/shapes": "sites tracing hooks backend derivatives",
    "meansparse_fx/sites": "sites fuse activations formulas transform fuzz_graphs hooks",
    "meansparse_fx/passes/lower": "backend",
    "meansparse_fx/passes/inline": "backend",
    "meansparse_fx/passes/logits": "outputs evaluate adaptive",
    "meansparse_fx/passes/readout": "judge",
    "meansparse_fx/passes/reveal": "adaptive",
    "meansparse_fx/passes/instrument": "backend",
    "meansparse_fx/passes/write_back": "backend",
    "meansparse_fx/passes/added": "settings transform hooks",
    "meansparse_fx/passes/fuse": "fuse hooks",
    "meansparse_fx/passes/surroundings": "fuse hooks",
    "meansparse_fx/passes": "transform calibrate hooks fuse published",
    "meansparse_fx/statistics": "statistics settings calibrate report fuzz_files",
    "meansparse_fx/calibrate": "calibrate fuzz_files distributed",
    "meansparse_fx/evaluate/attacks": "adaptive evaluate segmentation",
    "meansparse_fx/evaluate/planted": "judge evaluate",
    "meansparse_fx/evaluate/probes": "judge evaluate segmentation",
    "meansparse_fx/evaluate/provenance": "settings evaluate seen",
    "meansparse_fx/evaluate": "evaluate judge adaptive segmentation report fuzz_files",
    "meansparse_fx/alpha": "alpha report evaluate",
    "meansparse_fx/nn": "semantics transform state published settings hooks fuse",
    "meansparse_fx/operator_state": "semantics transform state published settings hooks fuse",
    "meansparse_fx/operators": "transform semantics state published settings arguments",
    "meansparse_fx/frozen": "fuse hooks derivatives",
    "meansparse_fx/settings": "settings fuzz_files",
    "kernels/launch": "kernels/launch kernels/layout",
    "kernels/layout": "kernels/layout kernels/launch semantics fused",
    "kernels": "semantics operator_derivatives fused compiled fuse",
}

COMPARISONS = {
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
ARITHMETIC = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv},
}

# Arguments that only assert, that say where a warning points, and looks of figures.
HARMLESS = {
    "strict",
    "stacklevel",
    "linewidth",
    "lw",
    "elinewidth",
    "zorder",
    "ms",
    "mew",
    "markersize",
    "capsize",
    "pad",
}
SYMMETRIC = {"max", "min", "equal", "hypot", "maximum", "minimum"}  # functions of which swapped arguments are no fault


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
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in SYMMETRIC:
            return
        case ast.Call(args=[a, b, *rest]) if not any(isinstance(x, ast.Starred) for x in (a, b)):
            if ast.dump(a) != ast.dump(b):
                yield "arguments swapped", ast.Call(node.func, [b, a, *rest], node.keywords)
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.If() | ast.IfExp() | ast.While():
            for value in (True, False) if not isinstance(node, ast.While) else (False,):
                changed = copy.copy(node)
                changed.test = constant(value)
                yield f"condition {value}", changed
        case ast.comprehension(ifs=[_, *_]):
            yield "without its if", ast.comprehension(node.target, node.iter, [], node.is_async)


class Mutant(NamedTuple):
    """A fault: where, what, and the code of the whole module with it. ``late`` if it lies inside a function."""

    path: Path
    line: int
    column: int
    what: str
    late: bool
    code: types.CodeType

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}:{self.column}: {self.what}"


def mutants(path: Path) -> list[Mutant]:
    """Return every fault of a file; annotations, docstrings, decorators and the words of errors are left alone."""
    tree = ast.parse(path.read_text())
    left, late = set(), set()
    for node in ast.walk(tree):
        outer = [
            *getattr(node, "decorator_list", ()),
            getattr(node, "annotation", None),
            getattr(node, "returns", None),
        ]
        outer += [node.exc] if isinstance(node, ast.Raise) else []
        outer += [node] if isinstance(node, ast.JoinedStr | ast.Assert) else []
        outer += [node.value] if isinstance(node, ast.keyword) and node.arg in HARMLESS else []
        left |= {inner for part in outer if part is not None for inner in ast.walk(part)}
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            body = node.body if isinstance(node.body, list) else [node.body]
            late |= {inner for part in body for inner in ast.walk(part)}
    found = []
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            for position, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or node in left:
                    continue
                place = node.target if isinstance(node, ast.comprehension) else node
                for what, new in faults(node):
                    for inner in ast.walk(new):
                        if hasattr(place, "lineno") and "lineno" in inner._attributes and not hasattr(inner, "lineno"):
                            ast.copy_location(inner, place)
                    if isinstance(value, list):
                        value[position] = new
                    else:
                        setattr(parent, name, new)
                    code = compile(tree, str(path), "exec", dont_inherit=True)
                    found.append(Mutant(path, place.lineno, place.col_offset + 1, what, node in late, code))
                    if isinstance(value, list):
                        value[position] = node
                    else:
                        setattr(parent, name, node)
    return found


def functions(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the codes inside a code, and their codes."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from functions(constant)


def place(code: types.CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return re.sub(r"^kernels", "meansparse_fx.kernels", name)


class Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a code of its own."""

    def __init__(self, mutant: Mutant) -> None:
        self.name, self.mutant = module_name(mutant.path), mutant

    def find_spec(self, name, path, target=None):
        if name == self.name:
            return importlib.util.spec_from_file_location(name, self.mutant.path, loader=self)
        return None

    def exec_module(self, module):
        exec(self.mutant.code, module.__dict__)


def forked(jobs: Iterable[Callable[[], int]], workers: int) -> Iterator[tuple[int, int]]:
    """Run each job in a fork, ``workers`` at once; yield its position and what it returns, -9 or so if it is killed."""
    running: dict[int, int] = {}

    def finished() -> tuple[int, int]:
        pid, status = os.wait()
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return running.pop(pid), os.waitstatus_to_exitcode(status)

    for position, job in enumerate(jobs):
        if len(running) == workers:
            yield finished()
        if pid := os.fork():
            running[pid] = position
            continue
        try:
            os.setpgrp()
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1), os.dup2(silence, 2)
            sys.dont_write_bytecode = True
            code = job()
        except BaseException:
            code = 1
        os._exit(code)
    while running:
        yield finished()


def limited() -> None:
    """Have the system kill this process if it hangs or takes all memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS * 4, SECONDS * 4))
    resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
    signal.alarm(SECONDS * 10)


UNPLANTED = 77
FLAGS = [
    "-q",
    "-s",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-m",
    "not slow",
    "-o",
    "tmp_path_retention_policy=failed",
]


class Limit:
    """A plug-in that ends the tests after their time; without a failure until then the mutant survives."""

    reached = False

    def pytest_runtestloop(self) -> None:
        self.began = time.process_time()

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.process_time() - self.began > SECONDS:
            self.reached, item.session.shouldstop = True, "time is up"


def imported(mutant: Mutant, tests: list[str]) -> int:
    """Run tests, in a process that has not imported the package, with the mutant in place of its module."""
    limited()
    sys.meta_path.insert(0, Planted(mutant))
    limit = Limit()
    code = int(pytest.main([*FLAGS, "-x", *tests], plugins=[limit]))
    return 0 if limit.reached and code == pytest.ExitCode.INTERRUPTED else code


def apart(job: Callable[[], Any]) -> Any:
    """Return what a fork returns: of pytest, which runs once in a process."""
    with tempfile.TemporaryFile() as file:
        if pid := os.fork():
            os.waitpid(pid, 0)
            file.seek(0)
            return pickle.load(file)
        file.write(pickle.dumps(job()))
        file.flush()
        os._exit(0)


def report(mutant: Mutant, code: int) -> tuple[str, str]:
    """Print and return what became of a fault: nothing if a test noticed it."""
    outcome = {0: "survives", UNPLANTED: "is not planted"}.get(code, "")
    if outcome or code < 0:
        print(f"{mutant}: {outcome or 'killed at the limit'}", flush=True)
    return str(mutant), outcome


def paths(row: str) -> list[str]:
    """Return the test files of a row of `TESTS`."""
    return [str(Path("tests", name).with_name(f"test_{Path(name).name}.py")) for name in row.split()]


class Run:
    """A plug-in that runs, once the tests are collected, each mutant's in a fork."""

    def __init__(self, planted: list[Mutant], workers: int) -> None:
        self.planted, self.workers = planted, workers
        self.outcomes: list[tuple[str, str]] = []
        self.files = {str(m.path) for m in planted}
        self.reached: dict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
        self.seconds: dict[pytest.Item, float] = {}

    def outcomes_with(self, tests: list[str]) -> list[tuple[str, str]]:
        pytest.main([*FLAGS, *tests], plugins=[self])
        return self.outcomes

    def passes(self, item: pytest.Item) -> bool:
        self.failed = False
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)  # with the warnings that it is to ignore
        return not self.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def trace(self, items: list[pytest.Item], path: Path) -> int:
        """Run tests without a fault; write, for each, its position, the seconds it takes and the lines it reaches."""
        tracer = coverage.Coverage(data_file=None, config_file=False, include=list(self.files))
        tracer.set_option("run:disable_warnings", ["no-data-collected"])
        tracer.start()
        found = []
        for position, item in enumerate(items):
            tracer.switch_context(str(position))
            began = time.process_time()
            passed = self.passes(item)
            found.append((position, time.process_time() - began, passed, set()))
        tracer.stop()
        for file in self.files:
            for line, contexts in tracer.get_data().contexts_by_lineno(file).items():
                for position in filter(None, contexts):
                    found[int(position)][3].add((file, line))
        path.write_bytes(pickle.dumps(found))
        return 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        assert not session.testsfailed, "tests cannot be imported"
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            parts = [(session.items[k :: self.workers], Path(folder, str(k))) for k in range(self.workers)]
            list(forked((lambda part=part: self.trace(*part) for part in parts), self.workers))
            for items, path in parts:
                for position, seconds, passed, lines in pickle.loads(path.read_bytes()):
                    self.seconds[items[position]] = seconds
                    for line in lines if passed else ():
                        self.reached[line].append(items[position])
                    if not passed:
                        print(f"{items[position].nodeid}: fails without a fault", flush=True)
        print(f"{len(session.items)} tests reach their lines in {time.monotonic() - began:.0f} s", flush=True)
        for file in self.files:  # what the package imports only when it is used
            importlib.import_module(module_name(Path(file)))
        named = defaultdict(list)
        for f in gc.get_objects():
            if type(f) is types.FunctionType and f.__code__.co_filename in self.files:
                named[place(f.__code__)].append(f)
        notices = mmap.mmap(-1, len(session.items))  # of each test, how many mutants it noticed; forks write it
        number = {item: k for k, item in enumerate(session.items)}
        gc.freeze()

        def noticed(mutant: Mutant) -> int:
            limited()
            pairs = [(f, code) for code in functions(mutant.code) for f in named.get(place(code), ())]
            if all(f.__code__ == code for f, code in pairs):
                return UNPLANTED
            try:
                for f, code in pairs:
                    f.__code__ = code
            except ValueError:  # it reads other variables from around it
                return UNPLANTED
            spent = 0.0
            reached = self.reached[str(mutant.path), mutant.line]
            for item in sorted(reached, key=lambda i: self.seconds[i] / (1 + 9 * notices[number[i]])):
                spent += self.seconds[item]
                if spent > SECONDS:
                    return 0
                if not self.passes(item):
                    notices[number[item]] = min(notices[number[item]] + 1, 255)
                    return 1
            return 0

        for position, code in forked((lambda m=m: noticed(m) for m in self.planted), self.workers):
            self.outcomes.append(report(self.planted[position], code))
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", type=Path)
    parser.add_argument(
        "--sample", type=int, default=0, help="how many faults, of all modules together; all by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws another sample")
    parser.add_argument("--again", type=Path, help="what an earlier run printed: only its survivors are planted")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tests", default="", help="names of test files instead of the table's")
    # Of its own: what is not kept, pytest does not lock, and runs beside this one would remove it under a test.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = folder
        plant(parser.parse_args())


def plant(args: argparse.Namespace) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_MAX_EXAMPLES": "20"}
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # tests import benchmarks
    import safetensors.torch  # noqa: F401
    import torch.fx  # noqa: F401
    import torchvision  # noqa: F401

    rows: dict[Mutant, str] = {}  # of each fault, the tests that are to notice it
    for module in args.modules:
        found = mutants((ROOT / module).resolve())
        if args.again:
            survivors = {line.removesuffix(": survives") for line in args.again.read_text().splitlines()}
            found = [m for m in found if str(m) in survivors]
        row = args.tests or next(row for start, row in TESTS.items() if str(module).startswith(start))
        rows |= dict.fromkeys(found, row)
    planted = list(rows)
    if 0 < args.sample < len(planted):
        planted = random.Random(args.seed).sample(planted, args.sample)
    early = [m for m in planted if not m.late]
    runs = {row: Run([m for m in planted if m.late and rows[m] == row], args.workers) for row in rows.values()}
    outcomes = []
    for position, code in forked((lambda m=m: imported(m, paths(rows[m])) for m in early), args.workers):
        outcomes.append(report(early[position], code))
    for row, run in runs.items():
        if run.planted:
            outcomes += apart(lambda row=row, run=run: run.outcomes_with(paths(row)))
    for module in [*args.modules, ""]:
        own = [outcome for mutant, outcome in outcomes if mutant.startswith(str(module))]
        missing = f", {own.count('is not planted')} not planted" if "is not planted" in own else ""
        print(f"{module or 'together'}: {own.count('')} of {len(own)} noticed{missing}")


if __name__ == "__main__":
    main()
