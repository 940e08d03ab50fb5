"""The model card of an export: results with intervals, code that runs, and no path of this machine."""

import json
import re
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from helpers.cli import say
from helpers.evaluated import evaluate
from helpers.models import CNNS, old_swin_layout
from pixmim.build import build_model
from pixmim.config import ArchitectureConfig, CropConfig, ModelConfig, PretrainConfig
from pixmim.data import open_dataset
from pixmim.evaluation.attentive_probe import AttentiveProbe, load_probe, save_probe
from pixmim.evaluation.frozen_encoder import load_frozen_encoder
from pixmim.evaluation.results import Result, save
from pixmim.evaluation.settings import AttentiveSettings
from pixmim.export import FORMATS, export_model
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.errors import UserError
from pixmim.weights.detect import Weights
from pixmim.weights.load import import_weights

Make = Callable[..., PretrainConfig]
TRAIN, TEST = "shapes:count=40,size=32", "shapes:count=30,size=32,seed=1"


def make_run(config: ModelConfig, folder: Path, step: int = 0) -> Path:
    """Save a random model as a run."""
    torch.manual_seed(0)
    model = build_model(config)
    import_weights(Weights(config, dict(model.state_dict()), "a test", step=step, steps=9), folder)
    return folder


def result(values: dict[str, float], encoder: str = "trained", **settings: Any) -> Result:
    return Result("knn", "m", encoder, 0, settings, values, {}, "cpu", "fp32", {})


def sections(card: str) -> dict[str, str]:
    parts = re.split(r"(?m)^## (.+)$", card)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(front)
    return values


def code_of_the_docs() -> str:
    """Return the code of docs/weights.md that classifies with an attentive probe."""
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    return next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "attentive.safetensors" in code)


