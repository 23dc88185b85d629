"""Imports only go down: the floor plan of the README, enforced."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import meansparse_fx
from meansparse_fx import kernels

PACKAGE = Path(meansparse_fx.__file__).parent
KERNELS = Path(kernels.__file__).parent

FLOORS = {
    "kernels": 0,
    "errors": 1,
    "copies": 1,
    "dataless": 1,
    "hooks": 1,
    "held_parts": 1,
    "hook_refusals": 1,
    "state": 1,
    "outputs": 1,
    "activations": 1,
    "formulas": 1,
    "arguments": 1,
    "artifacts": 1,
    "batches": 1,
    "names": 1,
    "published": 1,
    "data": 1,
    "plots": 1,
    "progress": 1,
    "seen": 1,
    "shards": 1,
    "tables": 1,
    "bundled": 1,
    "capture": 2,
    "sites": 2,
    "rewrite": 2,
    "nn": 3,
    "operator_state": 3,
    "observer": 3,
    "statistics": 3,
    "frozen": 3,
    "passes": 4,
    "operators": 4,
    "settings": 4,
    "transform": 5,
    "calibrate": 5,
    "alpha": 5,
    "evaluate": 5,
    "cost": 5,
    "zoo": 5,
    "report": 5,
    "compilation": 5,
    "compile_options": 5,
    "export": 5,
    "backend": 6,
    "cli": 6,
}


def imported_rooms(path: Path, root: Path, package: str) -> set[str]:
    """Return the first component under the package of everything a file of it imports."""
    module = [package, *path.relative_to(root).with_suffix("").parts]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*stem, a.name] for a in node.names] if stem[-1:] == [package] else [stem]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        rooms |= {n[1] for n in names if n[0] == "meansparse_fx" and len(n) > 1}
    return rooms


def rooms() -> list[tuple[str, Path]]:
    return [(p.relative_to(PACKAGE).parts[0].removesuffix(".py"), p) for p in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda v: v if isinstance(v, str) else v.name)
def test_imports_only_go_down(room: str, path: Path) -> None:
    if room in ("__init__", "__main__", "public"):
        pytest.skip("the front door")
    for other in imported_rooms(path, PACKAGE, "meansparse_fx"):
        assert FLOORS[other] <= FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


def test_rooms_of_one_floor_import_without_circles() -> None:
    graph = {room: set() for room in FLOORS}
    for room, path in rooms():
        if room in FLOORS:
            graph[room] |= imported_rooms(path, PACKAGE, "meansparse_fx") - {room}
    while graph:
        leaves = {room for room, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {room: needs for room, needs in graph.items() if room not in leaves}


def test_kernels_import_only_torch_and_triton() -> None:
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {node.module.split(".")[0]}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, f"{path.name} reaches out of kernels/"
                continue
            elif isinstance(node, ast.Import):
                roots = {a.name.split(".")[0] for a in node.names}
            else:
                continue
            assert roots <= sys.stdlib_module_names | {"torch", "triton"}, f"{path.name} imports {roots}"


@pytest.mark.parametrize("what", ["meansparse_fx.public", "meansparse_fx", "meansparse_fx.cli"])
def test_import_is_light(what) -> None:
    heavy = {"matplotlib", "jinja2", "torchvision", "timm", "triton", "robustbench"}
    if what != "meansparse_fx.public":
        heavy |= {"torch", "numpy", "safetensors"}  # help, and refusing a command, must not wait for them
    code = f"import sys, {what}; print([m for m in {sorted(heavy)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_room_does_not_hide_the_verb_of_its_name() -> None:
    code = "import meansparse_fx.cost, meansparse_fx as m; from meansparse_fx import cost; print(m.calibrate, cost)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("<function calibrate")
    assert " <function cost" in done.stdout
    missing = [name for name in meansparse_fx.__all__ if not hasattr(meansparse_fx, name)]
    assert not missing
