"""The house of the code: who imports what, who touches the outside world, names, docstrings, sizes.

Every rule is a function from a package folder to the list of its violations, so that the same rule runs
over this repository and over a folder with one planted violation.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Areas: the first folder or file below planner/. Formulas and data stand on the standard library.
LIGHT = {
    "accuracy",
    "allocator",
    "advise",
    "catalog",
    "compare",
    "errors",
    "estimate",
    "export",
    "model",
    "record",
    "report",
    "spec",
    "targets",
    "units",
    "version",
}
TORCH = {"torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "liger_kernel"}
PAGE = {"streamlit", "plotly", "pandas"}
THIRD_PARTY = {
    **dict.fromkeys(LIGHT | {"__init__", "__main__"}, frozenset[str]()),
    "cli": frozenset({"rich"}),
    "training": TORCH | {"huggingface_hub"},
    "simulate": TORCH,
    "measure": TORCH,
    "dashboard": PAGE,
}
# ... and late alone: the hub's client, the HTTP package it uses, a sweep's file format and its cluster.
LATE = {("catalog/hub.py", "huggingface_hub"), ("catalog/hub.py", "?")}
LATE |= {("sweep/tables.py", "pyarrow"), ("sweep/on_ray.py", "ray")}
LATE |= {("dashboard/sweep_files.py", "pyarrow")}

# Modules that reach the clock, the disk, the environment or other processes, and functions that do.
OUTSIDE_MODULES = {
    "datetime",
    "glob",
    "io",
    "os",
    "pathlib",
    "random",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "time",
}
OUTSIDE_CALLS = {"open", "print", "input", "breakpoint"}
ABOVE = {"cli", "dashboard", "measure", "simulate", "training"}  # what formulas and data may not know of
MOST_LINES = 350
HEAVY = TORCH | PAGE | {"numpy", "huggingface_hub", "pyarrow", "ray"}


@dataclass(frozen=True)
class Import:
    """One import statement: the dotted name, its line, and whether it stands inside a function."""

    name: str
    line: int
    late: bool


def sources(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """(path below the package, syntax tree) of every Python file."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), ast.parse(path.read_text(), str(path))


