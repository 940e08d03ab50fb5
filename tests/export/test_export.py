"""What leaves the house is read strictly by those it is for, and does there what it does here."""

import errno
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
from helpers.models import old_swin_layout
from pixmim import load_encoder, load_model, patchify
from pixmim.build import build_model
from pixmim.config import ArchitectureConfig, PretrainConfig
from pixmim.config import OnlineKnnConfig as Watched
from pixmim.config_io import load_config, to_json
from pixmim.evaluation.evaluate import evaluate
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

transformers = pytest.importorskip("transformers")

Make = Callable[..., PretrainConfig]
DRAWN = "shapes:count=20,size=48"
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
}  # fmt: skip


@pytest.fixture
def made(tiny_run: Make, tmp_path: Path) -> Callable[[str], tuple[str, MaskedModel]]:
    """A folder with a random model of some kind, and the model."""

    def make(name: str) -> tuple[str, MaskedModel]:
        model, size = MODELS[name]
        run = tiny_run(model=model, size=size)
        module = build_model(run).eval()
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        import_weights(Weights(run, dict(module.state_dict()), "a test"), tmp_path / name)
        return str(tmp_path / name), module

    return make


Made = Callable[[str], tuple[str, MaskedModel]]


def pictures_for(name: str, count: int = 2) -> torch.Tensor:
    h, _, w = MODELS[name][1].partition("x")
    return torch.randn(count, 3, int(h), int(w or h))


def _check_timm(name: str) -> None:
    if name == "simmim-swin" and old_swin_layout():
        pytest.skip(f"timm {timm.__version__} takes its own Swin without a classifier for an older layout")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "convmae"])
def test_timm_reads_its_own_layout(name: str, made: Made, tmp_path: Path) -> None:
    _check_timm(name)
    folder, module = made(name)
    export_model(folder, "timm", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = pictures_for(name)
    with torch.no_grad():
        assert torch.equal(theirs.forward_features(images), module.encoder.forward_features(images))  # type: ignore[operator]
    assert tuple(theirs.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("channels", [1, 2, 6, 13])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "convmae"])
def test_timm_knows_all_of_a_product_with_nothing_to_repeat(
    name: str, channels: int, tiny_run: Make, tmp_path: Path
) -> None:
    """Options, size, channels, mean and std: timm's model after timm's own normalization gives our features of ours."""
    _check_timm(name)
    model, size = MODELS[name]
    mean, std = (tuple(a + 0.01 * i for i in range(channels)) for a in (0.3, 0.2))
    run = tiny_run(model=model, size=size, channels=channels, mean=mean, std=std)
    module = build_model(run).eval()
    import_weights(Weights(run, dict(module.state_dict()), "a test"), tmp_path / "run")
    theirs = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True).eval()
    said = timm.data.resolve_model_data_config(theirs)
    assert tuple(said["input_size"]) == (channels, *run.image_size)
    pixels = torch.rand(2, *said["input_size"])
    a = (pixels - torch.tensor(said["mean"]).view(-1, 1, 1)) / torch.tensor(said["std"]).view(-1, 1, 1)
    encoder = load_frozen_encoder(str(tmp_path / "run"), device="cpu", precision="fp32")
    b = (pixels - encoder.mean.view(-1, 1, 1)) / encoder.std.view(-1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(a), encoder.module.forward_features(b))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *((name, to) for name in MODELS if name != "convmae" for to in ("timm", "hf", "detectron2")),
        ("mae", "mmpretrain"),
        ("mae-oblong", "mmpretrain"),
    ],
)
def test_every_export_comes_back_as_it_was(name: str, to: str, tiny_run: Make, tmp_path: Path) -> None:
    """Square or not, with nothing said: size, heads, mean and std are in the folder. timm's as others write it."""
    model, size = MODELS[name]
    run = tiny_run(model=model, size=size, mean=(0.1, 0.2, 0.3), std=(0.3, 0.4, 0.5))
    module = build_model(run).eval()
    import_weights(Weights(run, dict(module.state_dict()), "a test"), tmp_path / "run")
    export_model(str(tmp_path / "run"), to, tmp_path / "out")
    if to == "timm":
        save_file(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "model.safetensors")
    weights = resolve_model(str(tmp_path / "out"))
    assert (weights.config.image_size, weights.config.normalization) == (
        run.image_size,
        run.normalization,
    ) and not weights.notes
    images = pictures_for(name)
    with torch.no_grad():
        ours = module.encoder.forward_features(images)  # type: ignore[operator]
        back = load_encoder(tmp_path / "out").forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(back, ours, atol=1e-6, rtol=0)
    if name == "mae-oblong" and to in ("timm", "hf"):
        (result,) = evaluate(
            str(tmp_path / "out"), [("knn", KnnSettings(DRAWN, DRAWN))], tmp_path / "out", device="cpu"
        )
        save(result, tmp_path / "out")
        assert "k-NN" in write_report([tmp_path / "out"], tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["mae", "mae-oblong", "simmim-vit", "simmim-beit", "simmim-swin"])
