"""Test that timm, transformers and onnxruntime load exports strictly, and compute the same features."""

import errno
import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.cli import say
from helpers.evaluated import evaluate
from helpers.models import CNNS, old_swin_layout
from pixmim import load_encoder, load_model, patchify
from pixmim.build import build_encoder, build_model
from pixmim.config import ArchitectureConfig, OnlineKnnConfig, PretrainConfig, TargetConfig
from pixmim.config_io import load_config, to_json
from pixmim.evaluation.frozen_encoder import load_frozen_encoder
from pixmim.evaluation.results import save
from pixmim.evaluation.settings import KnnSettings
from pixmim.export import FORMATS, export_model
from pixmim.masking import Mask
from pixmim.models import features
from pixmim.models.base import MaskedModel
from pixmim.report import write_report
from pixmim.utils.errors import UserError
from pixmim.weights.detect import Weights
from pixmim.weights.load import import_weights, resolve_model
from pixmim.weights.save import save_encoder

transformers = pytest.importorskip("transformers")

Make = Callable[..., PretrainConfig]
SHAPES = "shapes:count=20,size=48"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
THIN: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
NARROW, STAGES = {**SMALL, "patch_size": 8}, {"embed_dim": [8, 16, 24], "num_heads": 2}
MODELS = {
    "mae": (ArchitectureConfig("mae", "vit_tiny_patch16_224", **THIN, options=NARROW), "32"),
    "mae-oblong": (ArchitectureConfig("mae", "vit_tiny_patch16_224", **THIN, options=NARROW), "32x64"),
    "convmae": (ArchitectureConfig("convmae", "convmae_tiny", **THIN, options=STAGES), "32"),
    "simmim-vit": (ArchitectureConfig("simmim", "vit_tiny_patch16_224", options=NARROW), "32"),
    "simmim-beit": (ArchitectureConfig("simmim", "beit_base_patch16_224", options=NARROW), "32"),
    "simmim-swin": (
        ArchitectureConfig(
            "simmim", "swin_tiny_patch4_window7_224",
            options={"embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
        ),
        "32",
    ),
    **{name: (model, "64") for name, model in CNNS.items()},
}  # fmt: skip


SWIN = MODELS["simmim-swin"][0]
VARIANTS = {
    "beit-mean": (replace(MODELS["simmim-beit"][0], options=NARROW | {"global_pool": "avg"}), "32"),
    "swin-ratio": (replace(SWIN, options=SWIN.options | {"mlp_ratio": 2.0}), "32"),
    "swin-windows": (
        replace(
            SWIN,
            options={"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2], "window_size": [4, 4, 2, 2]},
        ),
        "64",
    ),
    "registers": (
        ArchitectureConfig("mae", "vit_tiny_patch16_224", **THIN, options=NARROW | {"reg_tokens": 1}),
        "32x64",
    ),
    "pixio": (ArchitectureConfig("pixio", "vit_tiny_patch16_224", **THIN, options=NARROW), "64x32"),
    "mff": (ArchitectureConfig("mff", "vit_tiny_patch16_224", **THIN, options=NARROW), "32"),
}
"""Models that differ from the usual ones in what shapes of tensors do not show."""

MakeModel = Callable[[str], tuple[str, MaskedModel]]


@pytest.fixture
def make_model(tiny_run: Make, tmp_path: Path) -> MakeModel:
    """Return a function that saves a random model of a kind, and returns its folder and the model."""

    def make(name: str) -> tuple[str, MaskedModel]:
        model, size = (MODELS | VARIANTS)[name]
        config = tiny_run(model=model, size=size)
        module = build_model(config).eval()
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        import_weights(Weights(config, dict(module.state_dict()), "a test"), tmp_path / name)
        return str(tmp_path / name), module

    return make


def images_for(name: str, count: int = 2) -> torch.Tensor:
    h, _, w = (MODELS | VARIANTS)[name][1].partition("x")
    return torch.randn(count, 3, int(h), int(w or h))


def _check_timm(name: str) -> None:
    if name == "simmim-swin" and old_swin_layout():
        pytest.skip(f"timm {timm.__version__} mistakes its own Swin without a classifier for an older layout")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "convmae"])
