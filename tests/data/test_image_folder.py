import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixmim.data import open_data
from pixmim.data.dataset import BadImage, Form
from pixmim.utils.errors import UserError


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
    for i in range(7):
        Image.new("RGB", (9, 9)).save(pictures / "cats" / f"a{i}.png")
    data = open_data(str(pictures))
    assert data.labels is None and f"{pictures}/loose.png is beside them" in data.no_labels
    assert "beside them" not in open_data(str(pictures / "cats")).no_labels


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_as_any_editor_saves_it(coding: str, end: str, pictures: Path) -> None:
    Image.new("RGB", (9, 9)).save(pictures / "ö ö.png ", "PNG")
    text = end.join(["cats/0.jpg", "dogs/1.jpg \t", "", "  cats/2.jpg", "ö ö.png ", "   "])
    mark = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(coding, "")
    (pictures / "list.txt").write_bytes((mark + text).encode(coding))
    data = open_data(str(pictures / "list.txt"))
    names = [os.path.relpath(data.locate(i), pictures) for i in range(len(data))]
    assert names == ["cats/0.jpg", "dogs/1.jpg", "cats/2.jpg", "ö ö.png "]
    (pictures / "list.txt").write_bytes(text.encode("utf-16-le"))
    with pytest.raises(UserError, match="Save it as UTF-8"):
        open_data(str(pictures / "list.txt"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer: .*git lfs pull"),
        (bytes(128) + b"DICM" + bytes(99), "DICOM: .*pydicom"),
        (b"PK\3\4" + bytes(40), "a zip archive .*unpack"),
        (b"\0\0\0\x18ftypmp42" + bytes(20), "a video: .*ffmpeg"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(20), "a video: .*ffmpeg"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC: convert"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL: convert"),
        (b"file,class\na.jpg,3\n", r"a table \(CSV\): .*\.txt"),
        (b"%PDF-1.7\n\xe2", "a PDF: .*pdftoppm"),
        (bytes(344) + b"n+1\0", "a NIfTI volume: .*slices"),
        (b"<!DOCTYPE html><html>404", "a web page: .*download"),
        (bytes(range(200)), ""),
    ],
)
def test_files_that_are_no_images_are_called_what_they_are(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "all" / "sub").mkdir(parents=True)
    file = tmp_path / "all" / "sub" / "file.dat"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is {kind or 'a file of a kind'}"):
        open_data(str(file))
    with pytest.raises(UserError, match=f"no pictures in .*1 other files.*{file} is {kind or 'a file of a kind'}"):
        open_data(str(tmp_path / "all"))
    file.rename(file.with_suffix(".jpg"))
    with pytest.raises(BadImage, match=f"not a picture in a known format{', but ' * bool(kind)}{kind}"):
        open_data(str(tmp_path / "all")).image(0)


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
    with pytest.raises(UserError, match="is one image: give the folder"):
        open_data(str(pictures / "cats" / "0.jpg"))
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "empty" / "x.npz", np.zeros(3))
    with pytest.raises(UserError, match=r"no pictures in .* 1 other file"):
        open_data(str(tmp_path / "empty"))
