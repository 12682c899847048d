"""The Dockerfile, without Docker: linted, read instruction by instruction, and the `web` image's steps run.

The steps run in a plain virtual environment in a temporary folder that stands for /app: COPY copies what
.dockerignore lets through, RUN runs, ENV is the whole environment, CMD starts the page, HEALTHCHECK asks it.
Left out: creating the user and the base image's own files.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "Dockerfile"
OFFLINE = re.compile(
    r"NewConnectionError|name resolution|Max retries exceeded|Read timed out|ProxyError", re.I
)


@dataclass
class Stage:
    """One `FROM ... AS name` and its instructions, those of the stages it builds on first."""

    name: str
    image: str  # of the lowest stage
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """The arguments of every `instruction`."""
        return [text for name, text in self.steps if name == instruction]

    @property
    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        return dict(pair.split("=", 1) for text in self.all("ENV") for pair in shlex.split(text))


def stages(text: str) -> dict[str, Stage]:
    """The Dockerfile's stages by name."""
    rows = [row for row in text.splitlines() if row.strip() and not row.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(rows))
    found: dict[str, Stage] = {}
    for row in joined.splitlines():
        name, _, arguments = row.partition(" ")
        if name == "FROM":
            base, _as, stage = arguments.split()
            below = found.get(base)
            current = Stage(stage, below.image if below else base, list(below.steps) if below else [])
            found[stage] = current
        else:
            current.steps.append((name, arguments.strip()))
    return found