def test_timm_loads_its_layout(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    _check_timm(name)
    folder, module = make_model(name)
    export_model(folder, "timm", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = images_for(name)
    with torch.no_grad():
        assert torch.equal(loaded.forward_features(images), module.encoder.forward_features(images))  # type: ignore[operator]
    assert tuple(loaded.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("channels", [1, 2, 13])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "convmae"])
def test_timm_needs_no_further_arguments_for_the_encoder_of_a_run(
    name: str, channels: int, tiny_run: Make, tmp_path: Path
) -> None:
    """Compare timm's model after timm's normalization with pixmim's encoder: options, size, channels, mean and std."""
    _check_timm(name)
    model, size = MODELS[name]
    mean, std = (tuple(a + 0.01 * i for i in range(channels)) for a in (0.3, 0.2))
    config = tiny_run(model=model, size=size, channels=channels, mean=mean, std=std)
    module = build_model(config).eval()
    import_weights(Weights(config, dict(module.state_dict()), "a test"), tmp_path / "run")
    loaded = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data["input_size"]) == (channels, *config.image_size)
    pixels = torch.rand(2, *data["input_size"])
    a = (pixels - torch.tensor(data["mean"]).view(-1, 1, 1)) / torch.tensor(data["std"]).view(-1, 1, 1)
    encoder = load_frozen_encoder(str(tmp_path / "run"), device="cpu", precision="fp32")
    b = (pixels - encoder.mean.view(-1, 1, 1)) / encoder.std.view(-1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded.forward_features(a), encoder.module.forward_features(b))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "to", "dtype"),
    [
        *((n, to, "uint8") for n in MODELS if n not in ("convmae", *CNNS) for to in ("timm", "hf", "detectron2")),
        *((name, "timm", "uint8") for name in CNNS),
        ("mae-oblong", "mmpretrain", "uint8"),
        *((name, to, "uint8") for name in ("registers", "pixio", "swin-windows") for to in ("timm", "detectron2")),
        *((name, to, "uint8") for name in ("beit-mean", "swin-ratio", "mff") for to in ("hf", "detectron2")),
        *(("mae", to, "uint16") for to in ("hf", "mmpretrain", "detectron2")),
    ],
)
def test_every_export_is_read_back_without_hints(
    name: str, to: str, dtype: str, tiny_run: Make, tmp_path: Path
) -> None:
    """Read size, heads, dtype, mean and std from the folder; timm's without pixmim's metadata."""
    model, size = (MODELS | VARIANTS)[name]
    config = tiny_run(model=model, size=size, dtype=dtype, mean=(0.1, 0.2, 0.3), std=(0.3, 0.4, 0.5))
    module = build_model(config).eval()
    import_weights(Weights(config, dict(module.state_dict()), "a test"), tmp_path / "run")
    export_model(str(tmp_path / "run"), to, tmp_path / "out")
    if to == "timm":
        save_file(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "model.safetensors")
    weights = resolve_model(str(tmp_path / "out"))
    assert weights.config.image_size == config.image_size and not weights.notes
    assert weights.config.normalization == config.normalization and weights.config.dtype == dtype
    assert '`pixmim.load_encoder(".")` reads it too' in (tmp_path / "out" / "README.md").read_text()
    images = images_for(name)
    with torch.no_grad():
        expected = module.encoder.forward_features(images)  # type: ignore[operator]
        result = load_encoder(tmp_path / "out").forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    if name == "mae-oblong" and to in ("timm", "hf"):
        (result,) = evaluate(
            str(tmp_path / "out"), [("knn", KnnSettings(SHAPES, SHAPES))], tmp_path / "out", device="cpu"
        )
        save(result, tmp_path / "out")
        assert "k-NN" in write_report([tmp_path / "out"], tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "name",
    ["mae", "mae-oblong", "mff", "simmim-vit", "simmim-beit", "beit-mean", "simmim-swin", "swin-ratio"],
)
def test_transformers_loads_its_layout(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder, module = make_model(name)
    lines = export_model(folder, "hf", tmp_path / "out")
    kind = lines[1].split("transformers.")[1].split(".")[0]
    body = kind in ("BeitModel", "ViTModel")
    options = {"add_pooling_layer": False} if "add_pooling_layer=False" in lines[1] else {}
    loaded, info = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not any(info.values()), info
    assert ("without the decoder" in (tmp_path / "out" / "README.md").read_text()) == body
    images = images_for(name)
    n = images.shape[-2] // module.patch * (images.shape[-1] // module.patch)
    hidden = torch.rand(2, n).argsort(dim=1) >= n // 4
    with torch.no_grad():
        expected = module(images, Mask.from_hidden(hidden))
        if kind == "ViTMAEForPreTraining":
            output = loaded.eval()(images, noise=hidden.float())
            assert torch.equal(output.mask.bool(), hidden)
            result = output.logits
        elif body:
            result = loaded.eval()(images).last_hidden_state
            expected = module.encoder.forward_features(images)  # type: ignore[operator]
        else:
            result = patchify(loaded.eval()(images, bool_masked_pos=hidden).reconstruction, module.patch)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["convmae", "simmim-beit", "simmim-swin", "mae-oblong", "convnext"])