def run_code(text: str, folder: Path) -> dict[str, Any]:
    """Run the Python code of a section in the folder of the card, and return its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    with chdir(folder):
        exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("to", FORMATS)
def test_every_export_has_a_card_whose_code_runs(to: str, tiny_run: Make, tmp_path: Path) -> None:
    pytest.importorskip({"hf": "transformers", "onnx": "onnxruntime"}.get(to, "timm"))
    run = make_run(tiny_run(), tmp_path / "run")
    lines = export_model(str(run), to, tmp_path / "out", description="Tiles | of *one* kiln.")
    assert any("README.md" in line for line in lines)
    card = (tmp_path / "out" / "README.md").read_text()
    front, found = front_matter(card), sections(card)
    assert front["library_name"] == {"hf": "transformers"}.get(to, to) and "mae" in front["tags"]
    assert front["pipeline_tag"] == "image-feature-extraction" and front["license"] == "unknown"
    assert "Tiles | of *one* kiln." in found["Data"]
    assert "2111.06377" in found["Method"] and "2303.02416" in found["Method"]
    assert "| steps | 0 of 9 |" in found["Settings"] and "| mask | random, 0.75 of the patches |" in found["Settings"]
    assert "Results" not in found and ("decoder" in found.get("Left out", "")) == (to in ("timm", "detectron2", "onnx"))
    names = run_code(found["Use"], tmp_path / "out")
    if to == "timm":
        assert names["tokens"].shape == (1, 17, 32)
    elif to == "onnx":
        assert names["outputs"][0].shape == (1, 32)
    elif to == "hf":
        assert names["outputs"].logits.shape == (1, 16, 192)
    else:
        assert len(names["state"]) > 20


def test_imported_weights_have_a_card_without_training(tiny_run: Make, tmp_path: Path) -> None:
    config = tiny_run()
    known = ModelConfig(model=config.model, size="32")
    export_model(str(make_run(known, tmp_path / "a")), "timm", tmp_path / "out")
    found = sections((tmp_path / "out" / "README.md").read_text())
    assert "Settings" not in found and "2303.02416" not in found["Method"] and "To be filled in" in found["Data"]
    options = {**config.model.options, "num_classes": 3}
    classifier = replace(known, model=replace(config.model, name="simmim", options=options))
    export_model(str(make_run(classifier, tmp_path / "b")), "timm", tmp_path / "classifier")
    card = (tmp_path / "classifier" / "README.md").read_text()
    assert front_matter(card)["pipeline_tag"] == "image-classification" and "3 classes" in sections(card)["Method"]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_resize_of_the_crop_is_that_of_transformers(interpolation: Any, tiny_run: Make, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = make_run(tiny_run(crop=CropConfig(interpolation=interpolation), stretch="1,99"), tmp_path / "run")
    lines = export_model(str(run), "hf", tmp_path / "out")
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.resample == Image.Resampling[interpolation.upper()]
    assert any("--stretch 1,99 is not part of the exported model" in line for line in lines)


def test_results_have_intervals_and_names_are_escaped(tiny_run: Make, tmp_path: Path) -> None:
    """Test data are named without their folder; per-class values, and files that cannot be read, are left out."""
    run = make_run(tiny_run(), tmp_path / "run")
    test = f"split:test:{tmp_path}/my photos,label={tmp_path}/a|b<i>[x](y)"
    values = {"k20/mean/top1": 71.25, "k20/mean/top1/low": 70.0, "k20/mean/top1/high": 72.5, "k20/mean/recall/cat": 3.0}
    save(result(values, test=test, train=str(tmp_path)), run)
    save(result({"k20/mean/top1": 20.0}, "untrained", test=test, train=str(tmp_path)), run)
    (run / "evaluations" / "broken.json").write_text("{")
    (run / "skipped.csv").write_text(f"image,reason\n{tmp_path}/x.jpg,empty\n")
    export_model(str(run), "timm", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    found = sections(card)
    assert str(tmp_path) not in card and tmp_path.name not in card
    assert "| 20.0 % | 71.2 % (70.0 to 72.5) |" in found["Results"] and "my photos" in found["Results"]
    assert r"a\|b\<i\>\[x\](y)" in found["Results"] and "cat" not in found["Results"]
    assert "In parentheses: 95 % intervals over the test images. Untrained" in found["Results"]
    for site, digest in (("a", "1234abcd"), ("b", "5678abcd")):  # equal without their folders
        one = replace(result({"top1": 44.0}, test=f"/{site}/test"), evaluation="attentive", data_digest=digest)
        save(one, run)
    folds = {"top1": 60.0, "top1/std": 10.0, "top1/fold/1": 50.0, "top1/fold/2": 70.0}
    save(replace(result(folds, labelled="a", folds=2), evaluation="linear"), run)
    export_model(str(run), "timm", tmp_path / "folds")
    repeated = sections((tmp_path / "folds" / "README.md").read_text())["Results"]
    assert [f"probe, images {digest} |" in repeated for digest in ("1234abcd", "5678abcd")] == [True, True]
    assert "60.0 ± 10.0 % (50.0, 70.0)" in repeated and "after ±, the standard deviation over folds" in repeated
    assert "1 images of the training data" in found["Left out"] and "1 files or values" in found["Left out"]


def test_the_attentive_probe_is_exported_with_code_that_repeats_its_predictions(tiny_run: Make, tmp_path: Path) -> None:
    for name, architecture in {
        "mae": tiny_run().model,
        "simmim-swin": ArchitectureConfig(
            "simmim",
            "swin_tiny_patch4_window7_224",
            options={"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
        ),
        **CNNS,
    }.items():
        if name == "simmim-swin" and old_swin_layout():
            continue
        size = "64" if name in CNNS else "32"  # a map of 2 x 2
        run = make_run(tiny_run(model=architecture, size=size), tmp_path / name, step=7)
        settings = AttentiveSettings(train=TRAIN, test=TEST, epochs=2)
        (done,) = evaluate(str(run), [("attentive", settings)], run, device="cpu", precision="fp32")
        path = save(done, run)
        assert path.with_suffix(".safetensors").is_file()  # beside the result
        lines = export_model(str(run), "timm", tmp_path / f"{name}-out", attentive=True)
        assert "attentive.safetensors" in lines[-1] and "10 classes" in lines[-1]
        card = (tmp_path / f"{name}-out" / "README.md").read_text()
        names = run_code(sections(card)["Classification"], tmp_path / f"{name}-out")
        encoder, data = load_frozen_encoder(str(run), device="cpu", precision="fp32"), open_dataset(TEST)
        images = torch.stack([evaluation_crop(encoder.size).crop(data.image(i)) for i in range(30)])
        predicted = names["classify"](encoder.preprocess(images)).argmax(dim=1)
        assert data.labels is not None
        correct = (predicted == torch.from_numpy(np.asarray(data.labels))).float().mean()
        if name == "mae":
            shown = names | {"images": encoder.preprocess(images)}
            with torch.no_grad(), chdir(tmp_path / "mae-out"):
                exec(code_of_the_docs(), shown)
            assert torch.equal(shown["logits"], names["classify"](shown["images"]))
        assert names["classes"] == data.classes and 100 * float(correct) == pytest.approx(done.values["top1"], abs=3.4)


def test_a_probe_is_read_back_and_a_damaged_one_refused(tmp_path: Path) -> None:
    probe, file = AttentiveProbe(12, 3, 4).eval(), tmp_path / "p.safetensors"
    save_probe(probe, ["a", "b", "c"], 5, file)
    loaded, classes, step = load_probe(file)
    x = torch.randn(2, 7, 12)
    assert torch.equal(loaded(x), probe(x)) and classes == ["a", "b", "c"] and step == 5
    tensors = dict(probe.state_dict())
    good = json.dumps({"classes": classes, "step": 5})
    for changed, info in (
        (tensors, json.dumps({"classes": ["a"], "step": 5})),
        (tensors, json.dumps({"classes": 3, "step": 5})),
        (tensors, json.dumps({"classes": classes, "step": "5"})),
        (tensors, json.dumps([1])),
        (tensors, ""),
        ({**tensors, "queries": torch.zeros(5, 12)}, good),
        ({**tensors, "queries": torch.zeros(0, 12)}, good),
        ({**tensors, "more": torch.zeros(1)}, good),
        ({name: value for name, value in tensors.items() if name != "values"}, good),
    ):
        save_file(changed, file, {"probe": info})
        with pytest.raises(UserError, match="safetensors"):
            load_probe(file)


def test_a_probe_that_does_not_fit_is_refused(
    tiny_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tiny_run(), tmp_path / "run", step=3)
    (run / "evaluations").mkdir()
    for args, message in ((("--to", "hf"), "--attentive needs --to timm"), (("--to", "timm"), "evaluate attentive")):
        status, text = say(capsys, "export", run, *args, "--attentive", "--out", tmp_path / "out")
        assert status == 1 and message in text
    save_probe(AttentiveProbe(32, 2, 4), ["a", "b"], 2, run / "evaluations" / "attentive-trained-0.safetensors")
    status, text = say(capsys, "export", run, "--to", "timm", "--attentive", "--out", tmp_path / "out")
    assert status == 1 and "step 2" in text and not (tmp_path / "out").exists()


def test_untrained_encoders_leave_no_probe(tiny_run: Make, tmp_path: Path) -> None:
    config = tiny_run()
    run = make_run(config, tmp_path / "run")
    settings = AttentiveSettings(train=TRAIN, test=TEST, epochs=1)
    list(evaluate(str(run), [("attentive", settings)], tmp_path / "out", untrained=True, device="cpu"))
    assert not list((tmp_path / "out").rglob("*.safetensors"))
