"""The command line."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pixmim
from helpers.cli import say
from pixmim import cli
from pixmim.config_io import to_json
from pixmim.recipes import RECIPES, get_recipe

QUICK = [
    "--batch-size",
    "4",
    "--precision",
    "fp32",
    "--device",
    "cpu",
    "--knn.train",
    "",
    "--knn.test",
    "",
    "--knn.every",
    "0",
]
TINY = ["--steps", "2", "--size", "48", *QUICK]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys, "--version") == (0, f"pixmim {pixmim.__version__}") and pixmim.__version__[0].isdigit()


def test_only_the_command_line_sets_the_wait_policy_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "as_process", lambda command: 0)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # set by the user
    assert cli.main() == 0 and os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert cli.main(["--version"]) == 0 and "OMP_WAIT_POLICY" not in os.environ
    assert cli.main() == 0 and os.environ["OMP_WAIT_POLICY"] == "passive"


def test_printed_commands_are_quoted_for_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "it's mine"
    out.mkdir()
    (out / "config.json").write_text(to_json(replace(get_recipe("demo"), seed=1)))
    for command, flag in (("pretrain", "--resume"), ("slurm", "--resume")):
        status, text = say(capsys, command, "demo", "--out", out)
        assert status == 1
        words = shlex.split(text[text.index(flag) :])
        assert words[:2] == [flag, str(out)]


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom pixmim.cli import main\n"
        "try: main(['pretrain', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'timm', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for flag in (
        "--data", "--out", "--epochs", "--steps", "--batch-size", "--size", "--seed", "--precision", "--device",
        "--checkpoint.every", "--resume", "--optim.lr", "--target.radius", "--knn.every",
    ):  # fmt: skip
        assert flag in text
    assert "--made" not in text and "--recipe" not in text


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("pretrain", "cache")])
def test_processes_of_torchrun_do_not_repeat_a_command(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, command, lambda args: 7)
    assert cli.main([command]) == 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([command]) == 7  # a launcher's variable alone
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main([command]) == 1
        said = f"each of the 2 processes would do all of `pixmim {command}`" in capsys.readouterr().err
        assert said == (rank == "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main([command]) == 7


def test_list_shows_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = say(capsys, "list")
    assert status == 0 and all(name in text for name in RECIPES) and "63.3 linear" in text


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys)[0] == say(capsys, "--help")[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["pretrain"], "no recipe given"),
        (["pretrain", "demmo"], "did you mean 'demo'"),
        (["pretrain", "demo", "--batchsize", "3"], "--batch-size"),
        (["pretrain", "demo", "--optim.base_lrr", "3"], "--optim.base-lr"),
        (["pretrain", "demo", "--steps", "many"], "invalid literal"),
        (["pretrain", "pixmim-vit-tiny"], "no data given"),
        (["pretrain", "pixmim-vit-tiny", "--data", "/no/such"], "/no/such"),
        (["pretrain", "demo", "--steps", "0"], "--steps must be an integer from 1"),
        (["pretrain", "demo", "--steps", "5", "--epochs", "5"], "not both"),
        (["pretrain", "demo", "--size", "50"], "multiples of 8"),
        (["pretrain", "demo", "--device", "cuda:99"], "--device cuda:99"),
        (["pretrain", "--resume", "/no/run"], "there is no /no/run/config.json"),
        (["pretrain", "demo", "--resume", "/no/run"], "leave out 'demo'"),
        (["pretrain", "--data", "shapes:", "demo"], "write the recipe 'demo' before all flags"),
        (["pretrain", "--resume", "/no/run", "--out", "/no/other"], "leave out --out /no/other"),
        (["evaluate", "knn", "/no/run", "--train", "shapes:", "--test", "shapes:"], "/no/run does not exist"),
        (["evaluate", "kn", "/no/run", "--train", "shapes:", "--test", "shapes:"], "did you mean 'knn'"),
        (["evaluate", "knn", "--train", "shapes:", "--test", "shapes:"], "no model given"),
        (["import", "/no/such.pth"], "/no/such.pth does not exist"),
        (["import", "x.pth", "--haeds", "3"], "--heads"),
        (["import", "timm:vit_tiny_patch16_225"], "did you mean 'vit_tiny_patch16_224'"),
        (["export", "/no/run", "--to", "timm"], "/no/run does not exist"),
        (["export", "/no/run", "--to", "tensorflow"], "invalid choice"),
        (["pretrain", "demo", "--init", "/no/such.pth"], "/no/such.pth does not exist"),
        (["pretrain", "demo", "--std", "1", "0", "1"], "--std must be a number from 1e-12"),
        (["stats", "/no/such"], "/no/such"),
        (["cache", "shapes:count=2", "c", "--dtype", "uint16"], "--raw"),
        (["cache", "shapes:count=2", "c", "--size", "4", "--dtype", "uint16"], "--raw"),  # not --crop.padding
        (["embed", "/no/run", "--data", "shapes:", "--out", "f.npy"], "/no/run does not exist"),
        (["report"], "no run given"),
        (["report", "/no/run"], "is not a run"),
    ],
)
def test_mistakes_give_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = say(capsys, *args)
    assert status != 0 and message in text and "Traceback" not in text
    assert not list(tmp_path.rglob("config.json"))  # no run is created


@pytest.mark.usefixtures("without_report")
def test_a_run_is_exported_imported_and_used_to_initialize(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Export to transformers' layout, import that, and start another run from it at another size."""
    small = ["--model.decoder-dim", "16", "--model.decoder-depth", "1", "--model.decoder-heads", "2"]
    assert say(capsys, "pretrain", "demo", *TINY, *small, "--out", tmp_path / "run")[0] == 0
    status, text = say(capsys, "export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf")
    assert status == 0 and "ViTMAEForPreTraining.from_pretrained" in text
    status, text = say(capsys, "import", tmp_path / "hf", "--to", tmp_path / "back")
    assert status == 0 and "recognized as Hugging Face" in text and "of the decoder" in text
    ours, back = (load_file(tmp_path / name / "encoder/model.safetensors") for name in ("run", "back"))
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)
    again = ["pretrain", "demo", *TINY, *small, "--size", "32x48", "--init", tmp_path / "back", "--out", tmp_path / "b"]
    status, text = say(capsys, *again)
    assert status == 0 and "positions interpolated from 6x6 to 4x6 patches" in text and "decoder: 20 tensors" in text
    status, text = say(capsys, "import", tmp_path / "run")
    assert status == 0 and "nothing was written" in text
    assert "already contains a run" in say(capsys, "import", tmp_path / "hf", "--to", tmp_path / "run")[1]


