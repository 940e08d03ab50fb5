"""ONNX of an encoder, checked in onnxruntime."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixmim.models import features
from pixmim.utils.errors import UserError
from pixmim.utils.files import write_text_atomically
from pixmim.weights.detect import Weights


class _Outputs(nn.Module):
    """The encoder with the outputs that an application wants: features, or a classifier's logits."""

    def __init__(self, encoder: nn.Module, classifies: bool) -> None:
        super().__init__()
        self.encoder, self.classifies = encoder, classifies

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.classifies:
            return (self.encoder(images),)
        found = features(self.encoder, images)
        return found.vector[:, -1], found.mean, found.map


def to_onnx(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """ONNX of the encoder for any batch: normalized images to its global vector, mean of patch tokens, and map; of a
    classifier to its logits.

    The file is checked in onnxruntime against torch. Raises UserError where onnx, onnxscript or onnxruntime is missing,
    or the two disagree.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'pixmim[onnx]'") from error
    run = weights.config
    classifies = bool(run.model.options.get("num_classes"))
    model = _Outputs(encoder, classifies)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, run.channels, *run.image_size, generator=generator)
    names = ["logits"] if classifies else ["vector", "mean", "map"]
    modules: Iterable[Any] = encoder.modules()
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the exporter cannot take apart a fused attention with a bias of its own
    batch = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            model,
            (images[:2],),
            input_names=["images"],
            output_names=names,
            dynamo=True,
            dynamic_shapes={"images": {0: batch}},
            verbose=False,
        )
    mean, std = run.normalization
    proto = program.model_proto  # type: ignore[union-attr]
    _strip(proto)
    said = {
        "mean": mean,
        "std": std,
        "img_size": run.image_size,
        "in_chans": run.channels,
        "dtype": run.dtype,
        "backbone": run.model.backbone,
    }
    for key, value in said.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    write_text_atomically(folder / "model.onnx", proto.SerializeToString())

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (1, 3):
        with torch.no_grad():
            expected = model(images[:count])
        got = session.run(names, {"images": images[:count].numpy()})
        for a, b in zip(expected, got, strict=True):
            worst = max(worst, float((a - torch.from_numpy(b)).abs().max() / a.abs().max()))
    if worst > 1e-3:
        raise UserError(f"onnxruntime and torch differ by {worst:.1e} of the largest value: nothing was written")
    return [
        f"model.onnx: images (batch, {run.channels}, {run.image_size[0]}, {run.image_size[1]}), "
        "normalized by the mean and std in its metadata",
        "  -> " + ("logits" if classifies else "vector, mean (batch, width), map (batch, width, rows, columns)"),
        f"checked in onnxruntime with batches of 1 and 3: within {worst:.1e} of torch's largest value",
    ]


def _strip(message: Any) -> None:
    """Clear what the exporter notes of the code: the files and lines of this machine that each node comes from."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for one in value if isinstance(value, Iterable) else (value,):
                _strip(one)
