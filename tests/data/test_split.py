"""Splits of labeled data: shares of each class, groups that stay together, folds, and the prefix `split:`."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pixmim.data import open_dataset
from pixmim.data.dataset import ImageDataset, Subset
from pixmim.data.sampler import ShuffledOrder
from pixmim.data.split import assign_folds, assign_split, draw_labels, fold_labeled, hold_out, split_labeled
from pixmim.data.uri import SplitSpec, absolute, describe_split, read_parts
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
    assert data.spec == describe_split(spec)
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
    data = open_dataset(f"split:train,{spec}")
    assert "4 groups" in data.description and data.groups is not None and len(set(data.groups)) == 4
    plain = open_dataset(f"split:train,{spec.removesuffix(',group=patient')}")  # found by its name
    assert [plain.path_of(i) for i in range(len(plain))] == [data.path_of(i) for i in range(len(data))]


def test_the_prefix_is_kept_with_absolute_paths(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures)
    spec = absolute("split:test,seed=7:cats*2+dogs")
    assert spec == f"split:test,share=0.8,seed=7:{pictures}/cats*2+{pictures}/dogs" and absolute(spec) == spec
    assert [part.weight for part in read_parts(spec)] == [2, 1]


@pytest.mark.parametrize(("share", "seed"), [(0.8, 0), (1e-7, 2**63 - 1), (1 / 3, 5)])
def test_any_share_and_seed_can_be_written_as_a_prefix(share: float, seed: int) -> None:
    spec = SplitSpec("test", share, seed).prefix + "labels.csv"
    assert SplitSpec.read(spec) == (SplitSpec("test", share, seed), "labels.csv")
    assert "split:" not in describe_split(spec) and describe_split(spec).startswith("test part of labels.csv (share ")


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
        "split:test,share=1e-5:",
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
    with pytest.raises(UserError, match=r"left for the test part: each class has a single image"):
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


def patients(folder: Path, name: str, rows: list[str]) -> str:
    (folder / name).write_text("\n".join(["path,label,patient", *rows]))
    return f"{folder}/{name}"


def test_groups_of_a_mixture_are_those_of_its_parts_by_name(pictures: Path) -> None:
    rows = [f"{c}/{i}.jpg,{c},{p}" for c in ("cats", "dogs") for i, p in enumerate(("ann", "bob", "", "cy", "cy"))]
    a, b = patients(pictures, "a.csv", rows[:5]), patients(pictures, "b.csv", rows[5:])
    data = open_dataset(f"{a}*2+{b}")
    assert data.groups is not None
    assert [data.group_names[i] for i in data.groups[:5]] == ["ann", "bob", "", "cy", "cy"]
    assert np.array_equal(data.groups[:5], data.groups[5:10])  # copies, also of the image without a group
    own, other = data.groups[:5], data.groups[10:]
    assert (own[[0, 1, 3]] == other[[0, 1, 3]]).all() and own[2] != other[2]
    for split in (assign_split(data, 0.5, 0), assign_folds(open_dataset(f"{a}+{b}"), 2, 0)):
        parts: dict[str, set[str]] = {}
        for _, _, group, part in split.rows(data if len(split.part) == 15 else open_dataset(f"{a}+{b}"))[1:]:
            parts.setdefault(group, set()).add(part)
        assert all(len(found) == 1 for group, found in parts.items() if group)
    with pytest.raises(UserError, match=r"3 groups have images in both"):
        check_labeled(data, open_dataset(f"{a}+{b}"))
    rows = [f"{c}/{i}.jpg,{c},p{i}" for c in ("cats", "dogs") for i in range(5)]
    a, b = patients(pictures, "a.csv", rows[:5]), patients(pictures, "b.csv", rows[5:])
    for seed in range(5):
        train, held = hold_out(open_dataset(f"{a}+{b}"), 0.2, seed)
        sides = [{side.group_names[i] for i in side.groups} for side in (train, held)]  # type: ignore[union-attr]
        assert not sides[0] & sides[1] and all(sides)


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


def test_folds_have_the_properties_of_sklearns_stratified_group_folds() -> None:
    """Test each image once and each group in one fold, with class shares as even as scikit-learn's."""
    selection = pytest.importorskip("sklearn.model_selection", reason="pip install scikit-learn: folds are unchecked")
    random = np.random.default_rng(0)
    groups = random.integers(0, 60, 500)
    labels = (groups % 3 + (random.random(500) < 0.2)) % 3
    ours = fold_labeled(labels, 5, 0, groups)
    theirs = np.zeros(500, np.int64)
    split = selection.StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, groups)
    for i, (train, test) in enumerate(split):
        theirs[test] = i
        assert not set(groups[ours == i]) & set(groups[ours != i]) and not set(groups[train]) & set(groups[test])

    def unevenness(folds: np.ndarray) -> float:
        return float(np.std([[(labels[folds == i] == c).sum() for c in range(3)] for i in range(5)], axis=0).mean())

    assert set(ours) == set(range(5)) and unevenness(ours) <= 1.1 * unevenness(theirs)