def area(path: str) -> str:
    """`estimate/peak.py` -> `estimate`, `spec.py` -> `spec`."""
    return path.partition("/")[0].removesuffix(".py")


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every absolute import, wherever it stands; those under `if TYPE_CHECKING` are never run."""

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                yield Import(module, child.lineno, late)
                if module == "planner":
                    yield from (Import(f"planner.{alias.name}", child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(
                ("import_module", "__import__")
            ):
                yield Import(_leading_text(child), child.lineno, late)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, late or inside)

    yield from walk(tree, False)


def _leading_text(call: ast.Call) -> str:
    """The name that `import_module` is given, as far as it is written out; "?" for a computed one."""
    name = call.args[0] if call.args else None
    if isinstance(name, ast.JoinedStr):
        name = name.values[0]
    return str(name.value) if isinstance(name, ast.Constant) else "?"


def foreign_imports(package: Path) -> list[str]:
    """Third-party packages imported where they may not be, or early where only late is allowed."""
    found = []
    for path, tree in sources(package):
        for item in imports(tree):
            top = item.name.partition(".")[0]
            if not top or top in sys.stdlib_module_names or top == "planner":
                continue
            if top in THIRD_PARTY.get(area(path), frozenset()) or (item.late and (path, top) in LATE):
                continue
            found.append(f"{path}:{item.line} imports {item.name}")
    return found


def relative_imports(package: Path) -> list[str]:
    """One way to name a module: in full."""
    return [
        f"{path}:{item.line} imports {item.name}"
        for path, tree in sources(package)
        for item in imports(tree)
        if item.name.startswith(".")
    ]


def upward_imports(package: Path) -> list[str]:
    """Formulas and data that know of torch code, shell or page; torch code that knows of those two."""
    found = []
    for path, tree in sources(package):
        forbidden = ABOVE if area(path) in LIGHT else {"cli", "dashboard"}
        if area(path) in {"cli", "dashboard", "__init__", "__main__"}:
            continue
        for item in imports(tree):
            parts = item.name.split(".")
            if parts[0] == "planner" and len(parts) > 1 and parts[1] in forbidden:
                found.append(f"{path}:{item.line} imports {item.name}")
    return found


def outside_world(package: Path) -> list[str]:
    """The clock, the disk, the environment and the screen, where only formulas should be."""
    found = []
    for path, tree in sources(package):
        if area(path) not in LIGHT:
            continue
        reads_files = area(path) == "catalog"
        allowed = {"os", "pathlib", "subprocess", "tempfile"} if reads_files else set()
        if path == "catalog/hub.py":
            allowed.add("time")  # the time limit of a transfer
        for item in imports(tree):
            top = item.name.partition(".")[0]
            if top in OUTSIDE_MODULES - allowed:
                found.append(f"{path}:{item.line} imports {item.name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                name = node.func.id
                if name in OUTSIDE_CALLS and not (name == "open" and reads_files):
                    found.append(f"{path}:{node.lineno} calls {name}")
    return found


def page_arithmetic(package: Path) -> list[str]:
    """torch code inside the page's process: it starts child processes instead."""
    return [
        f"{path}:{item.line} imports {item.name}"
        for path, tree in sources(package)
        if area(path) == "dashboard"
        for item in imports(tree)
        if item.name.startswith("planner.training")
    ]


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Public functions and classes of a module, and the public methods of those classes."""
    for node in tree.body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, Definition) and not child.name.startswith("_"):
                    yield f"{node.name}.{child.name}", child


def missing_docstrings(package: Path) -> list[str]:
    """Modules, public classes, functions and methods without a docstring.

    Left out: `forward`, `backward` and `extra_repr`, whose contract is torch's; setters of a property.
    """
    found = []
    for path, tree in sources(package):
        if tree.body and not ast.get_docstring(tree):
            found.append(f"{path} has no docstring")
        for name, node in public_definitions(tree):
            last = name.rpartition(".")[2]
            setter = any(ast.unparse(d).endswith(".setter") for d in node.decorator_list)
            if last in {"forward", "backward", "extra_repr"} or setter:
                continue
            if not ast.get_docstring(node):
                found.append(f"{path}:{node.lineno} {name} has no docstring")
    return found


def long_files(package: Path) -> list[str]:
    """Files that no longer fit in the head."""
    return [
        f"{path.relative_to(package).as_posix()} has {lines} lines, at most {MOST_LINES}"
        for path in sorted(package.rglob("*.py"))
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    ]


def empty_names(package: Path) -> list[str]:
    """Names that say nothing: drawers for odds and ends, verbs before a noun."""
    found = []
    for path, tree in sources(package):
        if re.search(r"(^|/)_?(utils?|helpers?|managers?|misc|common)(\.py|/)", path):
            found.append(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and re.match(r"_?(get|calc|calculate|compute)_", node.name):
                found.append(f"{path}:{node.lineno} {node.name}")
            if isinstance(node, ast.ClassDef) and re.search(r"(Utils?|Helpers?|Manager)$", node.name):
                found.append(f"{path}:{node.lineno} {node.name}")
    return found


def unfinished(package: Path) -> list[str]:
    """Stubs and promises in the code."""
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError")
    return [
        f"{path.relative_to(package).as_posix()}:{number} {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]


def unsorted_exports(package: Path) -> list[str]:
    """An `__all__` that is not sorted (constants, classes, the rest), repeats a name or is not a literal."""
    found = []
    for path, tree in sources(package):
        for node in tree.body:
            if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"):
                continue
            names = ast.literal_eval(node.value)
            if names != sorted(set(names), key=export_order):
                found.append(f"{path}:{node.lineno} __all__ is not sorted")
    return found


def export_order(name: str) -> tuple[int, str]:
    """ruff's RUF022: SCREAMING_CASE, then CamelCase, then the rest."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name


