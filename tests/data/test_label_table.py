"""Tables of paths and labels: columns, rows that are left out, hostile files; and patterns that choose images."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from helpers.cli import say
from pixmim import cli
from pixmim.cli.pretrain import read_flags
from pixmim.data import label_table, open_dataset
from pixmim.data.image_folder import ImageFolder
from pixmim.data.uri import absolute, read_parts, with_patterns
from pixmim.evaluation.classification import check_labeled
from pixmim.utils.errors import UserError

Write = Callable[..., str]


@pytest.fixture
def write(pictures: Path) -> Write:
    """Return a function that writes a table beside the class folders of ten images, and returns its path."""

    def write_table(text: str, name: str = "labels.csv") -> str:
        (pictures / name).write_text(text)
        return str(pictures / name)

    return write_table


def names(data: object) -> list[str]:
    assert isinstance(data, ImageFolder) and data.labels is not None
    return [data.classes[label] for label in data.labels]


def refusal(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(spec)
    return str(caught.value)


def test_rows_are_those_of_a_slow_reader(write: Write, pictures: Path) -> None:
    random = np.random.default_rng(0)
    rows = [
        (f"{folder}/{i}.jpg", random.choice(["", "a", " b", "ü;,\t"]), random.choice(["p", "q", ""]))
        for folder in ("cats", "dogs")
        for i in random.permutation(5)
    ]
    file = pictures / "labels.csv"
    with open(file, "w", newline="") as out:
        csv.writer(out).writerows([("File", "age", "Class", "patient"), *((p, 3, c, g) for p, c, g in rows)])
    data = open_dataset(f"{file},group=patient")
    with open(file, newline="") as again:
        expected = [row for row in csv.DictReader(again) if row["Class"].strip()]
    assert [data.path_of(i) for i in range(len(data))] == [f"{pictures}/{row['File']}" for row in expected]
    assert names(data) == [row["Class"].strip() for row in expected] and data.classes == sorted(set(names(data)))
    assert data.left_out == f"left out of labels.csv: {10 - len(expected)} rows without a label"
    assert "paths from column 'File', classes from 'Class', groups from 'patient'; left out" in data.description
    assert isinstance(data, ImageFolder) and data.groups is not None
    for i, one in enumerate(expected):  # an image without a group is its own
        for j, two in enumerate(expected):
            same = i == j or one["patient"] == two["patient"] != ""
            assert (data.groups[i] == data.groups[j]) == same
    assert data.image(0).shape[0] == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "path;label\ncats/0.jpg;1,5\ndogs/0.jpg;2\n"),
        ("a.csv", "path\tlabel\ncats/0.jpg\t1,5\ndogs/0.jpg\t2"),
        ("a.TSV", "path\tlabel\ncats/0.jpg\t1,5\ndogs/0.jpg\t2"),
        ("a.csv", '"path","label"\r\n"cats/0.jpg","1,5"\r\n\r\ndogs/0.jpg,2\r\n'),
        ("a.csv", 'label,path\r"1,5",cats/0.jpg\r2,dogs/0.jpg'),
        ("a.csv", "sep=;\r\npath;label\r\ncats/0.jpg;1,5\r\ndogs/0.jpg;2\r\n"),
        ("a.csv", '\ufeff"sep=,",\npath,label\ncats/0.jpg,"1,5"\ndogs/0.jpg,2\n'),
        ("a.csv", "SEP=|\rlabel|path\r1,5|cats/0.jpg\r2|dogs/0.jpg"),
        ("a.csv", '"path";"label";"of, with, commas"\ncats/0.jpg;1,5;\ndogs/0.jpg;2;\n'),
    ],
)
def test_separators_quotes_and_line_ends(write: Write, pictures: Path, name: str, text: str) -> None:
    (pictures / name).write_bytes(text.encode())
    assert names(open_dataset(str(pictures / name))) == ["1,5", "2"]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("first", ["", "sep=,\r\n"])
def test_encodings(pictures: Path, coding: str, first: str) -> None:
    Image.new("RGB", (9, 9)).save(pictures / "größe.png")
    (pictures / "a.csv").write_bytes(f"{first}path,label\ngröße.png,ä\ncats/0.jpg,b".encode(coding))
    data = open_dataset(str(pictures / "a.csv"))
    assert names(data) == ["ä", "b"] and data.image(0).shape == (3, 9, 9)


def test_columns_that_are_given(write: Write, pictures: Path) -> None:
    file = write("path,scan,label,finding\nx,0.jpg,1,mass\ny,1.jpg,2,none\n")
    spec = f"{file},path=scan,label=finding,root={pictures}/cats"
    data = open_dataset(spec)
    assert names(data) == ["mass", "none"] and data.path_of(1) == f"{pictures}/cats/1.jpg" and data.spec == spec
    mixed = open_dataset(f"{spec}*2+{pictures}/dogs")
    assert len(mixed) == 2 * 2 + 5


def test_paths_in_specs_become_absolute(write: Write, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("path,a b\ncats/0.jpg,1\ndogs/0.jpg,2")
    monkeypatch.chdir(pictures)
    spec = absolute("labels.csv,label=a b,root=.*2+cats,exclude=*_mask.png,exclude=[ab]/*.jpg")
    assert spec == (
        f"{pictures}/labels.csv,label=a b,root={pictures}*2+{pictures}/cats,exclude=*_mask.png,exclude=[ab]/*.jpg"
    )
    assert absolute(spec) == spec and [part.weight for part in read_parts(spec)] == [2, 1]
    (pictures / "a,label=b").mkdir()
    Image.new("RGB", (9, 9)).save(pictures / "a,label=b" / "x.png")
    assert len(open_dataset("a,label=b")) == 1 and len(open_dataset("a,label=b,include=x*")) == 1


def test_a_table_without_classes(write: Write) -> None:
    data = open_dataset(write("image,age\ncats/0.jpg,1\ndogs/0.jpg,\n"))
    assert len(data) == 2 and data.labels is None and not data.classes
    assert "label=COLUMN" in data.no_labels_message and "image, age" in data.no_labels_message


def test_left_out_rows_are_counted_and_printed(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_dataset(write("path,label\ncats/0.jpg,a\ncats/0.jpg,a\ncats/1.jpg,\n,a\ndogs/0.jpg,b\ndogs/0.jpg,b\n"))
    note = "left out of labels.csv: 1 rows without a label, 1 rows without a path, 2 rows that repeat another"
    assert names(data) == ["a", "b"] and data.left_out == note
    check_labeled(data, data, Console(width=300))
    assert f"train data: 2 images of 2 classes: a 50.0 %, b 50.0 % ({note})" in capsys.readouterr().out
    assert open_dataset(f"{data.spec}+{data.spec}").left_out == f"{note}; {note}"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "path,label\na.jpg,1",
            ",label=lable",
            "no column 'lable' (label=); did you mean 'label'? Its columns: path, ",
        ),
        ("path,label\na.jpg,1", ",group=visit", "no column 'visit' (group=). Its columns: path, label"),
        ("foo,label\na.jpg,1", "", "add ,path=COLUMN with one of its columns: foo, label"),
        ("a.jpg,1\nb.jpg,2", "", "no header: its first line must name the columns"),
        ("path,label\na.jpg,1", ",lable=x", "no option lable=; did you mean 'label'? Its options: path, label, group"),
        ("path,label\na.jpg,1", ",image=x", "no option image="),
        ("path,label\na.jpg,1", ",label=", "no value for label="),
        ("path,label\na.jpg,1", ",label=label,label=path", "label= 2 times"),
        ("path,label\na.jpg,1", ",root=/nosuch", "/nosuch"),
        ("path,path\na.jpg,1", "", "2 columns 'path'"),
        ("path,label\n", "", "lists no images"),
        ("path,label\na.jpg,\nb.jpg,", "", "lists no images; left out of labels.csv: 2 rows without a label"),
        ("", "", "is empty"),
        ("\n\n\npath,label", "", "is empty"),
        ("path,label\na.jpg,1\nb.jpg", "", "line 3: 1 values, but the header has 2"),
        ("path,label\na.jpg,1,2\n", "", "line 2: 3 values, but the header has 2"),
        ("sep=;\npath;label\na.jpg;1;2\n", "", "line 3: 3 values, but the header has 2"),
        ("sep=;\n", "", "is empty"),
        ('path,label\na.jpg,"1\nb.jpg,2\n', "", "line 3: unexpected end of data"),
        ("path,label\na\0.jpg,1\n", "", "zero byte"),
        ("path,label\n../a.jpg,1\ncats/0.jpg,2", "", "1 of the 2 paths"),
        ("path,label\n/etc/passwd,1\n", "", ",root=FOLDER"),
        ("path,label\ncats/../../x,1\n", "", "lead out"),
        ("path,label\ncats/9.jpg,1\n0,2", "", "cats/9.jpg, which"),
        ("path,label\ncats/0.jpg,1\ncats/0.jpg,2", "", "gives 'cats/0.jpg' two labels, '1' and '2'"),
        ("path,label,g\ncats/0.jpg,1,a\ncats/0.jpg,1,b", ",group=g", "two groups, 'a' and 'b'"),
        ("path,label\n" + "a" * 5000 + ",1", "", "5,000 characters"),
        ("path,label\n" + "a" * 200_000 + ",1", "", "field limit"),
        (",".join(map(str, range(10**6))) + "\n", "", "longer than 4,194,304 bytes"),
        ("," * 10**6 + "\n", "", "is empty"),
        ("a," * 10**6 + "\n", "", "1,000,001 columns"),
        ("path,label\n" + "," * 10**6, "", "line 2: 1,000,001 values"),
    ],
)
def test_refused_tables(write: Write, text: str, options: str, message: str) -> None:
    refused = refusal(write(text) + options)
    assert message in refused and "labels.csv" in refused and len(refused) < 1000


def test_other_encodings_are_refused(pictures: Path) -> None:
    file = pictures / "a.csv"
    file.write_bytes("path,label\ngröße.png,1".encode("latin-1"))
    assert "line 2: not text in UTF-8" in refusal(str(file))
    file.write_bytes("path,label\ncats/0.jpg,1".encode("utf-16-le"))
    assert "zero byte" in refusal(str(file))
    file.write_bytes("path,label\ncats/0.jpg,1".encode("utf-16")[:-1])
    assert "starts as UTF-16" in refusal(str(file))


def test_bounds(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixmim.data import image_folder

    file = write("path,label\n" * 9)
    monkeypatch.setattr(image_folder, "MAX_LINES", 8)
    assert "more than 8 lines" in refusal(file)
    monkeypatch.setattr(image_folder, "MAX_LIST_BYTES", 9)
    assert "exceed the limit of 9" in refusal(file)


def test_a_missing_file_is_an_unreadable_image(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("path,label\nnosuch.jpg,1\ncats/0.jpg,2")
    assert len(open_dataset(file)) == 2
    monkeypatch.setattr(label_table, "_MAX_SOUGHT", 1)
    assert "nosuch.jpg" in refusal(file)


def test_one_class_is_refused_by_evaluations(write: Write) -> None:
    data = open_dataset(write("path,label\ncats/0.jpg,1\ncats/1.jpg,1\ncats/2.jpg,\n"))
    with pytest.raises(UserError, match="a single class, '1'"):
        check_labeled(data, data)


def test_parquet_of_paths(pictures: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = [f"cats/{i}.jpg" for i in range(4)] + ["dogs/0.jpg"]
    columns = {
        "file": paths,
        "label": pyarrow.array(["b", "a", None, "", "a"]).dictionary_encode(),
        "grade": [3, None, 1, 2, 3],
        "score": [1.0, float("nan"), 1.0, 2.0, 2.0],
        "raw": [b"x"] * 5,
        "list": [[1]] * 5,
    }
    parquet.write_table(
        pyarrow.table({name: columns[name] for name in ("file", "label", "grade")}), pictures / "t.parquet"
    )
    data = open_dataset(f"{pictures}/t.parquet")
    assert names(data) == ["b", "a", "a"] and data.path_of(2) == f"{pictures}/dogs/0.jpg" and "2 rows" in data.left_out
    data = open_dataset(f"{pictures}/t.parquet,label=grade,group=label")
    assert names(data) == ["3", "1", "2", "3"] and isinstance(data, ImageFolder) and data.groups is not None
    parquet.write_table(pyarrow.table(columns), pictures / "all.parquet")  # the bytes could be images
    assert names(open_dataset(f"{pictures}/all.parquet,path=file,label=score")) == ["1", "1", "2", "2"]
    for column in ("raw", "list"):
        assert f"column '{column}'" in refusal(f"{pictures}/all.parquet,path=file,label={column}")
    assert "no column 'nosuch' (path=)" in refusal(f"{pictures}/all.parquet,path=nosuch")
    whole = (pictures / "all.parquet").read_bytes()
    (pictures / "all.parquet").write_bytes(whole[: len(whole) // 2])
    assert "all.parquet cannot be read" in refusal(f"{pictures}/all.parquet,path=file")


@pytest.mark.usefixtures("own_datasets_cache")
def test_a_parquet_of_images_takes_its_columns_without_a_prefix(pictures: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [(pictures / "cats" / f"{i}.jpg").read_bytes() for i in range(2)]
    table = pyarrow.table({"path": ["a", "b"], "photo": images, "small": images, "kind": ["x", "y"]})
    parquet.write_table(table, pictures / "t.parquet")
    data = open_dataset(f"{pictures}/t.parquet,image=photo,label=kind")
    assert data.classes == ["x", "y"] and data.image(1).shape == (3, 41, 55)
    assert "add ,image= and one of photo, small" in refusal(f"{pictures}/t.parquet")


def test_a_text_that_repeats_in_parquet_is_not_expanded(pictures: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(100_000, np.int32)), ["x" * 10**6])
    parquet.write_table(pyarrow.table({"path": long}), pictures / "t.parquet")  # 100 GB as text
    assert "1,000,000 characters" in refusal(f"{pictures}/t.parquet")


# Patterns


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (",exclude=*_mask.png", ["a/0.jpg", "a/1.png", "b/masks/2.png", "loose.PNG"]),
        (",include=*.png", ["a/1.png", "a/1_mask.png", "b/masks/2.png"]),
        (",include=*.png,include=*.jpg,exclude=*mask*", ["a/0.jpg", "a/1.png", "b/masks/2.png"]),
        (",exclude=*/masks/*,exclude=loose*", ["a/0.jpg", "a/1.png", "a/1_mask.png"]),
        (",include=a/*", ["a/0.jpg", "a/1.png", "a/1_mask.png"]),
        (",include=[0-1].*", ["a/0.jpg", "a/1.png"]),
        (",exclude=nosuch", ["a/0.jpg", "a/1.png", "a/1_mask.png", "b/masks/2.png", "loose.PNG"]),
    ],
)
def test_patterns_choose_images(tmp_path: Path, options: str, left: list[str]) -> None:
    everything = ["a/0.jpg", "a/1.png", "a/1_mask.png", "b/masks/2.png", "loose.PNG"]
    for name in everything:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data = open_dataset(f"{tmp_path}{options}")
    assert [data.path_of(i) for i in range(len(data))] == [f"{tmp_path}/{name}" for name in left]
    assert data.left_out == data.description == f"{5 - len(left)} images left out by {options[1:]}"
    tops = sorted({name.split("/")[0] for name in left})
    assert data.classes == ([] if "loose.PNG" in left else tops)  # an image beside the folders removes the classes
    assert open_dataset(f"{tmp_path}").left_out == ""


def test_patterns_that_leave_nothing_or_do_not_apply(pictures: Path) -> None:
    assert "no images left in" in (text := refusal(f"{pictures},include=*.png")) and "10 images left out" in text
    assert "has no option exlude=; did you mean 'exclude'?" in refusal(f"{pictures},exlude=*.png")
    (pictures / "l.txt").write_text("cats/0.jpg")
    assert "has no option include=. Its options: root" in refusal(f"{pictures}/l.txt,include=*")
    assert f"the folder {pictures}/nosuch does not exist" in refusal(f"{pictures}/nosuch,include=*")


def test_commands_print_what_is_left_out(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["stats"], ["cache"]):
        assert (
            cli.main([*command, f"{pictures},exclude=cats/*", *([str(tmp_path / "c")] * (command == ["cache"]))]) == 0
        )
        assert "5 images left out by exclude=cats/*" in capsys.readouterr().out


@pytest.mark.parametrize("mark", [", ", ",", "\t", " "])
@pytest.mark.parametrize(("coding", "end"), [("utf-8", "\r\n"), ("utf-8-sig", "\r"), ("utf-16", "\n")])
def test_a_list_has_the_class_of_each_image_after_its_path(pictures: Path, mark: str, coding: str, end: str) -> None:
    lines = [f"{folder}/{i}.jpg{mark}ü{i % 2}" for folder in ("cats", "dogs") for i in (3, 0, 4)]
    (pictures / "list.txt").write_bytes((end.join(["", *lines, "cats/1.jpg", lines[0]])).encode(coding))
    data = open_dataset(f"{pictures}/list.txt")
    assert [data.path_of(i) for i in range(len(data))] == [f"{pictures}/{line.split(mark)[0]}" for line in lines]
    assert names(data) == [line.split(mark)[1] for line in lines] and data.classes == ["ü0", "ü1"]
    assert data.left_out == "left out of list.txt: 1 rows without a label, 1 rows that repeat another"


def test_a_list_of_paths_with_commas_and_blanks_has_no_classes(pictures: Path) -> None:
    for name in ("a, b.jpg", "a b", "a.jpg,b"):  # the last two are files of these names
        (pictures / name).write_bytes((pictures / "cats/0.jpg").read_bytes())
        (pictures / "list.txt").write_text(f"{name}\ncats/0.jpg\n")
        data = open_dataset(f"{pictures}/list.txt")
        assert data.labels is None and data.path_of(0) == f"{pictures}/{name}"
        assert "PATH, CLASS" in data.no_labels_message


def test_a_list_with_classes_is_refused_as_a_table_is(pictures: Path) -> None:
    def refused(text: str, options: str = "") -> str:
        (pictures / "list.txt").write_text(text)
        return refusal(f"{pictures}/list.txt{options}")

    assert "two labels, 'a' and 'b'" in refused("cats/0.jpg, a\n./cats/0.jpg, b\n")
    assert "lead out" in refused("../x.jpg, a\n") and "root=FOLDER" in refused("/etc/x.jpg, a\n")
    assert "nor does any of the first 2" in refused("cats/8.jpg, a\ncats/9.jpg, b\n")
    assert "no option label=" in refused("cats/0.jpg, a\n", ",label=x")
    (pictures / "list.txt").write_text(f"cats/0.jpg, a\n{pictures.parent}/other/1.jpg, b\n")
    (pictures.parent / "other").mkdir()
    assert len(open_dataset(f"{pictures}/list.txt,root={pictures.parent}/other")) == 2


def test_tables_of_other_programs(write: Write, pictures: Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"path": ["cats/0.jpg", "cats/1.jpg", "dogs/0.jpg"], "label": [1.0, None, 20.0]})
    parquet.write_table(table, pictures / "pandas.parquet")  # pandas: integers with a missing value
    assert open_dataset(f"{pictures}/pandas.parquet").classes == ["1", "20"]
    rows = "cats/0.jpg,1.0,7.0\ncats/1.jpg,,7.0\ndogs/0.jpg,20.0,\n"
    data = open_dataset(write(f"path,label,group\n{rows}", "pandas.csv"))
    assert data.classes == ["1", "20"] and data.group_names == ["", "7"]
    assert open_dataset(write("path,label\ncats/0.jpg,1.0\ndogs/0.jpg,1\n", "versions.csv")).classes == ["1", "1.0"]
    assert open_dataset(write("path,label\ncats/0.jpg,a\ndogs/0.jpg,b\n", "commas.tsv")).classes == ["a", "b"]
    excel = write("\ufeff path ;label\ncats/0.jpg ; a\ndogs/0.jpg;b ", "excel.csv")
    assert open_dataset(excel).classes == ["a", "b"]
    windows = refusal(write("path,label\nC:\\x\\cats\\0.jpg,a\ncats\\1.jpg,b\n"))
    assert "those of Windows. Replace each \\ by /" in windows


@pytest.mark.parametrize("name", ["labels.csv", "x.txt", "x.zip", "x"])
def test_a_missing_file_is_not_called_a_folder(pictures: Path, name: str) -> None:
    assert f"the {'file' if '.' in name else 'folder'} {pictures / 'no' / name} does not" in refusal(
        str(pictures / "no" / name)
    )


def test_flags_choose_images_as_options_of_the_data(pictures: Path) -> None:
    spec = with_patterns(f"{pictures}*2+{pictures}", ["*.jpg"], ["0*", "dogs/*"])
    data = open_dataset(spec)
    one = [f"{pictures}/cats/{i}.jpg" for i in range(1, 5)]
    assert [data.path_of(i) for i in range(len(data))] == one * 3 and absolute(spec) == spec
    split = with_patterns(f"split:test,share=0.5:{pictures}", [], ["0*"])
    assert split == f"split:test,share=0.5,seed=0:{pictures},exclude=0*"
    assert with_patterns("x", [], []) == "x"
    for pattern in ("", "a+b", "*3", "a,root=b"):
        with pytest.raises(UserError, match=r"write \? in place"):
            with_patterns(str(pictures), [pattern], [])
    with pytest.raises(UserError, match="'shapes:' is neither"):
        with_patterns(f"{pictures}+shapes:", [], ["a"])


def test_flags_choose_images_in_every_command(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = f"{pictures},include=*.jpg,exclude=0*"
    flags = ["--include", "*.jpg", "--exclude", "0*"]
    assert read_flags(["demo", "--data", str(pictures), *flags]).config.data == chosen
    for args, message in (
        (["stats", str(pictures), *flags], "left out by include=*.jpg,exclude=0*"),
        (["advise", str(pictures), "--no-trial", *flags], "exclude=0*"),
        (["cache", str(pictures), str(tmp_path / "cache"), "--size", "16", *flags], "left out by include"),
        (["evaluate", "knn", "x", "--labelled", "shapes:", *flags], "'shapes:' is neither"),
        (["evaluate", "detection", "x", "--data", str(pictures), *flags], "its masks or boxes choose the images"),
        (["embed", "x", "--data", "shapes:", "--out", "x.npy", *flags], ""),
    ):
        say(capsys, *args)[1].index(message)
