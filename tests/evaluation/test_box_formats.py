"""Boxes of VOC and YOLO are those that the files state, computed by hand."""

from pathlib import Path

import pytest
from PIL import Image

from pixmim.data.dataset import RGB
from pixmim.evaluation.annotations import read_objects
from pixmim.evaluation.detection import _annotation_files
from pixmim.evaluation.detection.dataset import DetectionDataset, open_detection
from pixmim.evaluation.settings import DetectionSettings
from pixmim.utils.errors import UserError


def save_image(path: Path, width: int = 40, height: int = 30, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path, **options)


def save_voc(root: Path, name: str, *objects: tuple[str, int, int, int, int, int], filename: str = "") -> None:
    """Write an image of 40x30 pixels with objects of class, corners and difficulty."""
    body = "".join(
        f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
        f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox><part><name>head</name></part></object>"
        for kind, left, top, right, bottom, difficult in objects
    )
    size = "<size><width>40</width><height>30</height></size>"
    file = root / "Annotations" / f"{name}.xml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"<annotation><filename>{filename or name}.jpg</filename>{size}{body}</annotation>")
    save_image(root / "JPEGImages" / f"{name}.jpg")


def boxes_of(data: DetectionDataset) -> dict[str, list[tuple[str, list[float], bool]]]:
    found = {}
    for index in range(len(data.images)):
        objects = data.objects(index)
        rows = zip(objects.labels, objects.boxes.tolist(), objects.crowd.tolist(), strict=True)
        found[Path(data.images.path_of(index)).name] = [(data.classes[label], box, crowd) for label, box, crowd in rows]
        assert data.read(index).shape[1:] == data.sizes[index]  # type: ignore[index]
    return found


def test_voc(tmp_path: Path) -> None:
    save_voc(tmp_path, "a", ("dog", 1, 1, 40, 30, 0), ("cat", 5, 6, 5, 6, 1))
    save_voc(tmp_path, "b", ("cat", 11, 2, 99, 20, 0), filename="renamed since")
    save_voc(tmp_path, "c")
    data = open_detection(str(tmp_path), "", RGB)
    assert data.classes == ["cat", "dog"] and data.counts == [1, 1]
    assert boxes_of(data) == {
        "a.jpg": [("dog", [0, 0, 40, 30], False), ("cat", [4, 5, 5, 6], True)],
        "b.jpg": [("cat", [10, 1, 40, 20], False)],
        "c.jpg": [],
    }
    assert "1 boxes extend beyond their image: clipped" in data.problems
    assert [each.box for each in read_objects(str(tmp_path))[0]] == [(0, 0, 40, 30), (4, 5, 5, 6), (10, 1, 40, 20)]


def test_a_renamed_image_of_voc_is_not_its_own_annotation(tmp_path: Path) -> None:
    """In one folder with its annotation, an image has the same stem."""
    save_voc(tmp_path, "a", ("dog", 1, 1, 4, 4, 0), filename="renamed since")
    for file in (tmp_path / "Annotations/a.xml", tmp_path / "JPEGImages/a.jpg"):
        file.rename(tmp_path / file.name)
        file.parent.rmdir()
    assert boxes_of(open_detection(str(tmp_path), "", RGB)) == {"a.jpg": [("dog", [0, 0, 4, 4], False)]}


@pytest.mark.parametrize("size", ["", "<size/>", "<size><width>0</width><height>0</height><depth>0</depth></size>"])
def test_an_unknown_size_of_voc_is_that_of_the_image(size: str, tmp_path: Path) -> None:
    for name in "abcde":
        save_voc(tmp_path, name, ("dog", 5, 6, 99, 99, 0))
    for name in "ab":
        file = tmp_path / f"Annotations/{name}.xml"
        start, _, rest = file.read_text().partition("<size>")
        file.write_text(start + size + rest.partition("</size>")[2])
    (tmp_path / "JPEGImages/b.jpg").write_bytes(b"damaged")
    objects, problems = read_objects(str(tmp_path))
    assert {(each.size, each.box) for each in objects} == {((30, 40), (4, 5, 40, 30))} and len(objects) == 4
    assert "1 objects are in images that cannot be read: left out" in str(problems)
    (tmp_path / "Annotations/a.xml").write_text("<annotation><filename>a.jpg</filename></annotation>")
    with pytest.raises(UserError, match="not a VOC annotation"):
        read_objects(str(tmp_path))


def test_lists_of_voc_choose_images(tmp_path: Path) -> None:
    for name in "abcd":
        save_voc(tmp_path, name, ("dog", 1, 1, 4, 4, 0))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc  1\n\n")
    (lists / "val.txt").write_text("b\n")
    train, test = _annotation_files(DetectionSettings(data=str(tmp_path)))
    assert list(boxes_of(open_detection(train, "", RGB))) == ["a.jpg", "c.jpg"]
    assert list(boxes_of(open_detection(test, "", RGB, "--test-images"))) == ["b.jpg"]
    assert len(read_objects(train)[0]) == 2