RULES: list[Callable[[Path], list[str]]] = [
    foreign_imports,
    relative_imports,
    upward_imports,
    outside_world,
    page_arithmetic,
    missing_docstrings,
    long_files,
    empty_names,
    unfinished,
    unsorted_exports,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_stands(rule: Callable[[Path], list[str]]) -> None:
    violations = rule(ROOT / "planner")
    assert not violations, f"{rule.__doc__}\n" + "\n".join(violations)


PLANTED = [
    (foreign_imports, "estimate/peak.py", "import torch"),
    (foreign_imports, "estimate/peak.py", "def f():\n    import numpy.linalg"),
    (foreign_imports, "catalog/hub.py", "import huggingface_hub"),
    (foreign_imports, "catalog/gpus.py", "def f():\n    import huggingface_hub"),
    (foreign_imports, "spec.py", "from pandas import DataFrame"),
    (foreign_imports, "simulate/tracer.py", "import streamlit"),
    (foreign_imports, "training/step.py", "try:\n    import plotly.express\nexcept ImportError:\n    pass"),
    (foreign_imports, "dashboard/plan.py", "import torch"),
    (foreign_imports, "cli/main.py", "def f():\n    import transformers"),
    (foreign_imports, "newcomer.py", "import rich"),
    (foreign_imports, "estimate/peak.py", "def f():\n    __import__('torch')"),
    (foreign_imports, "advise/fits.py", "import importlib\nimportlib.import_module(name)"),
    (relative_imports, "estimate/peak.py", "from . import storage"),
    (upward_imports, "estimate/peak.py", "def f():\n    from planner.training import step"),
    (upward_imports, "advise.py", "from planner import simulate"),
    (upward_imports, "training/step.py", "from planner.dashboard import plan"),
    (outside_world, "estimate/peak.py", "open('x')"),
    (outside_world, "compare.py", "print(1)"),
    (outside_world, "advise.py", "from time import perf_counter"),
    (outside_world, "spec.py", "import os.path"),
    (outside_world, "catalog/hub.py", "print('fetching')"),
    (page_arithmetic, "dashboard/plan.py", "from planner.training import step"),
    (missing_docstrings, "estimate/peak.py", "x = 1"),
    (missing_docstrings, "estimate/peak.py", '"""Doc."""\ndef peak(): ...'),
    (missing_docstrings, "estimate/peak.py", '"""Doc."""\nclass A:\n    """Doc."""\n    def b(self): ...'),
    (long_files, "estimate/peak.py", "\n" * (MOST_LINES + 1)),
    (empty_names, "estimate/utils.py", ""),
    (empty_names, "estimate/peak.py", "def get_peak(): ..."),
    (empty_names, "estimate/peak.py", "class PeakManager: ..."),
    (unfinished, "estimate/peak.py", "x = 1  # TODO"),
    (unsorted_exports, "estimate/peak.py", '__all__ = ["b", "a"]'),
    (unsorted_exports, "estimate/peak.py", '__all__ = ["Peak", "LIMIT"]'),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_planted_violation_is_found(
    rule: Callable[[Path], list[str]], path: str, text: str, tmp_path: Path
) -> None:
    package = tmp_path / "planner"
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    assert rule(package) == []
    (package / path).write_text(text + "\n")
    assert len(rule(package)) >= 1
    assert path in rule(package)[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("catalog/hub.py", '"""Doc."""\ndef _f():\n    import huggingface_hub'),
        ("catalog/disk.py", '"""Doc."""\nfrom pathlib import Path\nwith open("x"): ...'),
        ("estimate/peak.py", '"""Doc."""\nimport math\nfrom planner.report import Parts'),
        ("training/step.py", '"""Doc."""\nimport torch\nfrom planner.spec import Setup'),
        ("spec.py", '"""Doc."""\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch'),
    ],
)
def test_what_is_allowed_passes_every_rule(path: str, text: str, tmp_path: Path) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text + "\n")
    assert [violation for rule in RULES for violation in rule(tmp_path)] == []


