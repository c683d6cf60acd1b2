"""The rooms of the package: a file imports its own room and those above it, never one below, and never in a circle.

Imports inside functions and for the type checker count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "blip2"
ROOMS = (
    *("configs", "io", "ops", "metrics", "models", "data", "weights", "explain", "inference", "recipes", "training"),
    *("evaluation", "search", "capfilt", "server", "estimate", "cli"),
)
RANK = {name: rank for rank, name in enumerate(ROOMS)}
# Errors are everybody's; `__main__` starts the command line. Nothing else lies loose at the top.
RANK |= {"errors": 0, "__main__": RANK["cli"]}

FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
# The public face loads everything lazily, from any room.
LAYERED = [f for f in FILES if f != "__init__.py"]


def imports(source: str, file: str) -> Iterator[tuple[str, int]]:
    """Full dotted names that a file imports, functions' own imports included, with their lines.

    `from a import b` gives `a.b`: b may be a module. Relative imports are made absolute.
    """
    for node in ast.walk(ast.parse(source, filename=file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["blip2", *Path(file).parent.parts]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def layer_of(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def upward(source: str, file: str) -> list[str]:
    """One line for each import in `file` of a layer below its own."""
    rank = RANK[layer_of(file)]
    wrong = []
    for name, line in imports(source, file):
        parts = name.split(".")
        if parts[0] != "blip2":
            continue
        # `from blip2 import load` is the public face, which reaches every layer: for the command line only.
        target = RANK.get(parts[1], RANK["cli"]) if len(parts) > 1 else RANK["cli"]
        if target > rank and name != "blip2.__version__":
            wrong.append(f"src/blip2/{file}:{line} imports {name}")
    return wrong


def foreign(file: str) -> set[str]:
    """Top-level names of the packages outside blip2 that a file imports."""
    source = (PACKAGE / file).read_text(encoding="utf-8")
    return {name.split(".")[0] for name, _ in imports(source, file)} - {"blip2"}


@pytest.mark.parametrize("file", LAYERED)
def test_no_upward_import(file: str) -> None:
    assert layer_of(file) in RANK, f"src/blip2/{file} belongs to no layer: put it in one, or add the layer here"
    assert upward((PACKAGE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("ops/masks.py", "from blip2.models.qformer.model import QFormer", 1),
        ("ops/masks.py", "def f():\n    import blip2.training.trainer", 1),
        ("data/loader.py", "from blip2 import ops", 0),
        ("models/stage1.py", "from ..data import shards", 1),
        ("models/stage1.py", "from . import freezing\nfrom ..ops import masks", 0),
        ("training/trainer.py", "from blip2.evaluation import vqa", 1),
        ("data/loader.py", "from blip2 import load", 1),
        ("cli/main.py", "import blip2", 0),
        ("training/trainer.py", "from blip2 import __version__", 0),
        ("configs/run.py", "from blip2.errors import ConfigError", 0),
    ],
)
def test_the_check_sees_upward_imports(file: str, source: str, found: int) -> None:
    assert len(upward(source, file)) == found


@pytest.mark.parametrize("file", [f for f in FILES if layer_of(f) == "ops"])
def test_ops_need_only_torch(file: str) -> None:
    assert foreign(file) - sys.stdlib_module_names <= {"torch"}


@pytest.mark.parametrize("file", [f for f in FILES if f != "ops/devices.py"])
def test_one_way_out_of_torch(file: str) -> None:
    """bf16 has no numpy type, a card no numpy view: `blip2.ops.devices` brings tensors out, and nothing else does."""
    assert ways_out((PACKAGE / file).read_text(encoding="utf-8"), file) == []


def ways_out(source: str, file: str) -> list[str]:
    """Lines that turn a tensor into something else by themselves, or decide about processors by themselves."""
    wrong = []
    for node in ast.walk(ast.parse(source, filename=file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "item":
            wrong.append(f"src/blip2/{file}:{node.lineno} uses .item()")
        if isinstance(node, ast.Attribute) and node.attr in ("numpy", "tolist", "cpu"):
            module = isinstance(node.value, ast.Name) and node.value.id == "torch"  # torch.cpu
            if not module:
                wrong.append(f"src/blip2/{file}:{node.lineno} uses .{node.attr}")
    return wrong


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = model(y).numpy()", 1),
        ("x = y.float().cpu().tolist()", 2),
        ("x = y.item()", 1),
        ("import numpy\nx = to_numpy(y)", 0),
        ("x = torch.cpu._is_amx_tile_supported()", 0),
    ],
)
def test_the_check_sees_ways_out(source: str, found: int) -> None:
    assert len(ways_out(source, "x.py")) == found


@pytest.mark.parametrize("file", [f for f in FILES if layer_of(f) in ("configs", "errors")])
def test_configs_and_errors_need_only_the_standard_library(file: str) -> None:
    assert foreign(file) <= sys.stdlib_module_names


def test_nothing_lies_loose_at_the_top() -> None:
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "errors.py"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, "pretrained"}


def test_no_circle() -> None:
    graph = {module_name(file): within(file) for file in LAYERED}
    assert circles(graph) == []


def module_name(file: str) -> str:
    return ".".join(["blip2", *Path(file).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(file) for file in LAYERED}


def within(file: str) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for name, _ in imports((PACKAGE / file).read_text(encoding="utf-8"), file):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} - {"", module_name(file)}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other: what is left when those that import nothing left are taken away."""
    left = dict(graph)
    while done := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in done:
            del left[module]
    # those that only lead to a circle are not in one
    while outside := [module for module in left if not any(module in left[other] for other in left)]:
        for module in outside:
            del left[module]
    return [sorted(left)] if left else []


def test_the_check_sees_circles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("file", FILES)
def test_torchvision_is_never_imported(file: str) -> None:
    assert "torchvision" not in foreign(file)


@pytest.mark.parametrize("file", [f for f in FILES if layer_of(f) == "metrics"])
def test_metrics_take_numpy_and_strings(file: str) -> None:
    assert not foreign(file) & {"torch", "transformers"}


@pytest.mark.parametrize(("room", "other"), [("data", "models"), ("models", "data")])
def test_rooms_that_stay_strangers(room: str, other: str) -> None:
    for file in (f for f in FILES if layer_of(f) == room):
        source = (PACKAGE / file).read_text(encoding="utf-8")
        assert [name for name, _ in imports(source, file) if name.startswith(f"blip2.{other}.")] == [], file


@pytest.mark.parametrize("module", ["blip2.metrics.captioning", "blip2.metrics.retrieval", "blip2.training.report"])
def test_importing_it_brings_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
