"""Export an encoder to ONNX, and compare it with torch in onnxruntime."""

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
    """An encoder that returns its features, or a classifier that returns its logits."""

    def __init__(self, encoder: nn.Module, is_classifier: bool) -> None:
        super().__init__()
        self.encoder, self.is_classifier = encoder, is_classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.is_classifier:
            return (self.encoder(images),)
        result = features(self.encoder, images)
        return result.vector[:, -1], result.mean, result.map


def to_onnx(weights: Weights, encoder: nn.Module, folder: Path) -> list[str]:
    """Write model.onnx for any batch size: images to vector, mean and map, or to logits. Raises UserError."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'pixmim[onnx]'") from error
    config = weights.config
    is_classifier = bool(config.model.options.get("num_classes"))
    model = _Outputs(encoder, is_classifier)
    images = torch.randn(3, config.channels, *config.image_size, generator=torch.Generator().manual_seed(0))
    names = ["logits"] if is_classifier else ["vector", "mean", "map"]
    modules: Iterable[Any] = encoder.modules()
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the exporter does not support fused attention with a bias of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's deprecation warnings
        program = torch.onnx.export(
            model,
            (images[:2],),
            input_names=["images"],
            output_names=[f"output_{name}" for name in names],
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=65536)}},
            verbose=False,
        )
    proto = program.model_proto  # type: ignore[union-attr]
    _strip(proto)
    _name_outputs(proto.graph, names)
    mean, std = config.normalization
    metadata = {
        "mean": mean,
        "std": std,
        "img_size": config.image_size,
        "in_chans": config.channels,
        "dtype": config.dtype,
        "stretch": config.stretch,
        "backbone": config.model.backbone,
        "classes": weights.classes,
    }
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    write_text_atomically(folder / "model.onnx", proto.SerializeToString())

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    differences = []
    for count in (1, 3):
        with torch.no_grad():
            expected = model(images[:count])
        for a, b in zip(expected, session.run(names, {"images": images[:count].numpy()}), strict=True):
            differences.append((a - torch.from_numpy(b)).abs().max() / a.abs().max().clamp(min=1e-30))
    difference = float(torch.stack(differences).max())  # NaN if any is, unlike Python's max
    if not difference <= 1e-3:
        raise UserError(f"onnxruntime and torch differ by {difference:.1e} of the largest value: nothing was written")
    return [
        f"model.onnx: images (batch, {config.channels}, {config.image_size[0]}, {config.image_size[1]}), "
        "normalized by the mean and std in its metadata",
        "  -> " + ("logits" if is_classifier else "vector, mean (batch, width), map (batch, width, rows, columns)"),
        f"checked in onnxruntime for batch sizes 1 and 3: within {difference:.1e} of torch's largest value",
    ]


def _name_outputs(graph: Any, names: list[str]) -> None:
    """Rename the outputs "output_NAME" to NAME, and inner values of that name, which the exporter takes from torch."""
    renamed = {name: f"inner_{name}" for name in names} | {f"output_{name}": name for name in names}
    for node in graph.node:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = renamed.get(value, value)
    for value in (*graph.value_info, *graph.output):
        value.name = renamed.get(value.name, value.name)


def _strip(message: Any) -> None:
    """Remove the exporter's notes on each node, which contain paths and code of this machine."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for inner in value if isinstance(value, Iterable) else (value,):
                _strip(inner)
