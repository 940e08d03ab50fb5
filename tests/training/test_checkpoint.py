"""Test checkpoints: which are kept, failed writes, and untrusted or damaged files."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pixmim.training.checkpoint import CheckpointManager, is_multiple_of
from pixmim.training.optim import SyncFreeOptimizer, adamw
from pixmim.training.sharded_checkpoint import (
    Part,
    difference,
    own_share,
    read_manifest,
    restore,
    write_manifest,
    write_share,
)
from pixmim.utils.errors import UserError


def build() -> tuple[nn.Module, SyncFreeOptimizer]:
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    return model, SyncFreeOptimizer(adamw(model, 0.1, (0.9, 0.95), 0.05), None, False, torch.device("cpu"))


def learn(model: nn.Module, updater: SyncFreeOptimizer) -> None:
    updater.backward(model(torch.ones(2, 4)).square().sum())
    updater.step(0.1)


@pytest.mark.parametrize("every", [1.0, 3.0, 2.5, 7.8125, 0.4])
def test_milestones_are_the_multiples(every: float) -> None:
    expected = {max(1, round(k * every)) for k in range(1, round(100 / every) + 1)}
    assert {step for step in range(1, 101) if is_multiple_of(step, every)} == {step for step in expected if step <= 100}


def test_no_milestones() -> None:
    assert not any(is_multiple_of(step, 0.0) for step in range(1, 100))


def test_the_last_ones_and_the_milestones_are_kept(tmp_path: Path) -> None:
    model, updater = build()
    weights = {}
    with CheckpointManager(tmp_path, keep_last=2, keep_if=lambda step: is_multiple_of(step, 4)) as checkpoints:
        for step in range(1, 12):
            learn(model, updater)
            checkpoints.save(step, model, updater, images=7)  # written while the next step changes the weights
            weights[step] = model.weight.detach().clone()
    assert checkpoints.steps() == [4, 8, 10, 11]
    other, _ = build()
    assert checkpoints.load_model(other)[0] == 11 and torch.equal(other.weight, weights[11])
    for step in (11, 10, 8):
        assert checkpoints.load(other, optimizer_of(other), images=7) == step
        assert torch.equal(other.weight, weights[step])  # unaffected by later steps
        (tmp_path / f"step-{step:09d}").rename(tmp_path / f"gone-{step}")


def optimizer_of(model: nn.Module) -> SyncFreeOptimizer:
    return SyncFreeOptimizer(adamw(model, 0.1, (0.9, 0.95), 0.05), None, False, torch.device("cpu"))


def test_a_failed_write_is_a_warning_and_is_retried(tmp_path: Path) -> None:
    model, updater = build()
    warnings: list[str] = []
    folder = tmp_path / "checkpoints"
    folder.write_text("a file in the way")
    with CheckpointManager(folder, warn=warnings.append) as checkpoints:
        checkpoints.save(1, model, updater, images=7)
        checkpoints.save(2, model, updater, images=7)  # warns of the first
        assert len(warnings) == 1 and "could not be written" in warnings[0] and "training continues" in warnings[0]
        with pytest.raises(UserError, match="could not be written"):
            checkpoints.save(3, model, updater, images=7, wait=True)
        folder.unlink()
        checkpoints.save(4, model, updater, images=7, wait=True)
        assert checkpoints.steps() == [4]


def test_another_dataset_or_model_is_refused(tmp_path: Path) -> None:
    model, updater = build()
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, model, updater, images=7, wait=True)
    with pytest.raises(UserError, match="started with 7 images, found 8"):
        CheckpointManager(tmp_path).load(model, updater, images=8)
    wide = nn.Linear(5, 3)
    with pytest.raises(UserError, match="does not fit this run"):
        CheckpointManager(tmp_path).load(wide, optimizer_of(wide), images=7)
    with pytest.raises(UserError, match="is of another model"):
        CheckpointManager(tmp_path).load_model(wide)


def test_a_run_without_a_valid_checkpoint_does_not_restart(tmp_path: Path) -> None:
    model, updater = build()
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, model, updater, images=7, wait=True)
    (tmp_path / "step-000000001" / "checkpoint.json").write_text("{")
    warnings: list[str] = []
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid"):
        CheckpointManager(tmp_path, warn=warnings.append).load(model, updater, images=7)
    assert len(warnings) == 1 and "is damaged" in warnings[0]
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid"):  # a scheduler repeats the command
        CheckpointManager(tmp_path).load(model, updater, images=7)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The newest of two checkpoints in RUN/checkpoints, after two steps."""
    model, updater = build()
    with CheckpointManager(tmp_path / "run" / "checkpoints") as checkpoints:
        for step in (1, 2):
            learn(model, updater)
            checkpoints.save(step, model, updater, images=7, wait=True)
    return tmp_path / "run" / "checkpoints" / "step-000000002"