def test_from_images_to_results(capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "run"
    status, text = say(capsys, "pretrain", "demo", "--data", pictures, "--out", out, *TINY, "--optim.lr", "0.001")
    assert status == 0 and f"encoder: {out}/encoder" in text and f"report: {out}/report.html" in text
    kept = json.loads((out / "config.json").read_text())
    assert (kept["recipe"], kept["steps"], kept["optim"]["lr"]) == ("demo", 2, 0.001)

    status, text = say(capsys, "pretrain", "demo", "--out", out, *TINY)
    assert status == 1 and "holds a run with another --data: choose another --out" in text
    status, text = say(capsys, "pretrain", "demo", "--data", pictures, "--out", out, *TINY, "--optim.lr", "0.001")
    assert status == 0 and "the run is complete at step 2" in text  # the same command resumes

    labeled = ["--train", pictures, "--test", pictures, "--device", "cpu"]
    for name in ("knn", "linear"):
        status, text = say(capsys, "evaluate", name, out, *labeled, "--untrained", report=False)
        assert status == 0 and "untrained" in text and "%" in text
    assert len(list((out / "evaluations").glob("*.json"))) == 4

    again = tmp_path / "again"
    status, _ = say(capsys, "pretrain", out / "config.json", "--out", again, report=False)  # a run's config is a recipe
    assert status == 0
    one, two = (load_file(folder / "encoder/model.safetensors") for folder in (out, again))
    assert all(torch.equal(one[key], two[key]) for key in one)
    status, text = say(capsys, "report", out, again, "--out", tmp_path / "both.html")
    assert status == 0 and (tmp_path / "both.html").exists()
    status, text = say(capsys, "evaluate", "knn", out, again, *labeled, "--untrained", "--out", tmp_path / "side")
    assert status == 0 and f"report: {tmp_path}/side/report.html" in text
    assert len(list((tmp_path / "side").glob("*/evaluations/*.json"))) == 4

    status, text = say(capsys, "pretrain", "--resume", out, "--seed", "9")
    assert status == 1 and "--seed cannot change" in text
    status, text = say(capsys, "pretrain", "--resume", out, report=False)
    assert status == 0 and "is complete" in text


@pytest.mark.usefixtures("without_report")
def test_epochs_replace_a_recipes_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["--data", "shapes:count=8,size=48", "--epochs", "3"]
    assert say(capsys, "pretrain", "demo", *args, *QUICK, "--out", tmp_path / "run")[0] == 0
    assert '"step": 6, ' in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]


