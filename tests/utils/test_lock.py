"""One process works in a folder; the lock of one that has ended is taken over by the rule that `lock.py` states."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

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
from pixmim.utils.errors import UserError
from pixmim.utils.lock import alone
try:
    with alone(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except UserError:
    print("refused", flush=True)
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    """Start a process that prints whether it holds a folder, and holds it until its standard input is closed."""
    command, pipe = [sys.executable, "-c", HOLD, str(folder)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_a_folder_is_held_until_its_process_ends(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    first = holder(run)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=f"{run} is in use by process {first.pid} on .*remove {run}/lock"),
        locked_folder(run),
    ):
        pass
    first.kill()
    first.wait()
    with locked_folder(run):
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="in use"), locked_folder(run):
            pass
    assert os.listdir(run) == []
    with pytest.raises(FileExistsError), locked_folder(run, new=True):
        pass
    run.rmdir()
    with locked_folder(run):
        pass
    assert not run.exists()


def test_a_number_that_another_process_has_got_since_holds_nothing(tmp_path: Path) -> None:
    with locked_folder(tmp_path):
        mine = json.loads((tmp_path / "lock").read_text())
    for change in ({"started": "1"}, {"pid": 2**22 + 1}, {"pid": -7}, {"pid": 10**30}):
        (tmp_path / "lock").write_text(json.dumps(mine | change))
        with locked_folder(tmp_path):
            pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ['{"host": "other", "pid": 1, "system": "x", "started": "1"}', "", "[" * 99, "[]"])
def test_another_hosts_lock_counts_while_it_beats(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lines = tmp_path / "lock", list[str]()

    def sleep(seconds: float, beats: bool) -> None:
        clock[0] += seconds
        if beats:
            os.utime(path, (1, 1))

    clock = [0.0]
    own = SimpleNamespace(monotonic=lambda: clock[0], time=time.time, time_ns=time.time_ns)  # other threads sleep on
    monkeypatch.setattr(lock, "time", own)
    path.write_text(content)
    own.sleep = lambda seconds: sleep(seconds, True)
    with pytest.raises(UserError, match="in use"), locked_folder(tmp_path, lines.append):
        pass
    assert clock[0] == 1 and len(lines) == 1 and "90 s" in lines[0]
    path.write_text(content)
    own.sleep = lambda seconds: sleep(seconds, False)
    with locked_folder(tmp_path):
        assert 1 + lock.STILL < clock[0] < 5 + lock.STILL
    path.write_text(content)
    os.utime(path, (time.time() - 2 * lock.OLD,) * 2)
    before = clock[0]
    with locked_folder(tmp_path):
        assert clock[0] == before
    assert os.listdir(tmp_path) == []


def test_it_beats_and_ends_the_process_that_has_lost_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    ended: list[int] = []
    monkeypatch.setattr(lock.os, "kill", lambda pid, number: ended.append(number))
    with locked_folder(tmp_path):
        os.utime(tmp_path / "lock", (1, 1))
        while (tmp_path / "lock").stat().st_mtime == 1:
            time.sleep(0.01)
        (tmp_path / "lock").write_text("another's")
        while not ended:
            time.sleep(0.01)
    assert (tmp_path / "lock").read_text() == "another's"


def test_of_several_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(
        json.dumps({"host": "h", "pid": 2**22 + 1, "system": lock._system(), "started": "1"})
    )
    several = [holder(tmp_path) for _ in range(4)]
    printed = sorted(process.stdout.readline() for process in several if process.stdout is not None)
    for process in several:
        process.communicate()
    assert printed == ["held\n", "refused\n", "refused\n", "refused\n"] and os.listdir(tmp_path) == []


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
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(UserError, match="belongs to no run"):
            check_new_run(tmp_path / name)
    (tmp_path / "run" / "report.html").write_text("mine")
    status, text = say(capsys, "evaluate", "knn", "run", "--train", "shapes:", "--test", "shapes:")
    assert status == 1 and "pixmim did not write it" in text
    assert (tmp_path / "run" / "report.html").read_text() == "mine" and not (tmp_path / "~").exists()
