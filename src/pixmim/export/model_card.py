"""Write a model card: README.md in the form of the Hugging Face hub, without a path of this machine."""

import json
import re
from pathlib import Path
from typing import Any

from pixmim.config import ModelConfig, PretrainConfig
from pixmim.data.bad_images import read_bad_images
from pixmim.report.results import ModelResults, compare, read_results
from pixmim.utils.console import printable, printable_lines
from pixmim.utils.trust import inside
from pixmim.weights.detect import Weights

_PAPERS = {
    "mae": ("MAE", "2111.06377"),
    "lsmae": ("LSMAE", "2210.07224"),
    "mff": ("MFF", "2308.00261"),
    "crossmae": ("CrossMAE", "2401.14391"),
    "pixio": ("Pixio", "2512.15715"),
    "convmae": ("ConvMAE", "2205.03892"),
    "simmim": ("SimMIM", "2111.09886"),
}
_PIXMIM = "2303.02416"

_LOAD = {
    "timm": [
        "import timm",
        "import torch",
        "",
        "encoder = {usage}.eval()",
        "tokens = encoder.forward_features({zeros})",
    ],
    "hf": ["import torch", "import transformers", "", "model = {usage}.eval()", "outputs = model({zeros})"],
    "mmpretrain": ["import torch", "", 'state = torch.load("model.pth", weights_only=True)["state_dict"]'],
    "detectron2": ["import torch", "", 'state = torch.load("model.pth", weights_only=True)["model"]'],
    "onnx": [
        *("import onnxruntime", "import torch", "", 'session = onnxruntime.InferenceSession("model.onnx")'),
        'outputs = session.run(None, {{"images": {zeros}.numpy()}})',
    ],
}
_WITH_DECODER = ("transformers.ViTMAEFor", "transformers.ViTForMasked", "transformers.SwinForMasked")
_CONFIGURED = ("mmpretrain", "detectron2")
"""Projects that load weights by their configuration, which the lines about usage show."""


def model_card(
    weights: Weights,
    to: str,
    usage: list[str],
    run: Path,
    description: str,
    notes: list[str],
    probe: list[str],
    readable: bool,
) -> str:
    """Return the text of a model card.

    `usage` and `probe` are lines on how the model and an attentive probe are loaded, with FOLDER for the exported
    folder. `run` is the folder of the run, which need not exist, for its results and unreadable images. An empty
    `description` of the images becomes a placeholder; `notes` state what the export leaves out. `readable`: pixmim
    itself reads the export.
    """
    config = weights.config
    problems: list[str] = []
    results = compare([ModelResults("", _without_paths(read_results(run, problems.append)))])
    bad = inside(run, "skipped.csv")
    count = len(read_bad_images(bad)[0]) if bad.exists() else 0
    encoder_only = weights.has_decoder and to != "mmpretrain" and not usage[0].startswith(_WITH_DECODER)
    left_out = [
        *notes,
        *["This folder holds the encoder only, without the decoder."] * encoder_only,
        *[f"{count:,} images of the training data could not be read."] * bool(count),
        *[f"{len(problems):,} files or values of the results could not be read."] * bool(problems),
    ]
    zeros = f"torch.zeros(1, {config.channels}, {config.image_size[0]}, {config.image_size[1]})"
    code = [line.format(usage=usage[0].replace("FOLDER", "."), zeros=zeros) for line in _LOAD[to]]
    code += [f"# {line.replace('FOLDER', '.')}" for line in usage if to in _CONFIGURED]
    unit = {"uint8": "divided by 255", "uint16": "divided by 65535", "float32": "unscaled"}[config.dtype]
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in config.normalization)
    head = bool(config.model.options.get("num_classes"))
    front = [
        f"library_name: {'transformers' if to == 'hf' else to}",
        f"pipeline_tag: {'image-classification' if head else 'image-feature-extraction'}",
        "license: unknown  # to be filled in",
        f"tags: {json.dumps(['masked-image-modeling', 'self-supervised', 'pixmim', config.model.name])}",
    ]
    sections = {
        "Data": [printable_lines(description) or "*To be filled in: what the images show, and where they are from.*"],
        "Method": [_method(config)],
        "Settings": _settings(weights),
        "Results": _results(results.columns, results.rows),
        "Use": [
            "In the folder of this file:",
            "\n".join(["```python", *code, "```"]),
            f"Input: {config.image_size[0]} x {config.image_size[1]} pixels, {config.channels} channels, values "
            f"{unit}, normalized with mean {mean} and std {std}."
            + ' `pixmim.load_encoder(".")` reads it too.'
            * readable,
        ],
        "Classification": ["\n".join(["```python", *probe, "```"])] if probe else [],
        "Left out": ["\n".join(f"- {_text(note)}" for note in left_out)] if left_out else [],
    }
    body = [part for name, parts in sections.items() if parts for part in (f"## {name}", *parts)]
    return "\n".join(["---", *front, "---", "", "\n\n".join([f"# {_title(config)}", *body]), ""])