def test_the_files_are_plain_safetensors(written: Path) -> None:
    model, _ = build()
    assert CheckpointManager(written.parent).load_model(model)[0] == 2
    tensors = load_file(written / "rank-00000.safetensors")
    assert torch.equal(tensors["model.weight"], model.weight)
    assert {"optimizer.weight.exp_avg", "optimizer.bias.step", "updater.skipped"} <= tensors.keys()
    assert sorted(path.name for path in written.iterdir()) == ["checkpoint.json", "rank-00000.safetensors"]


def test_shards_are_restored_by_any_number_of_processes(tmp_path: Path) -> None:
    """Ten rows over four processes as FSDP2 shards them (3, 3, 3, 1), three over four, and unsharded tensors."""
    dtypes = torch.float32, torch.bfloat16, torch.int64, torch.bool
    ten = {str(dtype): torch.randn(10, 3).mul(9).to(dtype) for dtype in dtypes}
    three, scalar = torch.randn(3), torch.tensor(5.0)
    plain: dict[str, Tensor] = {"scalar": scalar, "none": torch.zeros(0, 4), "table": torch.randn(4, 2)}
    shares = []
    for rank in range(4):
        parts = own_share(plain, rank, 4)
        for name, value in ten.items():
            parts[name] = Part(value[3 * rank : 3 * rank + 3].contiguous(), 3 * rank, (10, 3))
        parts["three"] = Part(three[rank : rank + 1].clone(), rank, (3,))
        shares.append(write_share(tmp_path, parts, rank))
    write_manifest(tmp_path, 7, 8, shares)
    expected = plain | ten | {"three": three}
    restored = {name: torch.zeros_like(value) for name, value in expected.items()}
    manifest = read_manifest(tmp_path)
    assert difference(manifest.tensors, restored) == ""
    restore(tmp_path, manifest.tensors, restored)
    assert (manifest.step, manifest.images) == (7, 8)
    assert all(torch.equal(restored[name], expected[name]) for name in restored)
    assert {name for name in plain if name in load_file(tmp_path / "rank-00000.safetensors")} == {"table"}


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest together with its checksum."""
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_text())
    change(manifest["content"])
    manifest["crc32"] = zlib.crc32(json.dumps(manifest["content"], separators=(",", ":")).encode())
    path.write_text(json.dumps(manifest))


def weight(content: dict[str, Any]) -> dict[str, Any]:
    return content["tensors"]["model.weight"]  # 3 x 4, in one piece


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": lambda c: c.pop("step"),
    "another step": lambda c: c.update(step=1),
    "a step that is not a number": lambda c: c.update(step=float("nan")),
    "a step that is a word": lambda c: c.update(step="2"),
    "a step that is true": lambda c: c.update(step=True),
    "infinitely many images": lambda c: c.update(images=float("inf")),
    "less than no images": lambda c: c.update(images=-7),
    "images beyond 64 bits": lambda c: c.update(images=2**64),
    "other images": lambda c: c.update(images=8),
    "no tensors": lambda c: c.update(tensors={}),
    "a list of tensors": lambda c: c.update(tensors=[]),
    "tensors without anything": lambda c: c.update(tensors={"model.weight": None}),
    "one more": lambda c: c["tensors"].update({"model.../x": weight(c)}),
    "one less": lambda c: c["tensors"].pop("model.weight"),
    "a long name": lambda c: c["tensors"].update({"model." + "x" * 10**6: weight(c)}),
    "terabytes": lambda c: weight(c).update(shape=[10**12], pieces=[[0, 0, 10**12, 8, 0]]),
    "sizes beyond 64 bits": lambda c: weight(c).update(shape=[2**63, 2**63]),
    "sizes below zero": lambda c: weight(c).update(shape=[-3, -4]),
    "many axes": lambda c: weight(c).update(shape=[3] + [1] * 10**4),
    "a size that is not a number": lambda c: weight(c).update(shape=[3, "4"]),
    "an object for a shape": lambda c: weight(c).update(shape={"3": 4}),
    "another dtype": lambda c: weight(c).update(dtype="F64"),
    "an invalid dtype": lambda c: weight(c).update(dtype=["F32"] * 10**4),
    "no pieces": lambda c: weight(c).update(pieces=[]),
    "a gap": lambda c: weight(c).update(pieces=[[0, 0, 1, 8, 0], [0, 2, 3, 8, 0]]),
    "an overlap": lambda c: weight(c).update(pieces=[[0, 0, 2, 8, 0], [0, 1, 3, 8, 0]]),
    "a piece too long": lambda c: weight(c)["pieces"][0].__setitem__(2, 4),
    "an empty piece": lambda c: weight(c)["pieces"].append([0, 0, 0, 8, 0]),
    "a piece backwards": lambda c: weight(c).update(pieces=[[0, 0, 5, 8, 0], [0, 5, 3, 8, 0]]),
    "a piece that is a word": lambda c: weight(c).update(pieces=["01234"]),
    "a short piece": lambda c: weight(c).update(pieces=[[0, 0, 3]]),
    "pieces that are a number": lambda c: weight(c).update(pieces=3),
    "far beyond the file": lambda c: weight(c)["pieces"][0].__setitem__(3, 2**63 - 1),
    "another place": lambda c: weight(c)["pieces"][0].__setitem__(3, 0),
    "a file that is not there": lambda c: weight(c)["pieces"][0].__setitem__(0, 2**62),
    "a file by a path": lambda c: weight(c)["pieces"][0].__setitem__(0, "../../x"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_manifest_is_refused(forgery: str, written: Path) -> None:
    """Both full and weights-only loading fail with one line, and allocate no memory for what the manifest claims."""
    forge(written, FORGED[forgery])
    harmless = ("another step", "other images")  # to loading weights only
    refused(written, weights=forgery not in harmless)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"format"',
        "{}",
        '{"format": 1}',
        '{"format": 1, "crc32": 0, "content": []}',
        '{"format": 2, "crc32": 0, "content": {}}',
        '{"format": ' + "[" * 50 + "]" * 50 + "}",
        "[" * 10**5,
        "1" * 10**5,
        "\x80\x04\x95",
    ],
)
def test_an_invalid_manifest_is_refused(text: str, written: Path) -> None:
    (written / "checkpoint.json").write_text(text)
    refused(written)


def refused(folder: Path, weights: bool = True) -> None:
    """Check that loading fails with one line, or warns and loads the previous checkpoint."""
    model, updater = build()
    if weights:
        with pytest.raises(UserError) as error:
            CheckpointManager(folder.parent).load_model(model, 2)
        assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    warnings: list[str] = []
    try:
        assert (
            CheckpointManager(folder.parent, warn=warnings.append).load(model, updater, images=7) == 1
        )  # the previous one
    except UserError as error:
        warnings.append(str(error))
    assert len(warnings) == 1 and len(warnings[0]) < 500 and "\n" not in warnings[0]


def test_weights_are_read_from_the_newest_valid_checkpoint_and_all_stay(written: Path) -> None:
    (model, _), warnings = build(), list[str]()
    checkpoints = CheckpointManager(written.parent, warn=warnings.append)
    expected = load_file(written.with_name("step-000000001") / "rank-00000.safetensors")["model.weight"]
    file = written / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert checkpoints.load_model(model) == (1, 7) and torch.equal(model.weight, expected)
    assert len(warnings) == 1 and f"of step 1, since the checkpoint {written} is damaged" in warnings[0]
    (written.with_name("step-000000001") / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match="step-000000002 is damaged"):
        checkpoints.load_model(model)
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("name", ["checkpoint.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "outside", "gone"])
def test_only_files_of_the_run_are_read(name: str, kind: str, written: Path, tmp_path: Path) -> None:
    outside = (written / name).rename(tmp_path / name)
    path = written / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to("/dev/zero" if kind == "zero" else outside)
    refused(written)


@pytest.mark.parametrize("level", ["checkpoint", "checkpoints"])
def test_a_link_out_of_the_run_is_refused(level: str, written: Path, tmp_path: Path) -> None:
    path = written if level == "checkpoint" else written.parent
    outside = path.rename(tmp_path / "outside")
    path.symlink_to(outside)
    before = sorted(path.name for path in outside.rglob("*"))
    if level == "checkpoint":
        refused(written)
    else:
        outside_is_refused(path)
        path.unlink()
        path.symlink_to(path.name)  # a loop
        outside_is_refused(path)
    assert sorted(path.name for path in outside.rglob("*")) == before


def outside_is_refused(folder: Path) -> None:
    model, updater = build()
    with pytest.raises(UserError, match="leads out of"):
        CheckpointManager(folder).load_model(model)
    with pytest.raises(UserError, match="leads out of"):
        CheckpointManager(folder).load(model, updater, images=7)


def test_links_in_place_of_checkpoints_are_removed_without_following_them(written: Path, tmp_path: Path) -> None:
    """In place of a new checkpoint, of a damaged one that is renamed, and of an old one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    folder = written.parent
    for name in ("step-000000003.tmp", "other.tmp", "damaged-step-000000002", "step-000000000"):
        (folder / name).symlink_to(outside)
    (written / "checkpoint.json").write_text("{")
    model, updater = build()
    with CheckpointManager(folder, warn=lambda text: None) as checkpoints:
        assert checkpoints.load(model, updater, images=7) == 1
        checkpoints.save(3, model, updater, images=7, wait=True)
    assert checkpoints.steps() == [1, 3]
    assert sorted(path.name for path in folder.iterdir() if not path.is_symlink()) == [
        "damaged-step-000000002",
        "step-000000001",
        "step-000000003",
    ]
    assert [path.name for path in outside.iterdir()] == ["precious"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_counts_are_numbers(value: float, written: Path) -> None:
    model, updater = build()
    with CheckpointManager(written.parent) as checkpoints:
        updater.state["skipped"].fill_(value)
        learn(model, updater)
        checkpoints.save(3, model, updater, images=7, wait=True)
    warnings: list[str] = []
    assert CheckpointManager(written.parent, warn=warnings.append).load(*build(), images=7) == 2
    assert "a count is not a number" in warnings[0]
