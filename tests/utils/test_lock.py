"""One process at a time works in a folder; the lock of a dead process is taken over by the rule in `lock.py`."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from helpers.cli import say
from pixmim.config_io import to_json
from pixmim.recipes import get_recipe
from pixmim.run_folder import check_new_run, lock_run_folder
from pixmim.training.distributed import SINGLE_PROCESS
from pixmim.utils import lock
from pixmim.utils.errors import UserError
from pixmim.utils.lock import locked_folder

HOLD = """
import sys
from pathlib import Path
from pixmim.utils import lock
from pixmim.utils.errors import UserError
lock.BEAT = 0.1
try:
    with lock.locked_folder(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except UserError:
    print("refused", flush=True)
"""


@pytest.fixture(autouse=True)
def fast_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)


def start_holder(folder: Path) -> "subprocess.Popen[str]":
    """Start a process that prints whether it holds the lock of a folder, and keeps it until its stdin is closed."""
    command, pipe = [sys.executable, "-c", HOLD, str(folder)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_a_folder_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    holder = start_holder(run)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=f"{run} is in use by process {holder.pid} on .*remove {run}/lock"),
        locked_folder(run),
    ):
        pass
    holder.kill()
    holder.communicate()
    contenders = [start_holder(run) for _ in range(3)]
    printed = sorted(process.stdout.readline() for process in contenders if process.stdout is not None)
    for process in contenders:
        process.communicate()
    assert printed == ["held\n", "refused\n", "refused\n"] and os.listdir(run) == []
    with locked_folder(run), pytest.raises(UserError, match="in use"), locked_folder(run):
        pass
    with pytest.raises(FileExistsError), locked_folder(run, new=True):
        pass
    run.rmdir()
    with locked_folder(run):
        pass
    assert not run.exists()


def test_the_lock_of_another_host_is_held_while_it_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STILL", 1.5)
    path, lines = tmp_path / "lock", list[str]()
    with locked_folder(tmp_path):
        content = path.read_text()
    path.write_text(re.sub("host=.*", "host=other", content))
    renewals = iter(range(10**6))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="on 'other'"):
        patch.setattr(lock, "_modified", lambda path: next(renewals))
        locked_folder(tmp_path).__enter__()
    with locked_folder(tmp_path, lines.append):
        assert len(lines) == 1
    assert os.listdir(tmp_path) == []


def test_a_process_that_lost_its_lock_is_terminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[int] = []
    monkeypatch.setattr(lock.os, "kill", lambda pid, number: signals.append(number))
    with locked_folder(tmp_path):
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").write_text("another's")
        while not signals:
            time.sleep(0.01)
    assert signals == [signal.SIGTERM] and (tmp_path / "lock").read_text() == "another's"


def test_runs_do_not_share_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    with ExitStack() as stack:
        for folder in ("runs/demo-now", "runs/demo-now-2"):
            assert lock_run_folder("", "demo", SINGLE_PROCESS, stack, Console(quiet=True)) == Path(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(get_recipe("demo")))
    with locked_folder(tmp_path / "run"):
        status, text = say(capsys, "pretrain", "--resume=~/run")
        assert status == 1 and f"{tmp_path}/run is in use by process" in text
    for name in ("metrics.jsonl", "report.html", "encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("the user's")
        with pytest.raises(UserError, match=r"--out"):
            check_new_run(tmp_path / name)
    (tmp_path / "run" / "report.html").write_text("the user's")
    status, text = say(capsys, "evaluate", "knn", "run", "--train", "shapes:", "--test", "shapes:")
    assert status == 1 and "pixmim did not write it" in text
    assert (tmp_path / "run" / "report.html").read_text() == "the user's" and not (tmp_path / "~").exists()
