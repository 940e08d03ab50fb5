"""VOC and YOLO annotations that expand, lead elsewhere or are damaged are refused with one line."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixmim.data.dataset import RGB
from pixmim.evaluation.detection.dataset import open_detection
from pixmim.utils.errors import UserError

VOC = (
    "<annotation><filename>a.jpg</filename><size><width>9</width><height>9</height></size><object><name>x</name>"
    "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></object></annotation>"
)
LAUGHS = (
    "<!DOCTYPE l ["
    + '<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
)


def save(root: Path, text: str | bytes) -> str:
    for name in ("Annotations", "JPEGImages"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(root / "JPEGImages" / "a.jpg")
    (root / "Annotations" / "a.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(root)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "head",
    [
        LAUGHS + "]>",
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a SYSTEM "http://localhost:9/x.dtd">',
    ],
)
def test_entities_and_external_references_are_refused(tmp_path: Path, head: str, encoding: str) -> None:
    data = (head + VOC.replace(">x<", ">&x;<")).encode(encoding)
    start = time.monotonic()
    with pytest.raises(UserError, match="entities"):
        open_detection(save(tmp_path / "voc", data), "", RGB)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "text",
    ["", "<a>" * 10_000, VOC[:100], VOC.replace("<xmin>1", "<xmin>one"), VOC.replace(">9<", ">9e99<"), "\0\1\2"],
)
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as error:
        open_detection(save(tmp_path / "voc", text), "", RGB)
    assert "\n" not in str(error.value)


def test_a_file_of_megabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exceed the limit"):
        open_detection(save(tmp_path / "voc", VOC + " " * 2**22), "", RGB)


def test_names_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.jpg")
    root = save(tmp_path / "voc", VOC.replace("a.jpg", "../../secret.jpg"))
    assert open_detection(root, "", RGB).images.path_of(0) == f"{root}/JPEGImages/a.jpg"
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("../../../etc/x\n")
    with pytest.raises(UserError, match="lead out of"):
        open_detection(str(lists / "train.txt"), "", RGB)


def test_a_yaml_reads_no_folder_elsewhere_and_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "data.yaml"
    for value in ("../../images", "/etc", "a/../../.."):
        file.write_text(f"train: {value}\nnames: [a]\n")
        with pytest.raises(UserError):
            open_detection(str(file), "", RGB)
    mark = tmp_path / "ran"
    file.write_text(f"!!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(UserError, match="cannot be read"):
        open_detection(str(file), "", RGB)
    assert not mark.exists()
    file.write_text(
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20))
        + "names: *t\n"
    )
    start = time.monotonic()
    with pytest.raises(UserError):
        open_detection(str(file), "", RGB)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("seed", range(20))
def test_random_labels_give_objects_or_one_line(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    words = ["0", "0.5", "nan", "1e308", "-3", "inf", "x", "9" * 400, "\n", "0 0.5 0.5 0.1 0.1\n"]
    (tmp_path / "a.txt").write_text(" ".join(rng.choice(words, 40)))
    try:
        open_detection(str(tmp_path), "", RGB)
    except UserError as error:
        assert str(error)
