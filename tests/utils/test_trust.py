"""What a run folder from elsewhere may touch."""

from pathlib import Path

import pytest

from pixmim.utils.errors import UserError
from pixmim.utils.trust import inside, made_here, remember_run


def test_a_configuration_is_known_where_it_was_written_and_only_unchanged(memory: Path) -> None:
    assert not made_here("config")
    remember_run("config")
    assert made_here("config") and not made_here("config ")


def test_without_a_cache_directory_nothing_is_known_and_nothing_fails(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.parent.mkdir(exist_ok=True)
    memory.write_text("in the way")
    remember_run("config")
    assert not made_here("config")


def test_names_stay_inside_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    (folder / "within").symlink_to(folder / "sub")
    for name in ("a.json", "sub/b.png", "within/c", "sub/../a.json"):
        assert inside(folder, name) == folder / name
    for name in ("../secret", "/etc/passwd", "link", "up/secret", "sub/../../secret", "a\0b"):
        with pytest.raises(UserError, match="leads out of"):
            inside(folder, name)