def test_transformers_reads_its_own_layout(name: str, made: Made, tmp_path: Path) -> None:
    folder, module = made(name)
    lines = export_model(folder, "hf", tmp_path / "out")
    kind = lines[1].split("transformers.")[1].split(".")[0]
    body = kind in ("BeitModel", "ViTModel")
    bare = {"add_pooling_layer": False} if body else {}
    theirs, found = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True, **bare)
    assert not any(found.values()), found
    images = pictures_for(name)
    n = images.shape[-2] // module.patch * (images.shape[-1] // module.patch)
    hidden = torch.rand(2, n).argsort(dim=1) >= n // 4
    with torch.no_grad():
        ours = module(images, Mask.from_hidden(hidden))
        if kind == "ViTMAEForPreTraining":
            found = theirs.eval()(images, noise=hidden.float())
            assert torch.equal(found.mask.bool(), hidden)
            theirs_out = found.logits
        elif body:
            theirs_out = theirs.eval()(images).last_hidden_state
            ours = module.encoder.forward_features(images)  # type: ignore[operator]
        else:
            theirs_out = patchify(theirs.eval()(images, bool_masked_pos=hidden).reconstruction, module.patch)
    torch.testing.assert_close(theirs_out, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["convmae", "simmim-beit", "simmim-swin", "mae-oblong"])
