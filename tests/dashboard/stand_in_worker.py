"""Stands in for `planner.simulate.worker` without torch: what it does depends on the sequence length.

101: ends with exit code 3; 102: is killed; 103: hangs after one phase; 104: refuses; 105: talks nonsense
first; 106: ends as if it had been idle; else a report whose parts are the estimate's.
"""

import dataclasses
import json
import os
import signal
import sys
import time

from planner.estimate import estimate
from planner.spec import Setup


def say(event: str, **values: object) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


say("ready", pid=os.getpid())
for line in sys.stdin:
    job = json.loads(line)
    setup = Setup.from_dict(job["setup"])
    number, seq_len = job["id"], setup.training.seq_len
    if seq_len == 106:
        sys.exit(0)
    say("phase", id=number, phase="forward", step=1)
    if seq_len == 101:
        os._exit(3)
    if seq_len == 102:
        os.kill(os.getpid(), signal.SIGKILL)
    while seq_len == 103:
        time.sleep(0.05)
    if seq_len == 104:
        say("failed", id=number, message="/srv/secret/model.py cannot be\nsimulated")
        continue
    if seq_len == 105:
        print("no JSON\n[1]\n" + json.dumps({"event": "report", "id": -1}), flush=True)
    report = dataclasses.replace(
        estimate(setup), source="simulation", timeline=((0, 1), (1, 3), (2, 2)), peak_reserved_bytes=1 << 40
    )
    say("report", id=number, report=report.to_dict(), begins=[["forward", 1, 0], ["backward", 1, 1]])
