"""The distribution: what the wheel holds, that the installed command works, that the version pins agree.

Nothing is fetched: the wheel is built with the setuptools of this environment and installed beside it.
"""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DATA = ("*.json", "*.jsonl", "*.svg", "py.typed")


def lines(name: str) -> list[str]:
    """The requirement lines of a file: no comments, no options."""
    rows = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [row for row in rows if row and not row.startswith("-")]


def ranges(rows: list[str]) -> dict[str, str]:
    """Distribution -> version range."""
    return {canonicalize_name(Requirement(row).name): str(Requirement(row).specifier) for row in rows}


def pins() -> dict[str, str]:
    """Distribution -> the one version in constraints.txt."""
    return {
        canonicalize_name(name): version
        for name, version in (row.split("==") for row in lines("constraints.txt"))
    }


def pip(*arguments: str) -> None:
    """Run this environment's pip without an index."""
    answer = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--no-index", "--no-deps", "--quiet"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building leaves folders behind."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "planner", copy / "planner", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def description(wheel: Path) -> Message:
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", *DATA)
        for path in (ROOT / "planner").rglob(pattern)
    }
    assert held == wanted
    assert "planner/catalog/models.json" in held


def test_every_kind_of_file_in_the_package_is_shipped() -> None:
    files = [
        path for path in (ROOT / "planner").rglob("*") if path.is_file() and path.parent.name != "__pycache__"
    ]
    assert [p for p in files if not any(p.match(pattern) for pattern in ("*.py", *DATA))] == []


def test_the_wheel_says_what_it_is(wheel: Path, description: Message) -> None:
    from planner import __version__

    assert wheel.name == f"vram_planner-{__version__}-py3-none-any.whl"
    assert description["Name"] == "vram-planner"
    assert description["Version"] == __version__
    assert description["License-Expression"] == "Apache-2.0"
    assert description["License-File"] == "LICENSE"
    assert description["Requires-Python"] == ">=3.11"
    extras = {"simulate", "qlora", "liger", "dashboard", "ray"}
    assert set(description.get_all("Provides-Extra", [])) == extras
    body = description.get_payload()
    assert isinstance(body, str)
    assert body.strip() == (ROOT / "README.md").read_text().strip()


def test_the_light_core_asks_for_nothing_heavy(description: Message) -> None:
    always = [row for row in description.get_all("Requires-Dist", []) if "extra ==" not in row]
    assert set(ranges(always)) == {"rich", "huggingface-hub"}


def test_the_installed_command_answers(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--target", str(site), str(wheel))
    answer = subprocess.run(
        [
            str(site / "bin" / "planner"),
            "compare",
            "--model",
            "params:7e9",
            "--precision",
            "textbook",
            "--trainable-params",
            "4e6",
            "--json",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert answer.returncode == 0, answer.stderr
    assert isinstance(json.loads(answer.stdout), dict)
    where = subprocess.run(
        [sys.executable, "-c", "import planner; print(planner.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site), "the test ran the checkout, not the wheel"


# --- the version files agree ---------------------------------------------------------------------------


def test_requirements_ask_for_the_same_ranges_as_the_distribution() -> None:
    everything = [
        *PROJECT["dependencies"],
        *(row for name in ("simulate", "dashboard") for row in PROJECT["optional-dependencies"][name]),
    ]
    assert ranges(lines("requirements.txt")) == ranges(everything)
    assert ranges(lines("requirements-ray.txt")) == ranges(PROJECT["optional-dependencies"]["ray"])
    assert ranges(lines("requirements-qlora.txt")) == ranges(PROJECT["optional-dependencies"]["qlora"])
    assert ranges(lines("requirements-liger.txt")) == ranges(PROJECT["optional-dependencies"]["liger"])
    assert set(PROJECT["optional-dependencies"]) == {"simulate", "dashboard", "qlora", "liger", "ray"}


def test_the_page_without_torch_asks_for_the_core_and_the_dashboard() -> None:
    light = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dashboard"]]
    assert ranges(lines("requirements-web.txt")) == ranges(light)


def test_every_range_has_both_ends_and_holds_its_pin() -> None:
    pinned = pins()
    files = ("requirements.txt", *(f"requirements-{name}.txt" for name in ("qlora", "liger", "ray")))
    for name, specifier in ranges([row for file in files for row in lines(file)]).items():
        requirement = Requirement(f"{name}{specifier}")
        assert {s.operator for s in requirement.specifier} == {">=", "<"}, name
        assert requirement.specifier.contains(pinned[name]), f"{name}: {pinned[name]} is outside {specifier}"


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("requirements.txt", "-c constraints.txt"),
        ("requirements-web.txt", "-c constraints.txt"),
        ("requirements-qlora.txt", "-c constraints.txt"),
        ("requirements-liger.txt", "-c constraints.txt"),
        ("requirements-ray.txt", "-c constraints.txt"),
        ("tests/requirements.txt", "-c ../constraints.txt"),
    ],
)
def test_installing_a_requirements_file_always_uses_the_pins(name: str, option: str) -> None:
    assert option in (ROOT / name).read_text().splitlines()


def test_pins_are_exact_sorted_and_the_same_on_every_machine() -> None:
    rows = lines("constraints.txt")
    assert rows == sorted(set(rows), key=str.casefold)
    for row in rows:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", row), row  # no local version, no marker
        assert Version(row.split("==")[1])
    # The CUDA packages follow from torch's own exact pins, on the machines that need them.
    assert [row for row in rows if row.startswith(("nvidia", "triton", "cuda"))] == []


def closure(names: list[str]) -> Iterator[str]:
    """Everything that installing `names` brings in here, by the installed packages' own metadata."""
    open_names, seen = list(names), set[tuple[str, str]]()
    while open_names:
        requirement = Requirement(open_names.pop())
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for row in metadata.requires(name) or []:
                marker = Requirement(row).marker
                if marker is None or marker.evaluate({"extra": extra}):
                    open_names.append(row)
    yield from sorted({name for name, _extra in seen})


def test_the_pins_are_the_whole_closure() -> None:
    rows = [*lines("requirements.txt"), *lines("tests/requirements.txt")]
    here = [row for row in rows if (marker := Requirement(row).marker) is None or marker.evaluate()]
    from_cuda = ("nvidia-", "cuda-", "triton")
    missing = [name for name in closure(here) if name not in pins() and not name.startswith(from_cuda)]
    assert missing == []