def test_folds_without_groups_are_as_even_as_counts_allow() -> None:
    labels = np.repeat(np.arange(4), [5, 7, 43, 101])[np.random.default_rng(0).permutation(156)]
    folds = fold_labeled(labels, 5, seed=1)
    for counts in [np.bincount(folds), *(np.bincount(folds[labels == c], minlength=5) for c in range(4))]:
        assert counts.max() - counts.min() <= 1
    assert (folds == fold_labeled(labels, 5, seed=1)).all() and (folds != fold_labeled(labels, 5, seed=2)).any()


def test_drawn_labels_are_stratified_and_a_larger_number_adds_to_them() -> None:
    labels = np.repeat(np.arange(3), [4, 30, 200])[np.random.default_rng(0).permutation(234)]
    few, many = draw_labels(labels, 3, 0, draw=1), draw_labels(labels, 20, 0, draw=1)
    assert np.bincount(labels[few]).tolist() == [3, 3, 3] and np.bincount(labels[many]).tolist() == [4, 20, 20]
    assert set(few) < set(many) and (np.diff(many) > 0).all()
    assert set(few) != set(draw_labels(labels, 3, 0, draw=2)) and set(few) != set(draw_labels(labels, 3, 1, draw=1))
    more = np.append(labels, [3] * 9)  # another class changes nothing
    assert set(few) == set(draw_labels(more, 3, 0, draw=1)[:-3])
    frequency = sum(np.bincount(draw_labels(labels, 3, 0, draw), minlength=234) for draw in range(300)) / 300
    for label, count in enumerate([4, 30, 200]):
        assert np.abs(frequency[labels == label] - 3 / count).max() < 0.1


def test_images_with_the_same_bytes_stay_together(pictures: Path) -> None:
    """Copies join what they are copied from, and so do their groups."""
    for i in range(5):
        shutil.copy(pictures / f"cats/{i}.jpg", pictures / f"cats/copy{i}.jpg")
    for data, parts in ((open_dataset(str(pictures)), range(2)), (open_dataset(str(pictures)), range(3))):
        split = assign_split(data, 0.5, 0) if len(parts) == 2 else assign_folds(data, 3, 0)
        part = {Path(row[0]).name: row[3] for row in split.rows(data)[1:] if row[1] == "cats"}
        assert all(part[f"{i}.jpg"] == part[f"copy{i}.jpg"] for i in range(5)) and len(set(part.values())) == len(parts)
        assert split.note == "5 images have the same bytes as another and are in its part"
    assert "5 images have the same bytes" in open_dataset(f"split:test:{pictures}").left_out
    twice = open_dataset(f"{pictures}*2")
    part_of = assign_folds(twice, 3, 0).part
    assert np.array_equal(part_of[: len(twice) // 2], part_of[len(twice) // 2 :])

    names = [f"{name}{i}.jpg" for i in range(5) for name in ("cats/", "cats/copy", "dogs/")]
    rows = [f"{name},{name[:4]},{'ab'[j % 2]}{j // 4}" for j, name in enumerate(names)]
    (pictures / "l.csv").write_text("\n".join(["path,label,group", *rows]))
    data = open_dataset(f"{pictures}/l.csv")
    table = [[Path(row[0]).name.removeprefix("copy"), *row[1:]] for row in assign_split(data, 0.5, 0).rows(data)[1:]]
    linked: dict[tuple[str, str], set[str]] = {}  # part of each file and of each group
    for name, label, group, part in table:
        linked.setdefault((label, name), set()).add(part)
        linked.setdefault(("", group), set()).add(part)
    assert all(len(parts) == 1 for parts in linked.values()) and {row[2] for row in table} == {
        *["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]
    }


def test_folds_that_a_class_cannot_fill(pictures: Path) -> None:
    with pytest.raises(UserError, match=r"--folds 6: class 'cats' of .* has 5 images, which"):
        assign_folds(open_dataset(str(pictures)), 6, 0)
    rows = [f"{name}/{i}.jpg,{name},{name}{i // 2}" for name in ("cats", "dogs") for i in range(5)]
    (pictures / "l.csv").write_text("\n".join(["path,label,patient", *rows]))
    with pytest.raises(UserError, match=r"--folds 4: class 'cats' of .* has 5 images in 3 groups"):
        assign_folds(open_dataset(f"{pictures}/l.csv"), 4, 0)


def test_train_and_test_tables_that_share_a_group_are_refused(pictures: Path) -> None:
    for name, patients in (("a", ("ann", "bob", "ann", "bob")), ("b", ("bob", "cy", "cy", ""))):
        rows = [f"{c}/{i}.jpg,{c},{patients[2 * j + i]}" for j, c in enumerate(("cats", "dogs")) for i in range(2)]
        (pictures / f"{name}.csv").write_text("\n".join(["path,label,patient", *rows]))
    with pytest.raises(UserError, match=r"1 groups have images in both .*a\.csv and .*b\.csv: bob\..*--labelled"):
        check_labeled(open_dataset(f"{pictures}/a.csv"), open_dataset(f"{pictures}/b.csv"))
    check_labeled(open_dataset(f"{pictures}/a.csv,group=path"), open_dataset(f"{pictures}/b.csv"))