def _title(config: ModelConfig) -> str:
    name = _PAPERS[config.model.name][0] if config.model.name in _PAPERS else config.model.name
    return _text(f"{'PixMIM on ' * _is_pixmim(config)}{name}, {config.model.backbone}")


def _is_pixmim(config: ModelConfig) -> bool:
    low = config.target is not None and config.target.kind == "low-frequency"
    return low and isinstance(config, PretrainConfig) and config.crop.kind == "simple-resized"


def _method(config: ModelConfig) -> str:
    if config.model.name not in _PAPERS:
        return "Weights of another project, whose training is unknown."
    name, paper = _PAPERS[config.model.name]
    text = (
        f"Pre-trained without labels by {name} ([arXiv {paper}](https://arxiv.org/abs/{paper})): a network sees a part "
    )
    text += "of the patches of an image and predicts the others."
    if _is_pixmim(config):
        text += f" The target has low frequencies only, and the crop keeps the object, as in PixMIM ([arXiv {_PIXMIM}]"
        text += f"(https://arxiv.org/abs/{_PIXMIM}))."
    if classes := config.model.options.get("num_classes"):
        text += f" Then fine-tuned with labels, as a classifier of {classes} classes."
    return text + " Trained with [pixmim](https://github.com/pixmim/pixmim)." * isinstance(config, PretrainConfig)


def _settings(weights: Weights) -> list[str]:
    config = weights.config
    if not isinstance(config, PretrainConfig):
        return []
    mask, target = config.mask, config.target
    start = config.init if config.init.startswith("timm:") else "weights of another file" if config.init else "random"
    rows = {
        "recipe": config.recipe or "none",
        "initial weights": start,
        "steps": weights.progress.removeprefix("step ") or "unknown",
        "batch size": f"{config.batch_size:,}",
        "learning rate": f"{config.lr:.4g}, {config.optim.schedule}",
        "optimizer": f"AdamW, weight decay {config.optim.weight_decay:g}",
        "crop": f"{config.crop.kind}, flipped with probability {config.crop.flip:g}",
        "mask": f"{mask.kind}, {mask.ratio:g} of the patches",
        "target": f"{target.kind}, {target.distance}{', normalized per patch' * target.normalize_patches}",
        "seed": str(config.seed),
    }
    return ["\n".join(["| setting | value |", "|---|---|", *(f"| {k} | {_text(v)} |" for k, v in rows.items())])]


def _results(columns: list[str], rows: list[Any]) -> list[str]:
    if not rows:
        return []
    lines = [_row(["", *columns, "measured on"]), "|" + "---|" * (len(columns) + 2)]
    for row in rows:
        cells = [f"{cell.text}{f' ({cell.range})' if cell.range else ''}" if cell else "" for cell in row.cells]
        lines.append(_row([row.label, *cells, row.on]))
    legend = "In parentheses: 95 % intervals over the test images"
    if any(cell is not None and cell.each for row in rows for cell in row.cells):
        legend += (
            "; after ±, the standard deviation over folds or draws of the labels, whose values are in parentheses, of "
            "more than ten the smallest and the largest"
        )
    return [f"{legend}. Untrained: the same network with its initial weights.", "\n".join(lines)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(map(_text, cells)) + " |"


def _without_paths(value: Any) -> Any:
    """Return results with the last part of each path in their settings."""
    if isinstance(value, str):
        return re.sub(r"[^,=+:*]*[/\\]", "", value)
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return {key: _without_paths(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _text(text: str) -> str:
    """Escape text for Markdown: names come from files."""
    return re.sub(r"([\\`*_\[\]<>|~&#])", r"\\\1", printable(text))
