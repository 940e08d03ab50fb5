"""Walk the way of a user with images and a table of labels: advise, pre-train, evaluate by number of labels."""

import csv
import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from helpers.cli import say
from pixmim.data import open_dataset


def test_from_a_table_of_labels_to_the_gain_over_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type what `advise` prints, with a small network and few steps, and evaluate the result and its start."""
    monkeypatch.chdir(tmp_path)
    data = open_dataset("shapes:count=80,size=40,seed=3")
    assert data.labels is not None
    Path("images").mkdir()
    rows = [["file", "shape", "slide"]]
    for i, label in enumerate(data.labels):
        if label < 4:
            Image.fromarray(data.read_array(i)).save(f"images/{i:03d}.png")
            rows.append([f"images/{i:03d}.png", data.classes[label], f"slide {i // 2}"])
    with open("labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    labels = "labels.csv,label=shape"

    status, text = say(capsys, "advise", labels, "--no-trial", "--json", "advice.json")
    assert status == 0, text
    command = shlex.split(json.loads(Path("advice.json").read_text())["commands"][-1])
    assert command[:2] == ["pixmim", "pretrain"] and labels in command
    backbone = ["--model.options", "patch_size", "8", "embed_dim", "32", "depth", "2", "num_heads", "2"]
    for flag in ("--epochs", "--batch-size"):
        if flag in command:
            del command[command.index(flag) : command.index(flag) + 2]
    small = [*backbone, "--steps", "2", "--batch-size", "8", "--out", "run"]
    status, text = say(capsys, *command[1:], *small)
    assert status == 0 and Path("run/encoder/model.safetensors").exists(), text

    by_labels = ["--labelled", labels, "--split", "0.6", "--shots", "1,3,all", "--draws", "2"]
    status, text = say(capsys, "evaluate", "linear", "run", *by_labels, "--epochs", "5")
    assert status == 0 and "images of 4 classes" in text and " groups" in text, text
    for labels in ("1 label per class", "3 labels per class", "all labels"):
        assert f" with {labels}: " in text and f" {labels}: linear probe" in text, text
    assert text.count(" % (start ") == 3
    assert "Accuracy against the number of labels per class" in Path("run/report.html").read_text()
    (split,) = Path("run/evaluations").glob("split-*.csv")
    with open(split, newline="") as file:
        parts = list(csv.DictReader(file))
    groups = [{row["group"] for row in parts if row["part"] == part} for part in ("train", "test")]
    assert len(parts) == len(rows) - 1 and groups[0] and groups[1] and not groups[0] & groups[1]