@pytest.mark.usefixtures("without_report")
def test_options_for_the_backbone_join_the_recipes_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--model.options", "depth", "2", "embed_dim", "64", "qkv_bias", "False"]
    status, _ = say(capsys, "pretrain", "demo", *TINY, *options, "--out", out)
    kept = json.loads((out / "config.json").read_text())["model"]["options"]
    assert status == 0
    assert kept == {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "qkv_bias": False}
    status, text = say(capsys, "pretrain", "demo", "--model.options", "depth")
    assert status != 0 and "'depth' has no value" in text


def test_an_interrupted_run_is_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: Path) -> None:
    """Every command uses its newest checkpoint and prints the step; it can be finished, and resumed afterwards."""
    run = tmp_path / "run"
    small: list[object] = ["--model.decoder-dim", "16", "--model.decoder-depth", "1"]
    small += ["--model.decoder-heads", "2", "--data", pictures]
    assert say(capsys, "pretrain", "demo", *TINY, *small, "--checkpoint.every", "1", "--out", run, report=False)[0] == 0
    shutil.rmtree(run / "encoder")
    shutil.rmtree(run / "checkpoints" / "step-000000002")
    labeled = ["--train", pictures, "--test", pictures, "--device", "cpu"]
    commands = [
        ("evaluate", "knn", run, *labeled),
        ("embed", run, "--data", pictures, "--out", tmp_path / "f.npy"),
        ("attention", run, pictures, "--count", "1", "--out", tmp_path / "a.png"),
        ("reconstruct", run, pictures, "--count", "1", "--out", tmp_path / "r.png"),
        ("export", run, "--to", "timm", "--out", tmp_path / "timm"),
        ("import", run),
        ("report", run),
        ("pretrain", "demo", *TINY, *small, "--init", run, "--out", tmp_path / "next"),
    ]
    for command in commands:
        status, text = say(capsys, *command, report=command[0] == "report")
        assert status == 0 and "step 1 of 2" in text, (command, text)
    page = (run / "report.html").read_text()
    assert "is unfinished" in page and "local-dir:" not in page

    status, text = say(capsys, "pretrain", "--resume", run, "--finish")
    assert status == 0 and "finished at step 1" in text and f"encoder: {run}/encoder" in text
    assert "local-dir:" in (run / "report.html").read_text()
    ended, exported = (load_file(folder / "model.safetensors") for folder in (run / "encoder", tmp_path / "timm"))
    assert all(torch.equal(ended[name], exported[name]) for name in exported)
    status, text = say(capsys, "pretrain", "--resume", run, "--steps", "4")
    assert status == 0 and "length changed from 2 to 4 steps: from step 1, the learning rate is that of a run" in text
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 4
    assert "step 4 of 4" in say(capsys, "import", run)[1]
    status, text = say(capsys, "pretrain", "--resume", run, "--steps", "3")
    assert status == 1 and "is already at step 4" in text
    shutil.rmtree(run / "checkpoints")
    status, text = say(capsys, "pretrain", "--resume", run)
    assert status == 1 and "no checkpoint to resume from" in text and (run / "encoder" / "model.safetensors").exists()
