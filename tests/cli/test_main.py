"""Exit codes, interrupts and closed pipes, with verbs that fail on purpose."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from planner.cli import main, parser
from planner.cli.reply import Reply
from planner.errors import DeviceError, ModelError, PlannerError, SetupError, TraceError

BARE = ["estimate", "--model", "params:7e9"]


def replaced(monkeypatch, answer):
    verb = dataclasses.replace(parser.VERBS["estimate"], answer=answer)
    monkeypatch.setitem(parser.VERBS, "estimate", verb)


def raising(error):
    def answer(args):
        raise error

    return answer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SetupError("no."), 2),
        (ModelError("no."), 2),
        (DeviceError("no."), 3),
        (TraceError("no."), 1),
        (PlannerError("no."), 1),
    ],
)
def test_each_error_has_its_exit_code(monkeypatch, capsys, error, code):
    replaced(monkeypatch, raising(error))
    assert main(BARE) == code
    assert capsys.readouterr() == ("", "planner: no.\n")


def test_an_unforeseen_failure_is_one_line_and_exit_code_1(monkeypatch, capsys):
    replaced(monkeypatch, raising(RuntimeError("first\nsecond\x1b[31m")))
    assert main(BARE) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "planner: it failed while running (RuntimeError: first second?[31m); "
        "run again with --debug for the traceback.\n"
    )


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys):
    replaced(monkeypatch, raising(KeyboardInterrupt()))
    assert main(BARE) == 130
    assert capsys.readouterr() == ("", "planner: interrupted.\n")


def test_what_a_library_prints_is_kept_off_standard_output(monkeypatch, capsys):
    def answer(args):
        print("a library says hello")
        return Reply(answer={"number": 1}, show=lambda console: None)

    replaced(monkeypatch, answer)
    assert main([*BARE, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"schema": 1, "number": 1}
    assert err == "a library says hello\n"


def test_a_closed_pipe_is_quiet():
    reader = "import sys; sys.stdin.readline()"
    script = f"{sys.executable} -m planner models | {sys.executable} -c '{reader}'; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "141\n")  # 0 where all was written before the reader left


def test_a_reader_that_never_reads_is_quiet():
    script = f"{sys.executable} -m planner models | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_simulate_without_torch_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; from planner.cli import main; sys.exit(main())"
    words = ["simulate", "--model", "gpt2", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "planner: simulate needs torch, which is not installed; run pip install 'vram-planner[simulate]'.\n"
    )
