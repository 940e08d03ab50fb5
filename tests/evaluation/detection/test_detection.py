"""Windowed attention, pyramids and training of detectors on tiny encoders."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import roi_align

pytest.importorskip("faster_coco_eval")

from helpers.evaluated import evaluate
from helpers.models import CNNS
from pixmim.build import build_model
from pixmim.config import ArchitectureConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.data.dataset import RGB
from pixmim.evaluation import detection
from pixmim.evaluation.context import EvalContext
from pixmim.evaluation.detection import detector
from pixmim.evaluation.detection.backbone import (
    RelativePositions,
    attend,
    beit_bias,
    build_pyramid,
    evenly_spaced,
    merge,
    partition,
    run_block,
)
from pixmim.evaluation.detection.dataset import Objects, open_detection
from pixmim.evaluation.detection.loader import fit_to_square, make_target
from pixmim.evaluation.frozen_encoder import FrozenEncoder, rebuild_at_size, wrap_live_encoder
from pixmim.evaluation.settings import DetectionSettings
from pixmim.models import create_encoder
from pixmim.utils.errors import UserError
from pixmim.weights.save import save_encoder

CPU = torch.device("cpu")
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "patch_size": 2, "window_size": 2}
BEIT = {**VIT, "init_values": 0.1}
CONVMAE = {"embed_dim": [16, 24, 32], "depth": [1, 1, 3], "num_heads": 2}
MODELS = {
    "vit": ArchitectureConfig(
        backbone="vit_tiny_patch16_224", decoder_dim=16, decoder_depth=1, decoder_heads=2, options=VIT
    ),
    "beit": ArchitectureConfig("simmim", "beit_base_patch16_224", options=BEIT),
    "swin": ArchitectureConfig("simmim", "swin_tiny_patch4_window7_224", options=SWIN),
    "convmae": ArchitectureConfig(
        "convmae", "convmae_tiny", decoder_dim=16, decoder_depth=1, decoder_heads=2, options=CONVMAE
    ),
    **CNNS,
}
TINY = DetectionSettings(
    "shapes:count=24,size=40",
    "shapes:count=4,size=40,seed=1",
    size=32,
    steps=4,
    batch_size=2,
    lr=1e-3,
    width=16,
    regions=16,
    window=2,
    jitter=(0.6, 1.4),
    threads=2,
    pictures=2,
)


def encoder_of(family: str) -> FrozenEncoder:
    run = PretrainConfig(data="shapes:", size="32", model=MODELS[family])
    return wrap_live_encoder(run, build_model(run).encoder, CPU, "fp32", step=3)


def make_vit(**options: object) -> VisionTransformer:
    encoder = create_encoder("timm", "vit_tiny_patch16_224", **{"img_size": (32, 48), **VIT, **options})
    assert isinstance(encoder, VisionTransformer)
    return encoder.eval()


def test_partition_and_merge() -> None:
    x = torch.arange(2 * 5 * 7, dtype=torch.float32).view(2, 5, 7, 1) + 1
    windows = partition(x, (2, 3))
    assert windows.shape == (2 * 3 * 3, 2, 3, 1)
    assert torch.equal(windows[1, ..., 0], x[0, :2, 3:6, 0])
    assert windows[8, 1].sum() == 0 and windows[8, 0, 1:].sum() == 0  # beyond the map
    assert torch.equal(merge(windows, (2, 3), (5, 7)), x)


def test_global_blocks_are_those_of_vitdet() -> None:
    assert evenly_spaced(12, 4) == {2, 5, 8, 11}
    assert evenly_spaced(24, 4) == {5, 11, 17, 23}
    assert evenly_spaced(2, 4) == {0, 1} and evenly_spaced(11, 4) == {2, 5, 7, 10} and evenly_spaced(3, 0) == set()


def test_one_global_window_equals_timms_block() -> None:
    encoder = make_vit()
    x = torch.randn(2, 4, 6, 32)
    for block in encoder.blocks:
        torch.testing.assert_close(run_block(block, x, (4, 6), None, None).flatten(1, 2), block(x.flatten(1, 2)))


def test_windows_do_not_attend_to_each_other() -> None:
    block = make_vit().blocks[0]
    x = torch.randn(1, 4, 6, 32)
    other = x.clone()
    other[:, :, 3:] += 1
    a, b = (run_block(block, y, (2, 3), None, None) for y in (x, other))
    assert torch.equal(a[:, :, :3], b[:, :, :3])
    alone = torch.cat([block(part.flatten(1, 2)).unflatten(1, (2, 3)) for part in (x[:, :2, :3], x[:, :2, 3:])], dim=2)
    torch.testing.assert_close(a[:, :2], alone)


def test_initial_relative_positions_change_nothing() -> None:
    encoder = make_vit()
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        maps = [build_pyramid(encoder, 16, window=2, relative_positions=relative).eval() for relative in (False, True)]
        maps[1].load_state_dict(maps[0].state_dict(), strict=False)
        for name, m in maps[0](x).items():
            torch.testing.assert_close(maps[1](x)[name], m, atol=1e-5, rtol=1e-5)
    assert [tuple(p.rows.shape) for p in maps[1].windowed.positions] == [(7, 16)] * 4  # 4 global of 4


def test_relative_positions_equal_a_loop() -> None:
    attention, positions = make_vit().blocks[0].attn, RelativePositions((3, 4), 16)
    nn.init.normal_(positions.rows)
    nn.init.normal_(positions.columns)
    x = torch.randn(1, 3, 4, 32)
    q, k, v = attention.qkv(x.flatten(1, 2))[0].view(12, 3, 2, 16).permute(1, 2, 0, 3)
    out = torch.zeros(12, 2, 16)
    for head in range(2):
        for i in range(12):
            scores = torch.zeros(12)
            for j in range(12):
                down, across = i // 4 - j // 4 + 2, i % 4 - j % 4 + 3
                near = q[head, i] @ (positions.rows[down] + positions.columns[across])
                scores[j] = q[head, i] @ k[head, j] / 4 + near
            out[i, head] = scores.softmax(0) @ v[head]
    torch.testing.assert_close(attend(attention, x, positions, None), attention.proj(out.flatten(1)).view(1, 3, 4, 32))


def test_beit_biases_in_a_window() -> None:
    encoder = create_encoder("simmim", "beit_base_patch16_224", img_size=(32, 48), **BEIT).eval()
    shared = encoder.rel_pos_bias
    nn.init.normal_(shared.relative_position_bias_table)
    table = shared.relative_position_bias_table
    full = shared()[:, 1:, 1:]  # without the class token
    torch.testing.assert_close(beit_bias(table, (4, 6), (4, 6))[0], full)
    corner = [r * 6 + c for r in range(2) for c in range(3)]
    torch.testing.assert_close(beit_bias(table, (4, 6), (2, 3))[0], full[:, corner][:, :, corner])
    x = torch.randn(2, 24, 32)
    with torch.no_grad():  # timm's own attention, on patches alone
        expected = encoder.blocks[0].attn(x, shared_rel_pos_bias=full[None])
        actual = attend(encoder.blocks[0].attn, x.unflatten(1, (4, 6)), None, beit_bias(table, (4, 6), (4, 6)))
    torch.testing.assert_close(actual.flatten(1, 2), expected)


@pytest.mark.parametrize(
    ("family", "finest"), [("vit", 2), ("beit", 2), ("swin", 2), ("convmae", 4), ("resnet", 4), ("convnext", 4)]
)
def test_every_family_has_five_maps_and_keeps_its_state_dict(family: str, finest: int) -> None:
    encoder = encoder_of(family)
    module = rebuild_at_size(encoder, "64x96", drop_path_rate=0.1)
    names = set(module.state_dict())
    pyramid = build_pyramid(module, 16, window=4)
    maps = pyramid(torch.randn(2, 3, 64, 96))
    assert list(maps) == ["0", "1", "2", "3", "pool"] and pyramid.strides == [finest * 2**i for i in range(5)]
    for stride, m in zip(pyramid.strides, maps.values(), strict=True):
        assert m.shape[:2] == (2, 16)
        assert m.shape[2:] == (-(-64 // stride), -(-96 // stride))
    sum(m.square().mean() for m in maps.values()).backward()
    assert set(pyramid.encoder.state_dict()) == names == set(encoder.module.state_dict())
    idle = {n for n, p in pyramid.named_parameters() if p.requires_grad and p.grad is None}
    assert not idle, idle


def test_batch_norms_keep_their_statistics_and_learn_their_weights() -> None:
    """Train mode changes no statistics: few images of detection's size are computed at once."""
    module = rebuild_at_size(encoder_of("resnet"), "64", drop_path_rate=0.1)
    before = {name: value.clone() for name, value in module.named_buffers()}
    pyramid = build_pyramid(module, 16).train()
    sum(m.square().mean() for m in pyramid(torch.randn(2, 3, 64, 64)).values()).backward()
    assert before and all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    assert module.bn1.weight.grad is not None  # type: ignore[union-attr]


