import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixmim.data import open_data
from pixmim.data.source import BadImage, Form
from pixmim.errors import UserError


def test_nested_folders_of_two_classes(pictures: Path) -> None:
    (pictures / "cats" / "more").mkdir()
    Image.new("RGB", (9, 9)).save(pictures / "cats" / "more" / "deep.PNG")
    (pictures / "cats" / "notes.txt").write_text("no picture")
    (pictures / "dogs" / "._0.jpg").write_bytes(b"resource fork")
    data = open_data(str(pictures))
    assert len(data) == 11 and data.classes == ["cats", "dogs"]
    assert data.labels is not None and data.labels.tolist() == [0] * 6 + [1] * 5
    assert [data.locate(i) for i in range(11)] == sorted(data.locate(i) for i in range(11))
    assert data.image(0).shape == (3, 40, 56)


def test_pictures_beside_folders_leave_no_classes(pictures: Path) -> None:
    Image.new("RGB", (9, 9)).save(pictures / "loose.png")
    assert open_data(str(pictures)).labels is None


def test_strange_names_and_links(pictures: Path) -> None:
    for name in ("ünïcode 图片.png", "new\nline.png", 'comma, quote".png'):
        Image.new("RGB", (9, 9)).save(pictures / "cats" / name)
    os.symlink(pictures, pictures / "dogs" / "loop")
    outside = pictures.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (9, 9)).save(outside / "linked.png")
    os.symlink(outside, pictures / "cats" / "link")
    data = open_data(str(pictures))
    assert len(data) == 14
    assert all(data.image(i).shape[0] == 3 for i in range(14))


def test_content_counts_not_the_extension(pictures: Path) -> None:
    Image.new("RGB", (9, 9), "blue").save(pictures / "cats" / "png.jpg", "PNG")
    data = open_data(str(pictures))
    index = next(i for i in range(len(data)) if data.locate(i).endswith("png.jpg"))
    assert data.image(index)[:, 0, 0].tolist() == [0, 0, 255]


def test_grey_channel(pictures: Path) -> None:
    assert open_data(str(pictures), Form(1)).image(0).shape == (1, 40, 56)


def test_a_picture_that_vanished_is_a_bad_image(pictures: Path) -> None:
    data = open_data(str(pictures))
    Path(data.locate(3)).unlink()
    with pytest.raises(BadImage, match="No such file"):
        data.image(3)


def test_folders_that_cannot_serve_are_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'pictures'"):
        open_data(str(tmp_path / "picturs"))
    with pytest.raises(UserError, match="is a file"):
        open_data(str(pictures / "cats" / "0.jpg"))
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "empty" / "x.npz", np.zeros(3))
    with pytest.raises(UserError, match=r"no pictures in .* 1 other file"):
        open_data(str(tmp_path / "empty"))