@pytest.mark.parametrize("layout", ["images/train", "train/images", "."])
def test_yolo(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / layout
    save_image(folder / "a.png")
    save_image(folder / "b.jpg", 20, 10, exif=Image.Exif.tobytes(turned()))
    save_image(folder / "sub" / "c.png")
    labels = tmp_path / layout.replace("images", "labels")
    (labels / "sub").mkdir(parents=True, exist_ok=True)
    (labels / "a.txt").write_text("1 0.5 0.5 0.5 0.2\n0 0 0 0.5 0 0.5 1.0\n")
    (labels / "b.txt").write_text("1 0.5 0.5 1 1\n")
    (labels / "sub" / "c.txt").write_text("")
    (tmp_path / "data.yaml").write_text("names:\n  0: cell\n  1: nucleus\n")
    data = open_detection(str(folder if layout != "train/images" else folder.parent), "", RGB)
    assert data.classes == ["cell", "nucleus"] and data.counts == [1, 2]
    assert boxes_of(data) == {
        "a.png": [("nucleus", [10, 12, 30, 18], False), ("cell", [0, 0, 20, 30], False)],
        "b.jpg": [("nucleus", [0, 0, 10, 20], False)],
        "c.png": [],
    }
    objects = data.objects(0)
    assert objects.areas.tolist() == pytest.approx([120, 300])
    assert objects.masks == [None, [[0, 0, 20, 0, 20, 30]]]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def test_a_yaml_names_both_parts_of_yolo(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("valid", 2)):
        for i in range(count):
            save_image(tmp_path / part / "images" / f"{i}.png")
            (tmp_path / part / "labels").mkdir(exist_ok=True)
            (tmp_path / part / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.1 0.1")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cell]\n")
    train, test = _annotation_files(DetectionSettings(data=str(tmp_path)))
    assert len(open_detection(train, "", RGB).images) == 3
    assert len(open_detection(test, "", RGB, "--test-images").images) == 2


def test_key_points_after_a_box_are_no_polygon(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.2 0.4 0.4 0.6 0.6\n0 0.5 0.5 0.5 0.2 0.4 0.4 2 0 0 0\n")
    (tmp_path / "data.yaml").write_text("names: [person]\ntrain: images\nkpt_shape: [2, 3]\n")
    for spec in (tmp_path, tmp_path / "data.yaml"):
        assert [each.box for each in read_objects(str(spec))[0]] == [(10, 12, 30, 18)] * 2


def test_lines_that_are_not_objects_are_counted(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    good = "0 0.5 0.5 0.1 0.1\n"
    rows = [f"0 {i / 20} 0.5 0.1 0.1" for i in range(3, 12)]
    (tmp_path / "a.txt").write_text("\n".join([*rows, "0 0.5 nan 0.1 0.1", "x"]) + "\n" + good)
    data = open_detection(str(tmp_path), "", RGB)
    assert "1 annotations have a bbox that is not four numbers" in data.problems
    assert "1 annotations have no category_id that the file lists" in data.problems
    (tmp_path / "a.txt").write_text(good + "x\n")
    with pytest.raises(UserError, match="more than a quarter"):
        open_detection(str(tmp_path), "", RGB)


def test_files_of_other_programs_are_no_annotations(tmp_path: Path) -> None:
    save_image(tmp_path / "images/a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    for name in (".idea/misc.xml", "images/a.png.aux.xml", "project.xml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("<project><size/></project>")
    assert read_objects(str(tmp_path))[0][0].box == (10, 7.5, 30, 22.5)
    with pytest.raises(UserError, match=r"--train-images .*: the images of .* are in"):
        open_detection(str(tmp_path), str(tmp_path / "elsewhere"), RGB)
    assert len(open_detection(str(tmp_path), str(tmp_path / "images"), RGB).images) == 1


def test_objects_of_unreadable_images_are_left_out(tmp_path: Path) -> None:
    for i in range(5):
        save_image(tmp_path / f"images/{i}.png", 120, 30)
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / f"labels/{i}.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "images/0.png").write_bytes(b"damaged")
    objects, problems = read_objects(str(tmp_path))
    assert problems.left_out == 1 and {each.size for each in objects} == {(30, 120)}
    data = open_detection(str(tmp_path), "", RGB)
    assert "1 objects are in images that cannot be read: left out" in data.problems
    (tmp_path / "images/1.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="more than a quarter"):
        read_objects(str(tmp_path))


def test_boxes_of_another_scale_are_refused(tmp_path: Path) -> None:
    save_voc(tmp_path, "a", ("dog", 50, 50, 60, 60, 0), ("dog", 1, 1, 5, 5, 0))
    with pytest.raises(UserError, match="1 boxes are outside their image"):
        open_detection(str(tmp_path), "", RGB)


def test_a_folder_without_boxes_says_so(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="VOC or YOLO"):
        open_detection(str(tmp_path), "", RGB)