def test_unsupported_encoders_are_refused() -> None:
    with pytest.raises(UserError, match="not ParallelThingsBlock"):
        build_pyramid(create_encoder("timm", "vit_small_patch16_18x2_224", depth=1, embed_dim=32, num_heads=2), 16)
    with pytest.raises(UserError, match="multiple of 4 pixels; this encoder's is 6"):
        build_pyramid(make_vit(patch_size=6, img_size=36), 16)
    with pytest.raises(UserError, match="not Linear"):
        build_pyramid(nn.Linear(2, 2), 16)


def test_learning_rates_by_layer_and_by_step() -> None:
    layer = detector.parameter_layers(detector.build_detector(encoder_of("vit"), TINY, 3, True))  # of four blocks
    encoder, positions = "backbone.module.encoder.", "backbone.module.windowed.positions."
    assert layer[encoder + "pos_embed"] == layer[encoder + "patch_embed.proj.weight"] == 0
    assert layer[encoder + "blocks.3.attn.qkv.weight"] == layer[positions + "3.rows"] == 4
    assert layer[encoder + "blocks.0.norm1.bias"] == layer[positions + "0.columns"] == 1
    top = ("roi_heads.box_predictor.cls_score.weight", "backbone.module.scales.0.0.weight", encoder + "norm.weight")
    assert {layer[name] for name in top if name in layer} == {5} and top[0] in layer and top[1] in layer
    settings, rate = DetectionSettings(), detector.learning_rate
    assert rate(settings, 0, 1000) == pytest.approx(1e-7)
    assert rate(settings, 200, 1000) == 1e-4  # warm-up is at most a fifth
    assert rate(settings, 125, 10_000) == pytest.approx(1e-4 * (0.001 + 0.999 / 2))
    assert [rate(settings, s, 1000) for s in (888, 889, 962, 963)] == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])