STAGES = stages(DOCKERFILE.read_text())
TARGETS = ("web", "full")


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if not hadolint:
        pytest.skip("no hadolint on this machine; on Linux x86-64 tests/requirements.txt brings it")
    lint = subprocess.run(
        [hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr
    planted = DOCKERFILE.read_text().replace("USER 10001", "USER root")
    lint = subprocess.run(
        [hadolint, "-"], input=planted, capture_output=True, text=True, timeout=60, check=False
    )
    assert lint.returncode != 0, "the linter accepts a root user"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_pinned_unprivileged_and_watched(target: str) -> None:
    stage = STAGES[target]
    assert re.fullmatch(r"python:3\.1[1-9]\.\d+-slim-\w+", stage.image)
    instructions = [name for name, _ in stage.steps]
    assert stage.all("USER") == ["10001"]
    assert "--uid 10001" in " ".join(stage.all("RUN"))
    assert not {"RUN", "COPY", "ADD"} & set(instructions[instructions.index("USER") :])
    assert "/_stcore/health" in stage.all("HEALTHCHECK")[-1]
    assert stage.all("EXPOSE") == [stage.environment["STREAMLIT_SERVER_PORT"]]
    assert json.loads(stage.all("CMD")[-1]) == ["streamlit", "run", "app.py"]


def test_no_secret_is_built_in() -> None:
    text = DOCKERFILE.read_text()
    assert not re.search(r"token|secret|password|api.?key", text, re.IGNORECASE)
    assert not re.search(r"^(ADD|ARG)\b|COPY\s+\.\s", text, re.MULTILINE)


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_full_image_installs_torch(target: str) -> None:
    installed = re.findall(r"-r (\S+)", " ".join(STAGES[target].all("RUN")))
    assert (
        installed
        == {"web": ["requirements-web.txt"], "full": ["requirements-web.txt", "requirements.txt"]}[target]
    )


def let_through(path: str) -> bool:
    """Whether .dockerignore, which excludes everything and names exceptions, keeps a path in the context."""
    rows = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in rows
    kept = [row[1:] for row in rows if row.startswith("!")]
    return any(path == name or path.startswith(name + "/") for name in kept) and "__pycache__" not in path


def copied(stage: Stage) -> dict[str, Path]:
    """Path in the image's working folder -> file of the repository."""
    files: dict[str, Path] = {}
    for text in stage.all("COPY"):
        *names, goal = text.split()
        for name in names:
            source = ROOT / name
            found = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
            kept = [p for p in found if let_through(p.relative_to(ROOT).as_posix())]
            assert kept, f"COPY {name}: nothing in the build context"
            for path in kept:
                inside = path.name if source.is_file() else path.relative_to(source).as_posix()
                files[os.path.normpath(os.path.join(goal, inside))] = path
    return files


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_holds_the_program_and_nothing_else(target: str) -> None:
    files = copied(STAGES[target])
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "planner").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    others = {"app.py", "constraints.txt", "requirements-web.txt", ".streamlit/config.toml"}
    assert set(files) == package | others | ({"requirements.txt"} if target == "full" else set())


@dataclass
class Image:
    """A folder that stands for the image: where its program lies, and the environment it runs in."""

    app: Path
    environment: dict[str, str]

    def run(self, command: list[str], timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command as the image would."""
        program = shutil.which(command[0], path=self.environment["PATH"])
        assert program, f"{command[0]} is not in the image"
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.app,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@pytest.fixture(scope="module")
def web_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The steps of the `web` target, carried out; half a gigabyte, removed at the end."""
    root = tmp_path_factory.mktemp("image")
    app, home = root / "app", root / "home"
    home.mkdir()
    venv.create(root / "venv", with_pip=True)
    stage = STAGES["web"]
    path = f"{root / 'venv' / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    image = Image(app, {"PATH": path, "HOME": str(home), **stage.environment})
    for inside, source in copied(stage).items():
        (app / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, app / inside)
    # How this machine reaches the package index is the machine's matter, not the image's.
    machine = {
        k: v for k, v in os.environ.items() if re.match(r"PIP_|SSL_|\w*_proxy$|REQUESTS_", k, re.IGNORECASE)
    }
    for command in stage.all("RUN"):
        if command.startswith("useradd "):
            continue
        step = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=app,
            env={**machine, **image.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        if step.returncode and OFFLINE.search(step.stderr):
            pytest.skip("the package index cannot be reached, so the image's RUN steps cannot run")
        assert step.returncode == 0, f"RUN {command}\n{step.stderr}"
    yield image
    shutil.rmtree(root)


def test_the_web_image_answers_without_torch(web_image: Image) -> None:
    answer = web_image.run(["python", "-m", "planner", "estimate", "--model", "gpt2", "--json"])
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["source"] == "estimate"
    probe = (
        "import importlib.util as u; print([n for n in ('torch', 'transformers', 'peft') if u.find_spec(n)])"
    )
    assert web_image.run(["python", "-c", probe]).stdout.strip() == "[]"


def test_the_page_of_the_web_image_runs(web_image: Image) -> None:
    page = (
        "from streamlit.testing.v1 import AppTest\n"
        "page = AppTest.from_file('app.py', default_timeout=60).run()\n"
        "assert not page.exception, page.exception\n"
    )
    answer = web_image.run(["python", "-c", page])
    assert answer.returncode == 0, answer.stderr


@pytest.fixture
def server(web_image: Image, free_port: int) -> Iterator[Image]:
    """CMD, running on a free port of the loopback interface."""
    environment = {
        **web_image.environment,
        "STREAMLIT_SERVER_PORT": str(free_port),
        "STREAMLIT_SERVER_ADDRESS": "127.0.0.1",
    }
    image = Image(web_image.app, environment)
    command = json.loads(STAGES["web"].all("CMD")[-1])
    program = shutil.which(command[0], path=environment["PATH"])
    assert program, f"{command[0]} is not in the image"
    process = subprocess.Popen(
        [program, *command[1:]],
        cwd=image.app,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield image
    alive = process.poll() is None
    process.terminate()
    process.wait(timeout=20)
    assert alive, "the server ended by itself"


def test_the_health_check_turns_green(server: Image) -> None:
    _, _, command = STAGES["web"].all("HEALTHCHECK")[-1].partition("CMD ")
    check = json.loads(command)
    deadline = time.monotonic() + 60
    while (answer := server.run(check)).returncode and time.monotonic() < deadline:
        time.sleep(0.3)
    assert answer.returncode == 0, answer.stderr
    elsewhere = Image(server.app, {**server.environment, "STREAMLIT_SERVER_PORT": "1"})
    assert elsewhere.run(check).returncode != 0, "the health check cannot fail"
