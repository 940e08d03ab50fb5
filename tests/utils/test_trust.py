"""Files and references of a run folder from elsewhere."""

from pathlib import Path

import pytest

from pixmim.utils.errors import UserError
from pixmim.utils.trust import inside, is_trusted, trust_config


def test_a_config_is_trusted_where_it_was_written_and_only_unchanged(memory: Path) -> None:
    assert not is_trusted("config")
    trust_config("config")
    assert is_trusted("config") and not is_trusted("config ")


def test_without_a_cache_directory_nothing_is_trusted_and_nothing_fails(memory: Path) -> None:
    memory.parent.mkdir(exist_ok=True)
    memory.write_text("a file where the folder should be")
    trust_config("config")
    assert not is_trusted("config")


def test_names_stay_inside_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    (folder / "within").symlink_to(folder / "sub")
    (folder / "loop").symlink_to(folder / "loop")
    for name in ("a.json", "sub/b.png", "within/c", "sub/../a.json"):
        assert inside(folder, name) == folder / name
    for name in ("../secret", "/etc/passwd", "link", "up/secret", "sub/../../secret", "a\0b", "loop"):
        with pytest.raises(UserError, match="leads out of"):
            inside(folder, name)