def test_training_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls, losses = encoder_of("vit"), list[object](), detector.detection_losses
    data = open_detection(TINY.train, "", encoder.image_spec)
    expected = detector.train_detector(EvalContext(encoder, tmp_path / "uninterrupted"), TINY, data, True).state_dict()

    def interrupted(*args: object) -> dict[str, Tensor]:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return losses(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(detector, "detection_losses", interrupted)
    context = EvalContext(encoder, tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        detector.train_detector(context, TINY, data, True)
    assert len(calls) == 2
    torch.manual_seed(99)  # the state of the global generator must not matter
    resumed = detector.train_detector(context, TINY, data, True).state_dict()
    assert len(calls) == 4
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_loss_falls(tmp_path: Path) -> None:
    context = EvalContext(encoder_of("vit"), tmp_path)
    settings = replace(TINY, steps=20, masks="no", relative_positions=False, jitter=(1.0, 1.0), lr=3e-3)
    data = open_detection(TINY.train, "", context.encoder.image_spec)
    detector.train_detector(context, settings, data, False)
    lines = (context.work_dir("detection", settings, data.truth) / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_evaluated_and_drawn(family: str, tmp_path: Path) -> None:
    run = PretrainConfig(data="shapes:", size="32", model=MODELS[family], seed=2)
    (tmp_path / "config.json").write_text(to_json(run))
    save_encoder(build_model(run).encoder, tmp_path / "encoder", run, step=7)
    settings = replace(TINY, steps=2, accumulation_steps=2, masks="auto" if family == "vit" else "no")
    (result,) = evaluate(str(tmp_path), [("detection", settings)], tmp_path, device="cpu", precision="fp32")
    assert ("mask/AP" in result.values) == (family == "vit")
    assert 0 <= result.values["box/AP"] <= result.values["box/AP50"] <= 100
    assert sum(name.startswith("ap/") for name in result.values) == 10
    (drawing,) = result.pictures.values()
    assert drawing.size[0] > 500 and not list((tmp_path / "unfinished").glob("*"))


def test_lower_precision_leaves_boxes_in_float32(tmp_path: Path) -> None:
    encoder = replace(encoder_of("vit"), precision="bf16")
    model = detector.build_detector(encoder, TINY, 10, True).eval()
    assert all(m.dtype == torch.float32 for m in model.backbone(torch.randn(1, 3, 32, 32)).values())
    values = dict(detection.evaluate_detection(EvalContext(encoder, tmp_path), replace(TINY, steps=1)))
    assert values["box/AP"] >= 0


def test_maps_that_are_not_finite_are_no_images_without_objects() -> None:
    model = detector.build_detector(encoder_of("vit"), TINY, 10, False).eval()
    with pytest.raises(UserError, match="feature maps of the detector are not finite"):
        detector.detect(model, torch.full((1, 3, 32, 32), torch.nan))


def test_a_class_without_a_test_object_changes_nothing() -> None:
    """Name a class in the test data that the train data lack: without objects, with a crowd, and with an object."""
    train, test = (open_detection(spec, "", RGB) for spec in (TINY.train, TINY.test))
    own, names = test.objects, [*test.classes, "bird"]

    def with_bird(index: int) -> Objects:
        plain = own(index)
        values = (np.concatenate([each, each[:1]]) for each in (plain.boxes, plain.labels, plain.crowd, plain.areas))
        boxes, labels, crowd, areas = values
        labels[-1], crowd[-1] = len(names) - 1, True
        return Objects(boxes, labels, crowd, areas, [*plain.masks, plain.masks[0]])

    for objects in (own, with_bird):
        matched = detection._match_classes(
            train, replace(test, classes=names, counts=[*test.counts, 0], objects=objects)
        )
        assert matched.classes == train.classes and matched.counts == test.counts
        for index in range(4):
            found, expected = matched.objects(index), own(index)
            assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("boxes", "labels"))
            assert len(found.crowd) == len(found.areas) == len(found.masks) == len(expected.labels)
    with pytest.raises(UserError, match="a class 'bird', which is not one of"):
        detection._match_classes(train, replace(test, classes=names, counts=[*test.counts, 1]))


def test_perfect_detections_have_an_ap_of_100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detections equal to the targets of the square must match the objects of the image."""
    test = open_detection(TINY.test, "", RGB)
    indices = iter(range(len(test.images)))

    def oracle(model: object, images: Tensor) -> list[dict[str, Tensor]]:
        index = next(indices)
        h, w = test.images.image(index).shape[-2:]
        target = make_target(test.objects(index), fit_to_square((h, w), 160), masks=True)
        boxes = target["boxes"]
        masks = roi_align(target["masks"].float()[None], torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1), 28)
        return [{"boxes": boxes, "labels": target["labels"], "scores": torch.ones(len(boxes)), "masks": masks}]

    monkeypatch.setattr(detection, "detect", oracle)
    context = EvalContext(encoder_of("vit"), tmp_path)
    values = dict(detection.evaluate_detection(context, replace(TINY, steps=1, size=160)))
    assert values["box/AP75"] == values["mask/AP75"] == 100 and values["box/AP"] > 90 and values["mask/AP"] > 80


def test_unusable_settings_are_refused(tmp_path: Path) -> None:
    context = EvalContext(encoder_of("vit"), tmp_path, console=Console(quiet=True))
    for changes, match in (
        ({"train": "", "test": ""}, "add --data COCO, or --train and --test"),
        ({"data": "coco"}, "leave out --train"),
        ({"train": "", "test": "", "data": str(tmp_path / "coco")}, "instances_train2017.json cannot be read"),
        ({"batch_size": 3, "accumulation_steps": 2}, "does not divide"),
        ({"steps": 0}, "--steps must be an integer from 1"),
        ({"window": 0}, "--window must be an integer from 1 to 1,024, not 0"),
        ({"jitter": (0.0, 1.0)}, "--jitter must be a number from 0.01"),
        ({"size": 36}, "not divisible into 8x8 patches"),
    ):
        with pytest.raises(UserError, match=match):
            dict(detection.evaluate_detection(context, replace(TINY, **changes)))  # type: ignore[arg-type]