def test_onnx_says_what_torch_says_for_any_batch(name: str, made: Made, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, module = made(name)
    export_model(folder, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    images = pictures_for(name, 5)
    vector, mean, grid = session.run(["vector", "mean", "map"], {"images": images.numpy()})
    with torch.no_grad():
        found = features(module.encoder, images)
    for ours, theirs in ((found.vector[:, -1], vector), (found.mean, mean), (found.map, grid)):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-4, rtol=0)
    assert session.get_modelmeta().custom_metadata_map["mean"] == "[0.485, 0.456, 0.406]"


@pytest.mark.parametrize(("name", "to"), [("mae", "mmpretrain"), ("mae", "detectron2"), ("simmim-swin", "detectron2")])
def test_what_others_read_pixmim_reads_back(name: str, to: str, made: Made, tmp_path: Path) -> None:
    folder, module = made(name)
    export_model(folder, to, tmp_path / "out")
    file = tmp_path / "out" / "model.pth"
    known = {"img_size": 32} if name == "simmim-swin" else {"num_heads": 2, "decoder_heads": 2}
    back: nn.Module = load_model(file, **known) if to == "mmpretrain" else load_encoder(file, **known)
    state = module.state_dict() if to == "mmpretrain" else module.encoder.state_dict()
    for (key, a), b in zip(state.items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    content = torch.load(file, weights_only=True)
    assert content.get("matching_heuristics", to == "mmpretrain")
    if name == "mae" and to == "mmpretrain":
        assert "backbone.layers.1.ffn.layers.0.0.weight" in content["state_dict"]


def test_what_the_other_side_does_not_have_is_refused_with_the_reason(
    made: Made, tmp_path: Path, tiny_run: Make
) -> None:
    convmae, _ = made("convmae")
    for to, message in (("timm", "timm has no ConvMAE"), ("hf", "no ConvMAE"), ("mmpretrain", "plain ViTs")):
        with pytest.raises(UserError, match=message):
            export_model(convmae, to, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    mae, _ = made("mae")
    (tmp_path / "full").mkdir()
    with pytest.raises(UserError, match="already"):
        export_model(mae, "timm", tmp_path / "full")
    run = tiny_run(model=replace(MODELS["simmim-vit"][0], head="mlp"))
    import_weights(Weights(run, dict(build_model(run).state_dict()), "a test"), tmp_path / "mlp")
    with pytest.raises(UserError, match="one convolution, and this one is an MLP"):
        export_model(str(tmp_path / "mlp"), "hf", tmp_path / "out")
    with pytest.raises(UserError, match="there is no /no/such"):
        export_model("/no/such", "timm", tmp_path / "out")


def test_a_run_without_its_checkpoints_still_hands_over_its_encoder(made: Made, tmp_path: Path) -> None:
    folder, _ = made("mae")
    (Path(folder) / "model.safetensors").unlink()
    lines = export_model(folder, "hf", tmp_path / "out")
    assert "ViTModel" in lines[1]
    assert resolve_model(folder).config == PretrainConfig(**vars(resolve_model(folder).config))
    assert (Path(folder) / "config.json").read_text() == to_json(resolve_model(folder).config)


@pytest.mark.parametrize("to", FORMATS)
def test_no_export_names_anything_of_this_machine(to: str, made: Made, tmp_path: Path) -> None:
    """Every byte of every file: no folder of the run, of its data, of the code that wrote it, or of its user."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    folder, _ = made("mae")
    config = Path(folder) / "config.json"
    run = replace(load_config(config)[0], data=f"{tmp_path}/pictures", out=folder, init=f"{tmp_path}/weights.pth")
    config.write_text(to_json(replace(run, knn=Watched(f"{tmp_path}/train", f"{tmp_path}/test", 1.0))))
    export_model(folder, to, tmp_path / "out")
    import_weights(resolve_model(folder, with_decoder=True), tmp_path / "imported")
    words = [str(tmp_path), tmp_path.name, str(Path.home()), str(Path(__file__).parents[2]), "site-packages", ".py"]
    files = [path for root in ("out", "imported") for path in (tmp_path / root).rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        content = path.read_bytes()
        assert not [word for word in words if len(word) > 2 and word.encode() in content], path


@pytest.mark.parametrize("to", [*FORMATS, "import"])
def test_a_full_disk_leaves_nothing(to: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write of a file, the first, the second ..., meets the end of the disk, with half of it written."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    folder, _ = made("mae")
    weights, real, done = resolve_model(folder, with_decoder=True), os.fsync, 0

    def write() -> object:
        return (
            import_weights(weights, tmp_path / "out") if to == "import" else export_model(folder, to, tmp_path / "out")
        )

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for allowed in range(6):
        left = allowed
        before = sorted(path.name for path in tmp_path.iterdir())
        try:
            write()
        except (UserError, OSError) as error:
            assert "No space left" in str(error) and sorted(path.name for path in tmp_path.iterdir()) == before
        else:
            done = allowed
            break
    assert done and (tmp_path / "out").is_dir() and not list(tmp_path.glob("*.tmp"))


def test_a_file_may_be_no_larger_than_the_limit(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for a full disk: the system refuses in the middle of a file."""
    folder, _ = made("mae")
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


def test_a_link_in_the_place_of_a_temporary_folder_is_not_followed(made: Made, tmp_path: Path) -> None:
    folder, _ = made("mae")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    (tmp_path / "out.tmp").symlink_to(tmp_path / "precious")
    export_model(folder, "timm", tmp_path / "out")
    import_weights(resolve_model(folder, with_decoder=True), tmp_path / "imported")
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]
    for name in ("dangling", "filled"):
        (tmp_path / name).symlink_to(tmp_path / ("nowhere" if name == "dangling" else "precious"))
        with pytest.raises(UserError, match="already"):
            export_model(folder, "timm", tmp_path / name)
        with pytest.raises(UserError, match="already"):
            import_weights(resolve_model(folder, with_decoder=True), tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_folder_may_be_imported_into_and_another_one_not(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = made("mae")
    weights = resolve_model(folder, with_decoder=True)
    (tmp_path / "empty").mkdir()
    import_weights(weights, tmp_path / "empty")
    assert resolve_model(str(tmp_path / "empty")).config == weights.config
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "..", "/", tmp_path / "empty" / "config.json"):
        with pytest.raises(UserError, match=r"already|holds a run"):
            import_weights(weights, Path(name))


def test_a_folder_is_pushed_and_a_failure_leaves_it_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    folder, _ = made("mae")
    assert export_model(folder, "timm", tmp_path / "one", push="me/one")[-1] == "pushed to hub://me/one"
    assert calls == [("me/one", tmp_path / "one")]
    with pytest.raises(UserError, match="is written, but could not be pushed to me/forbidden: 403"):
        export_model(folder, "timm", tmp_path / "two", push="me/forbidden")
    assert (tmp_path / "two" / "config.json").exists()
