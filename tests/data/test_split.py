"""Splits of labeled data: shares of each class, groups that stay together, and the prefix `split:`."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pixmim.data import open_dataset
from pixmim.data.split import split_labeled
from pixmim.data.uri import absolute, read_parts
from pixmim.evaluation.classification import check_labeled
from pixmim.utils.errors import UserError


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.99])
def test_each_class_has_its_share(share: float) -> None:
    labels = np.repeat(np.arange(5), [1, 2, 3, 40, 101])[np.random.default_rng(0).permutation(147)]
    is_train = split_labeled(labels, share, seed=3)
    for label, count in enumerate([1, 2, 3, 40, 101]):
        train = int(is_train[labels == label].sum())
        assert train == 1 if count == 1 else 1 <= train < count
        assert abs(train - share * count) <= 0.5 or train in (1, count - 1)


def test_a_split_depends_on_the_seed_and_the_class_only() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 200)
    one, again, other = (split_labeled(labels, 0.8, seed) for seed in (1, 1, 2))
    assert (one == again).all() and (one != other).any()
    more = np.concatenate([labels, np.full(50, 3)])  # another class does not change the split of the first three
    assert (split_labeled(more, 0.8, 1)[:200] == one).all()


def test_groups_stay_together() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(0, 60, 500)
    labels = (groups % 3 + (random.random(500) < 0.1)) % 3  # a tenth of a group has another class
    is_train = split_labeled(labels, 0.7, 0, groups)
    for group in np.unique(groups):
        assert len(set(is_train[groups == group])) == 1
    for label in range(3):
        assert 0.6 < is_train[labels == label].mean() < 0.8


def test_a_group_counts_for_its_most_frequent_class() -> None:
    labels, groups = np.asarray([0, 0, 1, 1, 1, 0]), np.asarray([5, 5, 5, 6, 6, 6])
    assert split_labeled(labels, 0.5, 0, groups).all()  # the only group of each class is for training


def paths(spec: str) -> list[str]:
    data = open_dataset(spec)
    assert data.spec == spec
    return [data.path_of(i) for i in range(len(data))]


def test_the_prefix_splits_any_data(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = (f"split:{side},share=0.6,seed=1:{pictures}" for side in ("train", "test"))
    assert sorted(paths(train) + paths(test)) == paths(str(pictures)) and len(paths(train)) == 6
    data = open_dataset(test)
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 1] and data.image(0).shape[0] == 3
    check_labeled(open_dataset(train), data, Console(width=300))
    assert "train data: 6 images of 2 classes" in (text := capsys.readouterr().out) and "warning" not in text
    double = open_dataset(f"split:train:{pictures}*2+{pictures}")  # copies of an image are on one side
    assert len(double) == 3 * 8 and len({double.path_of(i) for i in range(24)}) == 8
    assert len(open_dataset("split:test:shapes:count=50")) + len(open_dataset("split:train:shapes:count=50")) == 50


def test_groups_of_a_table(pictures: Path) -> None:
    rows = [f"{name}/{i}.jpg,{name},{name}{i // 2}" for name in ("cats", "dogs") for i in range(5)]
    (pictures / "l.csv").write_text("\n".join(["path,label,patient", *rows]))
    spec = f"share=0.6,seed=0:{pictures}/l.csv,group=patient"
    patients = [
        {f"{Path(p).parent.name}{int(Path(p).stem) // 2}" for p in paths(f"split:{s},{spec}")}
        for s in ("train", "test")
    ]
    assert not patients[0] & patients[1] and len(patients[0] | patients[1]) == 6
    assert "4 groups" in open_dataset(f"split:train,{spec}").description


def test_the_prefix_is_kept_with_absolute_paths(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures)
    spec = absolute("split:test,seed=7:cats*2+dogs")
    assert spec == f"split:test,share=0.8,seed=7:{pictures}/cats*2+{pictures}/dogs" and absolute(spec) == spec
    assert [part.weight for part in read_parts(spec)] == [2, 1]


@pytest.mark.parametrize(
    "prefix",
    [
        "split:",
        "split:val:",
        "split:train",
        "split:train,share=1:",
        "split:train,share=nan:",
        "split:train,seed=-1:",
        "split:test,sead=1:",
        "split:test,seed=1,seed=2:",
        "split:test,share=0.0:",
        "split:train:split:test:",
    ],
)
def test_malformed_prefixes(prefix: str, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"split:train,share=0\.8,seed=0:DATA"):
        open_dataset(f"{prefix}{pictures}")


def test_data_that_cannot_be_split(pictures: Path) -> None:
    with pytest.raises(UserError, match="no labels"):
        open_dataset(f"split:train:{pictures}/cats")
    (pictures / "l.csv").write_text("path,label\ncats/0.jpg,a\ndogs/0.jpg,b")
    with pytest.raises(UserError, match=r"split:test,share=0\.8,seed=0:: each class has a single image"):
        open_dataset(f"split:test:{pictures}/l.csv")