def test_the_entry_of_the_page_only_navigates() -> None:
    tree = ast.parse((ROOT / "app.py").read_text())
    tops = {item.name.partition(".")[0] for item in imports(tree)}
    assert tops - sys.stdlib_module_names <= PAGE | {"planner"}
    assert len((ROOT / "app.py").read_text().splitlines()) <= 80


# --- what is loaded when something runs, in a process of its own ---------------------------------------

LOADED = """
import json, runpy, sys
try:
    {run}
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})), file=sys.stderr)
"""
ESTIMATE = ("estimate", "--model", "gpt2", "--method", "lora", "--micro-batch-size", "1", "--seq-len", "128")


def loaded(run: str, folder: Path = ROOT) -> set[str]:
    """Top-level names in `sys.modules` after the statement `run`, in a fresh interpreter in `folder`."""
    answer = subprocess.run(
        [sys.executable, "-c", LOADED.format(run=run)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    marked = [line for line in answer.stderr.splitlines() if line.startswith("LOADED ")]
    assert answer.returncode == 0, answer.stderr
    assert marked, answer.stderr
    return set(json.loads(marked[-1].removeprefix("LOADED ")))


def command(*arguments: str) -> str:
    """The statement that runs `python -m planner` with these arguments."""
    return f"sys.argv = {['planner', *arguments]!r}; runpy.run_module('planner', run_name='__main__')"


LIGHT_RUNS = {
    "import planner": "import planner",
    "import planner.cli": "import planner.cli",
    "from planner import *": "exec('from planner import *')",
    "estimate": command(*ESTIMATE),
    "estimate --json": command(*ESTIMATE, "--json"),
    "compare": command("compare", *ESTIMATE[1:]),
    "fit": command("fit", *ESTIMATE[1:], "--gpu", "t4"),
    "params": command("params", *ESTIMATE[1:5]),
    "models": command("models"),
    "gpus": command("gpus"),
    "sweep --help": command("sweep", "--help"),
}


@pytest.mark.parametrize("run", LIGHT_RUNS.values(), ids=LIGHT_RUNS)
def test_nothing_heavy_is_loaded(run: str) -> None:
    assert loaded(run) & HEAVY == set()


def test_machines_are_answered_without_rich() -> None:
    assert "rich" not in loaded(LIGHT_RUNS["estimate --json"])


@pytest.mark.parametrize("heavy", sorted(HEAVY))
def test_a_planted_import_is_seen(heavy: str, tmp_path: Path) -> None:
    package = shutil.copytree(
        ROOT / "planner", tmp_path / "planner", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / f"{heavy}.py").write_text("")  # a stand-in, so that the test costs nothing
    assert loaded("import planner", tmp_path) & HEAVY == set()
    with (package / "units.py").open("a") as source:
        source.write(f"\nimport {heavy}\n")
    assert loaded("import planner", tmp_path) & HEAVY == {heavy}


def test_the_page_never_loads_torch() -> None:
    run = (
        "from streamlit.testing.v1 import AppTest; "
        "page = AppTest.from_file('app.py', default_timeout=60).run(); "
        "assert not page.exception, page.exception"
    )
    names = loaded(run)
    assert "streamlit" in names
    assert names & TORCH == set()


# --- the public surface -------------------------------------------------------------------------------


def test_the_public_names_exist_and_are_documented() -> None:
    package = importlib.import_module("planner")
    assert package.__all__ == sorted(package.__all__, key=export_order)
    for name in package.__all__:
        value = getattr(package, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_every_declared_name_of_a_light_module_exists() -> None:
    for path, _tree in sources(ROOT / "planner"):
        if area(path) in LIGHT | {"cli"}:
            name = "planner." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            module = importlib.import_module(name)
            for exported in getattr(module, "__all__", []):
                assert hasattr(module, exported), f"{name}.{exported}"
