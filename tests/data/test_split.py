"""Splits of labeled data: shares of each class, groups that stay together, and the prefix `split:`."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pixmim.data import open_dataset
from pixmim.data.dataset import ImageDataset, Subset
from pixmim.data.sampler import ShuffledOrder
from pixmim.data.split import hold_out, split_labeled
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


def indices(data: ImageDataset) -> list[int]:
    assert isinstance(data, Subset)
    return data.indices


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5])
def test_held_out_images_are_a_function_of_the_seed(share: float) -> None:
    data = open_dataset("shapes:count=200,size=16")
    train, held = hold_out(data, share, seed=1)
    assert sorted(indices(train) + indices(held)) == list(range(200)) and len(held) == max(1, round(200 * share))
    assert indices(hold_out(data, share, seed=1)[1]) == indices(held)
    assert indices(hold_out(data, 0.5, seed=2)[1]) != indices(hold_out(data, 0.5, seed=1)[1])


def test_at_most_4096_images_are_held_out() -> None:
    train, held = hold_out(open_dataset("shapes:count=100000,size=16"), 0.2, 0)
    assert len(held) == 4096 and len(train) == 100_000 - 4096


def test_groups_are_held_out_together() -> None:
    data = open_dataset("shapes:count=100,size=16")
    data.groups = np.arange(100) // 7
    train, held = hold_out(data, 0.2, 0)
    assert train.groups is not None and held.groups is not None
    assert 0 < len(held) <= 20 and not set(train.groups) & set(held.groups)
    data.groups = np.zeros(100, np.int64)
    with pytest.raises(UserError, match="--hold-out"):
        hold_out(data, 0.2, 0)


def test_copies_in_a_mixture_are_held_out_together() -> None:
    data = open_dataset("shapes:count=30,size=16*3+shapes:count=10,size=16,seed=5")
    train, held = hold_out(data, 0.1, 0)
    assert len(held) == 3 + 1 and len(train) == 3 * 27 + 9

    def names(side: ImageDataset) -> set[str]:
        return {side.path_of(i) for i in range(len(side))}

    assert len(names(held)) == 4 and not names(train) & names(held)


def test_the_shards_of_the_images_to_train_on_stay() -> None:
    data = open_dataset("shapes:count=20,size=16")
    data.shard_sizes = np.asarray([1, 3, 1, 8, 1, 6])
    train, held = hold_out(data, 0.3, 0)
    assert train.shard_sizes is not None and held.shard_sizes is None
    assert len(train.shard_sizes) == len(data.shard_sizes) and train.shard_sizes.sum() == len(train)
    ends = np.cumsum(data.shard_sizes)
    expected = np.bincount(np.searchsorted(ends, indices(train), side="right"), minlength=len(ends))
    assert train.shard_sizes.tolist() == expected.tolist()
    order = ShuffledOrder(0, len(train), train.shard_sizes).at(0, np.arange(len(train)))
    assert sorted(order.tolist()) == list(range(len(train)))  # also where a shard has lost all its images
