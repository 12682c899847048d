"""Records on disk: whole lines or none, from several processes at once, and nothing unreadable in the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.measure import records as store
from planner.measure.records import (
    append,
    append_line,
    keep_upload,
    merge,
    own_file,
    read,
    records_dir,
    shelf,
)
from planner.record import Record, setup_key
from tests.measure.made_up import made_record


def test_a_record_reads_back_as_it_was(tmp_path: Path) -> None:
    record = made_record(estimate=1.25, set_name="matrix")
    path = append(record, tmp_path / "deep" / "records.jsonl")
    found = read([path])
    assert found.unreadable == ()
    assert found.records == (record,)
    assert found.records[0].place == f"{path}:1"
    assert path.read_bytes().count(b"\n") == 1


def test_a_setting_that_a_later_version_adds_changes_no_key() -> None:
    setup = dict(made_record().setup)
    older = {key: value for key, value in setup.items() if key != "clip_grad_norm"}
    assert setup_key(older) == setup_key({**setup, "gpu": "t4"}) == setup_key(setup)
    assert setup_key({**setup, "clip_grad_norm": 1.0}) != setup_key(setup)


def test_appending_leaves_earlier_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(made_record(), path)
    before = path.read_bytes()
    append(made_record(seq_len=32), path)
    assert path.read_bytes().startswith(before)
    assert [record.setup["seq_len"] for record in read([path]).records] == [16, 32]


def test_where_the_user_s_records_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANNER_RECORDS_DIR", str(tmp_path))
    assert (records_dir(), own_file()) == (tmp_path, tmp_path / "records.jsonl")
    monkeypatch.delenv("PLANNER_RECORDS_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert records_dir() == Path("/data/vram-planner")


def test_the_shelf_keeps_origins_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANNER_RECORDS_DIR", str(tmp_path / "mine"))
    monkeypatch.setattr(store, "PACKAGED", tmp_path / "packaged")
    append(made_record(seq_len=1), tmp_path / "packaged" / "a.jsonl")
    append(made_record(seq_len=2))
    append(made_record(seq_len=3), records_dir() / "uploads" / "b.jsonl")
    assert [(r.setup["seq_len"], r.origin) for r in shelf().records] == [
        (1, "packaged"), (2, "own"), (3, "uploaded"),
    ]


def spoiled() -> dict[str, str]:
    """Lines that are no record, by what is wrong with them."""
    good = made_record().to_dict()

    def but(**changes: object) -> str:
        return json.dumps({**good, **changes})

    report = good["report"]
    return {
        "not a line of JSON": '{"schema": 1, "report',
        "not a JSON object": "[1]",
        "schema 99": but(schema=99),
        "'device' is missing": json.dumps({k: v for k, v in good.items() if k != "device"}),
        "report is a estimate": but(report={**report, "source": "estimate"}),
        "the parts sum to": but(report={**report, "peak_allocated_bytes": 1}),
        "another setup": but(setup={**good["setup"], "seq_len": 99}),
        "version of torch": but(versions={}),
        "wrong type": but(device={**good["device"], "total_bytes": "much"}),
        "no name or no memory": but(device={**good["device"], "total_bytes": 0}),
        "a report of schema": but(simulation={"schema": 7}),
    }


@pytest.mark.parametrize("wrong", spoiled())
def test_an_unreadable_line_is_named_and_skipped(wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(made_record(), path)
    append_line(spoiled()[wrong], path)
    append(made_record(seq_len=32), path)
    found = read([path])
    assert [record.setup["seq_len"] for record in found.records] == [16, 32]
    (line,) = found.unreadable
    assert line.place == f"{path}:2"
    assert wrong in str(line)


def test_binary_rubbish_and_endless_nesting_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n" + b"[" * 100_000 + b"\n\n")
    append(made_record(), path)
    found = read([path])
    assert (len(found.records), len(found.unreadable)) == (1, 2)


def test_a_line_cut_by_a_lost_process_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(made_record(), path)
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "half')
    append(made_record(seq_len=32), path)
    found = read([path])
    assert [record.setup["seq_len"] for record in found.records] == [16, 32]
    assert [line.place for line in found.unreadable] == [f"{path}:2"]


def _many(path: Path, writer: int) -> None:
    for number in range(25):
        append_line(json.dumps({"writer": writer, "number": number, "filling": "x" * 20_000}), path)


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_many, args=(path, writer)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0] * 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((line["writer"], line["number"]) for line in lines) == [
        (writer, number) for writer in range(4) for number in range(25)
    ]


FULL_DISK = """
import resource, sys
from pathlib import Path
from planner.errors import PlannerError
from planner.measure.records import append_line
path = Path(sys.argv[1])
append_line("x" * 1000, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    append_line("y" * 1000, path)
except PlannerError as error:
    print(error)
append_line("z" * 100, path)
"""


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on the file's size stands for the disk: the kernel writes a part and refuses the rest."""
    assert resource.RLIMIT_FSIZE >= 0
    path = tmp_path / "records.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert path.read_text() == "x" * 1000 + "\n" + "z" * 100 + "\n"
    assert "nothing was recorded" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PlannerError, match="nothing was recorded") as caught:
        append(made_record(), blocked / "records.jsonl")
    assert "\n" not in str(caught.value)


KILLED = """
import sys
from pathlib import Path
from planner.measure.records import append_line
while True:
    append_line("x" * 200_000, Path(sys.argv[1]))
"""


def test_a_writer_killed_at_any_moment_leaves_whole_lines_or_one_open_end(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
    try:
        while not path.exists() or path.stat().st_size < 2_000_000:
            assert process.poll() is None
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    append(made_record(), path)  # the lock died with its holder
    *lines, last = path.read_text().splitlines()
    assert sum(line != "x" * 200_000 for line in lines) <= 1
    assert Record.from_dict(json.loads(last)) == made_record()


def test_merging_adds_what_is_new_and_once(tmp_path: Path) -> None:
    one, other, into = (tmp_path / name for name in ("one.jsonl", "other.jsonl", "into.jsonl"))
    for record in (made_record(), made_record(seq_len=32)):
        append(record, one)
    for record in (made_record(), made_record(seq_len=64)):
        append(record, other)
    append_line("rubbish", other)
    added, found = merge([one, other], into)
    assert (added, len(found.records), len(found.unreadable)) == (3, 4, 1)
    assert merge([one, other], into)[0] == 0
    assert [record.setup["seq_len"] for record in read([into]).records] == [16, 32, 64]


def test_an_upload_is_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANNER_RECORDS_DIR", str(tmp_path))
    content = json.dumps(made_record().to_dict()).encode() + b"\nrubbish\n"
    for new in (1, 0):
        added, found = keep_upload(content, "theirs.jsonl")
        assert (added, len(found.records)) == (new, 1)
        assert [line.place for line in found.unreadable] == ["theirs.jsonl:2"]
    assert not own_file().exists()
    made_up = [record for record in shelf().records if record.device == made_record().device]
    assert [record.origin for record in made_up] == ["uploaded"]


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(PlannerError, match="cannot be read"):
        read([Path("nowhere.jsonl")])


def test_the_packaged_recordings_are_valid_and_measured() -> None:
    found = read(sorted(store.PACKAGED.glob("*.jsonl")), origin="packaged")
    assert found.unreadable == ()
    assert all(record.report.source == "measurement" for record in found.records)
