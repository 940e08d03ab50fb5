"""Reading regular files within bounds, and atomic writes."""

import json
import os
import socket
import threading
from pathlib import Path
from typing import IO

import pytest

from pixmim.utils.errors import UserError
from pixmim.utils.files import (
    append,
    atomic_write,
    check_writable,
    parse_json,
    read_file,
    read_json,
    read_text,
    write_csv,
    write_text_atomically,
)


def test_new_content_replaces_the_old(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.json", "old")
    write_text_atomically(tmp_path / "a.json", "größer")
    write_text_atomically(tmp_path / "b.bin", b"\x00\xff")
    assert (tmp_path / "a.json").read_bytes() == "größer".encode() and (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.bin"]


def test_a_failed_write_keeps_the_previous_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.json", "old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "a.json", fail)
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_a_link_at_the_target_is_replaced_and_its_own_target_stays(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "other")
    write_text_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "other").read_text() == "mine" and (tmp_path / "a.json").read_text() == "new"


def test_names_that_are_not_utf8_survive_a_text_file(tmp_path: Path) -> None:
    name = os.fsdecode(b"M\xfcller.jpg")
    write_text_atomically(tmp_path / "names.txt", name)
    assert (tmp_path / "names.txt").read_bytes() == b"M\xfcller.jpg" and read_text(tmp_path / "names.txt") == name


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_fifo, _socket, _device, Path.mkdir])
def test_only_regular_files_are_read_without_blocking(make: object, tmp_path: Path) -> None:
    make(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "x")


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert read_file(tmp_path / "x", 5) == read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes exceed the limit of 4"):
        read_file(tmp_path / "x", 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_file_with_more_content_than_its_size_is_refused() -> None:
    with pytest.raises(OSError, match="grew"):
        read_file("/proc/self/status")


def test_json_is_bounded_in_depth_and_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": [1, {"b": None}]}))
    assert read_json(tmp_path / "x.json") == {"a": [1, {"b": None}]}
    for text in ("[" * 100_000, "[" * 65 + "]" * 65, '{"a": ' * 65 + "1" + "}" * 65):
        with pytest.raises(UserError, match="nested too deep"):
            parse_json(text, "x.json")
    for text in ("", "{", "9" * 5000, "\ud800"):
        with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
            parse_json(text, "x.json")
    assert parse_json("[" * 64 + "]" * 64, "x.json")


def test_concurrent_writers_leave_one_of_the_contents(tmp_path: Path) -> None:
    path = tmp_path / "x"
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_text_atomically, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and os.listdir(tmp_path) == ["x"]


def test_text_is_appended_to_regular_files_only_and_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    append(path, "a\n")
    append(path, os.fsdecode(b"\xfc") + "\ud800\n")
    assert path.read_bytes() == b"a\n\xfc?\n"
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError, match=r"symbolic link|No such device"):
            append(tmp_path / name, "b")
    write, calls = os.write, list[int]()

    def write_until_full(descriptor: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:3])

    monkeypatch.setattr("pixmim.utils.files.os.write", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        append(path, "a long line\n")
    assert path.read_bytes() == b"a\n\xfc?\n" and len(calls) == 2


def test_csv_holds_any_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [["name"], [os.fsdecode(b"\xfc"), 3], ["a,\n", "\ud800"]])
    assert (tmp_path / "a.csv").read_bytes() == b'name\r\n\xfc,3\r\n"a,\n",?\r\n'


def test_names_of_the_maximum_length_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "\U0001f600" * 63):
        write_text_atomically(tmp_path / name, "x")
        check_writable(tmp_path / name)
    assert len(os.listdir(tmp_path)) == 2


def test_an_unwritable_path_is_detected_before_the_work_and_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "newer" / "x.png")
    for path in (tmp_path, tmp_path / "file" / "x.png"):
        with pytest.raises(OSError, match=str(path)):
            check_writable(path)
    assert os.listdir(tmp_path) == ["file"]