def test_onnx_matches_torch_for_any_batch_size(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, module = make_model(name)
    export_model(folder, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    images = images_for(name, 5)
    vector, mean, grid = session.run(["vector", "mean", "map"], {"images": images.numpy()})
    with torch.no_grad():
        expected = features(module.encoder, images)
    for a, b in ((expected.vector[:, -1], vector), (expected.mean, mean), (expected.map, grid)):
        torch.testing.assert_close(a, torch.from_numpy(b), atol=1e-4, rtol=0)
    assert session.get_modelmeta().custom_metadata_map["mean"] == "[0.485, 0.456, 0.406]"


@pytest.mark.parametrize(("name", "to"), [("mae", "mmpretrain"), ("mae", "detectron2"), ("simmim-swin", "detectron2")])
def test_torch_files_are_read_back_bitwise(name: str, to: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder, module = make_model(name)
    export_model(folder, to, tmp_path / "out")
    file = tmp_path / "out" / "model.pth"
    options = {"img_size": 32} if name == "simmim-swin" else {"num_heads": 2, "decoder_heads": 2}
    loaded: nn.Module = load_model(file, **options) if to == "mmpretrain" else load_encoder(file, **options)
    state = module.state_dict() if to == "mmpretrain" else module.encoder.state_dict()
    for (key, a), b in zip(state.items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    content = torch.load(file, weights_only=True)
    assert content.get("matching_heuristics", to == "mmpretrain")
    if name == "mae" and to == "mmpretrain":
        assert "backbone.layers.1.ffn.layers.0.0.weight" in content["state_dict"]


def test_unsupported_models_are_refused_with_the_reason(make_model: MakeModel, tmp_path: Path, tiny_run: Make) -> None:
    convmae, _ = make_model("convmae")
    resnet, _ = make_model("resnet")
    resnet26 = str(tmp_path / "resnet26.pth")  # neither project has it
    torch.save(timm.create_model("resnet26", num_classes=0).state_dict(), resnet26)
    for folder, to, message in (
        (convmae, "timm", "timm has no ConvMAE"),
        (convmae, "hf", "of convmae"),
        (convmae, "mmpretrain", "--to mmpretrain"),
        (resnet, "hf", "the layout of test_resnet"),
        (resnet, "mmpretrain", "--to mmpretrain"),
        (resnet, "detectron2", "ResNets only, not test_resnet"),
        (resnet26, "mmpretrain", "ResNet-18, 34, 50, 101 and 152"),
        (resnet26, "detectron2", "ResNets only, not resnet26"),
    ):
        with pytest.raises(UserError, match=message):
            export_model(folder, to, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    mae, _ = make_model("mae")
    (tmp_path / "full").mkdir()
    with pytest.raises(UserError, match="already exists"):
        export_model(mae, "timm", tmp_path / "full")
    run = tiny_run(model=replace(MODELS["simmim-vit"][0], head="mlp"))
    import_weights(Weights(run, dict(build_model(run).state_dict()), "a test"), tmp_path / "mlp")
    with pytest.raises(UserError, match="one convolution, but this model's is an MLP"):
        export_model(str(tmp_path / "mlp"), "hf", tmp_path / "out")
    with pytest.raises(UserError, match="/no/such does not exist"):
        export_model("/no/such", "timm", tmp_path / "out")


def test_an_export_in_the_folder_of_the_run_is_named_like_it(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_model("mae")[0])
    export_model(".", "timm")
    export_model("encoder/..", "detectron2")
    assert sorted(path.name for path in Path().glob("*-*")) == ["mae-detectron2", "mae-timm"]


def test_a_classifier_keeps_the_names_of_its_classes(tiny_run: Make, tmp_path: Path) -> None:
    base = tiny_run().model
    config = tiny_run(model=replace(base, options={**base.options, "num_classes": 3}))
    save_encoder(build_encoder(config), tmp_path / "classifier", config, 1, classes=["ant", "bee", "fly"])
    for to in ("timm", "onnx", "mmpretrain"):
        export_model(str(tmp_path / "classifier"), to, tmp_path / to)
    assert resolve_model(str(tmp_path / "timm")).classes == ("ant", "bee", "fly")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert loaded.pretrained_cfg["label_names"] == ["ant", "bee", "fly"]
    session = pytest.importorskip("onnxruntime").InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["ant", "bee", "fly"]
    meta = torch.load(tmp_path / "mmpretrain" / "model.pth", weights_only=True)["meta"]
    assert meta["classes"] == ["ant", "bee", "fly"]


def test_onnx_that_computes_no_numbers_is_refused(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Broken(onnxruntime.InferenceSession):  # type: ignore[misc, name-defined]
        def run(self, *args: Any) -> list[Any]:
            return [output * float("nan") for output in super().run(*args)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    with pytest.raises(UserError, match="differ by nan"):
        export_model(make_model("mae")[0], "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoints_exports_its_encoder(make_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = make_model("mae")
    (Path(folder) / "model.safetensors").unlink()
    lines = export_model(folder, "hf", tmp_path / "out")
    assert "ViTModel" in lines[1]
    assert resolve_model(folder).config == PretrainConfig(**vars(resolve_model(folder).config))
    assert (Path(folder) / "config.json").read_text() == to_json(resolve_model(folder).config)


@pytest.mark.parametrize("to", FORMATS)
def test_exports_contain_no_path_of_this_machine(to: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Search every file for the folders of the run, its data, the code and the user."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    folder, _ = make_model("mae")
    config = Path(folder) / "config.json"
    changed = replace(load_config(config)[0], data=f"{tmp_path}/images", out=folder, init=f"{tmp_path}/weights.pth")
    config.write_text(to_json(replace(changed, knn=OnlineKnnConfig(f"{tmp_path}/train", f"{tmp_path}/test", 1.0))))
    export_model(folder, to, tmp_path / "out")
    import_weights(resolve_model(folder, with_decoder=True), tmp_path / "imported")
    words = [str(tmp_path), tmp_path.name, str(Path.home()), str(Path(__file__).parents[2]), "site-packages", ".py"]
    files = [path for root in ("out", "imported") for path in (tmp_path / root).rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        content = path.read_bytes()
        assert not [word for word in words if len(word) > 2 and word.encode() in content], path


@pytest.mark.parametrize("to", [*FORMATS, "import"])
def test_a_full_disk_leaves_no_files(
    to: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail in the first, second ... write of a file."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    folder, _ = make_model("mae")
    weights, real, done = resolve_model(folder, with_decoder=True), os.fsync, 0

    def write() -> object:
        return (
            import_weights(weights, tmp_path / "out") if to == "import" else export_model(folder, to, tmp_path / "out")
        )

    def full(descriptor: int) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise OSError(errno.ENOSPC, "No space remaining on device")
        real(descriptor)

    programs: list[Any] = []
    export = torch.onnx.export

    def export_once(*args: Any, **options: Any) -> Any:
        programs.extend([] if programs else [export(*args, **options)])
        return programs[0]

    monkeypatch.setattr(torch.onnx, "export", export_once)
    monkeypatch.setattr(os, "fsync", full)
    for allowed in range(6):
        remaining = allowed
        before = sorted(path.name for path in tmp_path.iterdir())
        try:
            write()
        except (UserError, OSError) as error:
            assert "No space remaining" in str(error) and sorted(path.name for path in tmp_path.iterdir()) == before
        else:
            done = allowed
            break
    assert done and (tmp_path / "out").is_dir() and not list(tmp_path.glob("*.tmp"))


def test_a_file_size_limit_leaves_no_files(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Limit the size of files, so that the system refuses a write in the middle of a file."""
    folder, _ = make_model("mae")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for to in (to for to in FORMATS if to != "onnx"):
            assert say(capsys, "export", folder, "--to", to, "--out", tmp_path / "out")[0] == 1
        status, text = say(capsys, "import", folder, "--to", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1 and "File too large" in text and "Traceback" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mae"]


def test_a_link_at_a_temporary_path_is_not_followed(make_model: MakeModel, tmp_path: Path) -> None:
    folder, _ = make_model("mae")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    (tmp_path / "out.tmp").symlink_to(tmp_path / "precious")
    export_model(folder, "timm", tmp_path / "out")
    import_weights(resolve_model(folder, with_decoder=True), tmp_path / "imported")
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]
    for name in ("dangling", "filled"):
        (tmp_path / name).symlink_to(tmp_path / ("nowhere" if name == "dangling" else "precious"))
        with pytest.raises(UserError, match="already exists"):
            export_model(folder, "timm", tmp_path / name)
        with pytest.raises(UserError, match=r"is there already|already exists"):
            import_weights(resolve_model(folder, with_decoder=True), tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


def test_import_writes_into_empty_or_new_folders_only(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model("mae")
    weights = resolve_model(folder, with_decoder=True)
    (tmp_path / "empty").mkdir()
    import_weights(weights, tmp_path / "empty")
    assert resolve_model(str(tmp_path / "empty")).config == weights.config
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "..", "/", tmp_path / "empty" / "config.json"):
        with pytest.raises(UserError, match=r"is there already|already exists|already contains a run"):
            import_weights(weights, Path(name))


def test_push_uploads_the_folder_and_keeps_it_on_failure(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Path]] = []

    class Hub:
        def create_repo(self, repository: str, exist_ok: bool) -> None:
            if repository == "me/forbidden":
                raise OSError("403: not yours")

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            calls.append((repo_id, folder_path))
            return f"hub://{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    folder, _ = make_model("mae")
    assert export_model(folder, "timm", tmp_path / "one", push="me/one")[-1] == "pushed to hub://me/one"
    assert calls == [("me/one", tmp_path / "one")]
    with pytest.raises(UserError, match="was written, but not pushed to me/forbidden: 403"):
        export_model(folder, "timm", tmp_path / "two", push="me/forbidden")
    assert (tmp_path / "two" / "config.json").exists()


@pytest.mark.parametrize(
    ("model", "size", "changes", "expected"),
    [
        (MODELS["mae"][0], "32", {"bins": 4}, "ViTModel"),
        (MODELS["simmim-vit"][0], "32", {"bins": 4}, "ViTModel"),
        (SWIN, "32", {"bins": 4}, "SwinModel"),
        (MODELS["mae"][0], "32", {"no_embed_class": True}, "positions, unlike this model"),
        (ArchitectureConfig("pixio", "vit_tiny_patch16_224", **THIN, options=NARROW), "64x32", {}, "squares only"),
        (
            ArchitectureConfig("pixio", "vit_tiny_patch16_224", **THIN, options=NARROW | {"mlp_ratio": 2.5}),
            *("32", {}, "integer as mlp_ratio"),
        ),
        (
            ArchitectureConfig("mae", "vit_base_patch16_xp_224", **THIN, options=NARROW),
            *("32", {"no_embed_class": False}, "ParallelScaling"),
        ),
    ],
)
def test_transformers_loads_what_is_written_or_the_reason_is_named(
    model: ArchitectureConfig, size: str, changes: dict[str, Any], expected: str, tiny_run: Make, tmp_path: Path
) -> None:
    model, target = replace(model, options=dict(model.options)), TargetConfig()
    if bins := changes.get("bins"):
        target = TargetConfig(distance="cross_entropy", bins=bins, normalize_patches=False)
    else:
        model.options.update(changes)
    config = tiny_run(model=model, size=size, target=target)
    module = build_model(config).eval()
    import_weights(Weights(config, dict(module.state_dict()), "a test"), tmp_path / "run")
    if not expected.endswith("Model"):
        with pytest.raises(UserError, match=expected):
            export_model(str(tmp_path / "run"), "hf", tmp_path / "out")
        return
    lines = export_model(str(tmp_path / "run"), "hf", tmp_path / "out")
    assert f"transformers.{expected}." in lines[1]
    loaded, info = getattr(transformers, expected).from_pretrained(
        tmp_path / "out", output_loading_info=True, add_pooling_layer=False
    )
    assert not any(info.values()), info
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = module.encoder.forward_features(images)  # type: ignore[operator]
        result = loaded.eval()(images).last_hidden_state
    torch.testing.assert_close(result, tokens.flatten(1, 2) if tokens.ndim == 4 else tokens, atol=1e-4, rtol=0)
