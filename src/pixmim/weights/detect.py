"""Detect which project's model a checkpoint file contains, and convert it to `Weights`: tensors and a configuration."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pixmim.config import ArchitectureConfig, ModelConfig, Option
from pixmim.config_io import from_json, is_config, read_config_text
from pixmim.utils.errors import UserError, first_line, shown
from pixmim.utils.files import parse_json
from pixmim.utils.trust import inside
from pixmim.utils.validation import check_name, check_options
from pixmim.weights.formats import FORMATS, TIMM_ANY
from pixmim.weights.infer_config import ModelHints, infer_config, merge_hints, numbers, read_settings, to_pair
from pixmim.weights.key_map import CheckpointFormat
from pixmim.weights.safe_load import RawCheckpoint, read
from pixmim.weights.save import METADATA_KEY


@dataclass(frozen=True)
class Weights:
    """A model as data. Tensors have the names of the `state_dict` of pixmim's models, with timm's for the encoder."""

    config: ModelConfig  # a PretrainConfig if pixmim trained it
    tensors: dict[str, Tensor]
    format_name: str  # the project that wrote the file, for messages
    ignored_keys: dict[str, str] = field(default_factory=dict)  # keys that no model needs, with the reason
    format: CheckpointFormat | None = None  # for the file's own names in messages; None for pixmim's files
    step: int = 0  # in pixmim's training; 0 for other projects' files
    steps: int = 0  # of the complete run; 0 if unknown
    classes: tuple[str, ...] = ()  # of a classifier, in the order of its outputs; empty if the file has none
    notes: tuple[str, ...] = ()  # lines to print: which of several models was chosen, what was assumed

    @property
    def has_decoder(self) -> bool:
        """Return True if these are the weights of a complete pre-training model, with decoder or head."""
        return "decoder.mask_token" in self.tensors or "mask_token" in self.tensors

    @property
    def encoder(self) -> dict[str, Tensor]:
        """Return the encoder's tensors, with timm's names."""
        return {n.removeprefix("encoder."): value for n, value in self.tensors.items() if n.startswith("encoder.")}

    @property
    def progress(self) -> str:
        """Return the training step, "step 8 of 295"; empty for other projects' files."""
        total = f" of {self.steps:,}" if self.steps else ""
        return f"step {self.step:,}{total}" if self.step or self.steps else ""


def read_run(folder: Path) -> ModelConfig | None:
    """Return the configuration of the run or imported weights in a folder; None for other folders."""
    result = read_config(folder)
    return None if result is None else result[0]


def read_config(folder: Path) -> tuple[ModelConfig, str] | None:
    """Return a folder's configuration and config.json's text; None for other folders. Raises UserError, OSError."""
    path = folder / "config.json"
    if not path.exists():
        return None
    text = read_config_text(path)
    if not is_config(parse_json(text, str(path))):  # another project's
        return None
    inside(folder, path.name)
    return from_json(text, path), text


def read_weights(path: Path, hints: ModelHints | None = None) -> Weights:
    """Read the model in a checkpoint file, or in a folder that contains one.

    What neither file nor hints contain is taken from the published models, and noted. Raises UserError if the file
    cannot be read, or its model is unsupported or incomplete.
    """
    hints = replace(hints or ModelHints(), assumed=[])
    file = read(path, hints.prefix.split(".")[0], hints.ema)
    try:
        if METADATA_KEY in file.metadata:
            return with_hints(_read_pixmim(file), hints)
        settings = read_settings(file, hints)
        if "architecture" in file.config:
            weights = with_hints(_read_timm_folder(file, hints), replace(hints, ema=False))
        else:
            hints = merge_hints(hints, settings)
            weights = _read_recognized(file, hints)
        return _with_settings(weights, settings, hints)
    except UserError as error:
        text = str(error)
        raise error if text.startswith(str(file.path)) else UserError(f"{file.path}: {text}") from error


def with_hints(weights: Weights, hints: ModelHints) -> Weights:
    """Apply the caller's facts to a model of known configuration: mean and std are replaced.

    Raises UserError for values out of bounds, and for facts that would be ignored.
    """
    other_size = hints.img_size is not None and to_pair(hints.img_size) != weights.config.image_size
    facts = {"--size": other_size, "--heads": hints.num_heads, "--decoder-heads": hints.decoder_heads}
    facts |= {"--prefix": hints.prefix, "--ema": hints.ema}
    if ignored := [flag for flag, value in facts.items() if value]:
        known = f"{weights.config.model.backbone} at {weights.config.size} pixels"
        raise UserError(f"it is known to be {known}: omit {', '.join(ignored)}")
    return _with_normalization(weights, hints)


def _with_normalization(weights: Weights, hints: ModelHints) -> Weights:
    values = {name: value for name in ("mean", "std") if (value := getattr(hints, name)) is not None}
    return replace(weights, config=replace(weights.config, **values)) if values else weights


def _with_settings(weights: Weights, settings: Mapping[str, Any], hints: ModelHints) -> Weights:
    """Set mean, std and dtype from the file's settings and the hints, and note what was assumed.

    Values for another number of channels are ignored: config.json of many a grayscale model contains those of RGB.
    """
    config = weights.config
    values: dict[str, Any] = {}
    for name in ("mean", "std"):
        value = settings.get(name, ())
        value = value * config.channels if len(value) == 1 else value
        values |= {name: value} if len(value) == config.channels else {}
    config = replace(config, dtype=settings.get("dtype", config.dtype), **values)
    weights = _with_normalization(replace(weights, config=config), hints)
    assumed = hints.assumed + [
        f"--{name} {' '.join(f'{value:g}' for value in default[:3])}"
        for name, default in zip(("mean", "std"), config.normalization, strict=True)
        if getattr(weights.config, name) is None
    ]
    note = f"assumed, since the file does not state it: {' '.join(assumed)}"
    return replace(weights, notes=(*weights.notes, note)) if assumed else weights


def _read_recognized(file: RawCheckpoint, hints: ModelHints) -> Weights:
    """Read a model whose project is recognized by the names of its tensors."""
    prefix, checkpoint_format, note = _choose_model(file, hints)
    named = {key.removeprefix(prefix): value for key, value in file.tensors.items() if key.startswith(prefix)}
    is_cnn = checkpoint_format is not None and checkpoint_format.kind in ("resnet", "convnext")
    if not is_cnn and (unsupported := describe_unsupported(named)):
        alternative = "; for other models of timm, give timm:NAME or a folder with timm's config.json"
        raise UserError(
            f"{unsupported} is not supported: pixmim takes plain ViT, Beit (SimMIM's ViT), Swin, ResNet, "
            "ConvNeXt and ConvMAE" + alternative * unsupported.startswith(("a ViT", "a conv"))
        )
    if checkpoint_format is None:
        raise UserError(
            f"the names of its {len(named)} tensors match no supported project ({', '.join(list(named)[:6])} ...)"
        )
    name, keys = checkpoint_format.name, checkpoint_format.keys
    try:
        tensors, ignored = checkpoint_format.to_pixmim(named)
        ignored |= {key: f"outside of '{prefix}'" for key in file.tensors if not key.startswith(prefix)}
        if checkpoint_format.kind == "convmae" and "encoder.fc_norm.weight" not in tensors:
            for key in [key for key in named if key.startswith("head.")]:
                ignored[prefix + key] = "a probe of the first token, which in ConvMAE is a corner"
                tensors.pop(keys.to_pixmim(key) or "", None)
        if is_cnn and "mask_token" in tensors and not _has_token_of_last_stage(tensors):
            for key in named:
                if (own := keys.to_pixmim(key) or "").startswith(("mask_", "head.")):
                    ignored[prefix + key] = "of a token in front of the first stage, where pixmim has none"
                    tensors.pop(own)
        elif is_cnn and "mask_token" in tensors:  # A2MIM without a scale adds the token to the features
            tensors.setdefault("mask_scale", torch.ones_like(tensors["mask_token"]))
        config = infer_config(file, checkpoint_format.kind, tensors, hints)
    except KeyError as error:
        missing = str(error.args[0])
        raise UserError(
            f"{file.path} looks like {name}, but '{keys.from_pixmim(missing) or missing}' is missing"
        ) from error
    except UserError as error:
        raise UserError(f"{file.path} ({name}): {error}") from error
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:  # shapes of no model
        raise UserError(f"{file.path} looks like {name}, but its shapes do not match: {first_line(error)}") from error
    notes = tuple(filter(None, (file.note, note)))
    return Weights(config, tensors, name, ignored, checkpoint_format, notes=notes)


def _has_token_of_last_stage(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if the mask token of a CNN has the width of the features in front of its last stage."""
    into, name = ("encoder.layer4.0.conv1.weight", "encoder.stages.3.blocks.0.norm.weight")
    width = tensors[into].shape[1] if into in tensors else tensors[name].shape[0]
    return tensors["mask_token"].shape[1] == width


def _read_pixmim(file: RawCheckpoint) -> Weights:
    """Read a file that pixmim wrote, by its metadata."""
    config = from_json(file.metadata[METADATA_KEY], file.path)
    progress = {name: file.metadata.get(name, "0") for name in ("step", "steps")}
    for name, value in progress.items():
        if not re.fullmatch(r"[0-9]{1,15}", value):
            raise UserError(f"its metadata's '{name}' is {shown(value)}: expected a number of steps")
    classes = parse_json(file.metadata.get("classes", "[]"), "its metadata's 'classes'")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"its metadata's 'classes' is {shown(classes)}: expected a list of names")
    if len(set(classes)) < len(classes):
        raise UserError("its metadata's 'classes' contains a name twice")
    complete = any(name.startswith("encoder.") for name in file.tensors)
    tensors = file.tensors if complete else {f"encoder.{name}": value for name, value in file.tensors.items()}
    step, steps = (int(value) for value in progress.values())
    return Weights(config, tensors, "pixmim", step=step, steps=steps, classes=tuple(classes))


def _read_timm_folder(file: RawCheckpoint, hints: ModelHints) -> Weights:
    """Read a model in timm's layout: config.json contains the architecture, its keywords and the input's format."""
    content = file.config
    cfg, arguments = content.get("pretrained_cfg", content), content.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(arguments, dict):
        raise UserError("its config.json is not timm's: pretrained_cfg and model_args must be objects")
    check_name(content["architecture"])
    check_options(arguments)
    size = cfg.get("input_size", [3, 224, 224])
    if not isinstance(size, list) or len(size) != 3:
        raise UserError(f"its config.json's input_size is {shown(size)}: expected [channels, height, width]")
    check_options({"in_chans": size[0], "img_size": size[1:]})
    tensors, ignored = TIMM_ANY.to_pixmim(file.tensors)
    classifier = tensors.get(f"encoder.{cfg.get('classifier', 'head')}.weight")
    options: dict[str, Option] = {**arguments, "num_classes": 0 if classifier is None else classifier.shape[0]}
    pool = arguments.get("global_pool", cfg.get("global_pool", content.get("global_pool")))
    options |= {} if pool is None else {"global_pool": pool}
    (h, w), channels = to_pair(options.pop("img_size", size[1:])), cast(int, options.pop("in_chans", size[0]))
    config = ModelConfig(
        model=ArchitectureConfig("timm", content["architecture"], options=options),
        size=f"{h}x{w}",
        channels=channels,
        mean=numbers(cfg, "mean") if hints.mean is None else None,
        std=numbers(cfg, "std") if hints.std is None else None,
    )
    return Weights(config, tensors, "timm", ignored, TIMM_ANY)


# ---- the format and prefix of a model

_WRAPPER = re.compile(
    r"((base|ema|image|momentum|online|student|target|teacher|vision)_)?"
    r"(backbone|encoder|encoder_[qk]|method|model|module|net|network|trunk|vit|swin|visual)|"
    r"_orig_mod|_forward_module|model_ema|ema|momentum|online|student|target|teacher|feature_extractor"
)
"""Prefixes that training code adds to a model's keys (Lightning, solo-learn, lightly, DINO, torch)."""

_MAX_DEPTH, _MAX_PREFIXES = 8, 4_096


def _choose_model(file: RawCheckpoint, hints: ModelHints) -> tuple[str, CheckpointFormat | None, str]:
    """Return the prefix of the model to use, its format, and a note if a prefix was chosen."""
    given = f"{hints.prefix.strip('.')}." if hints.prefix else ""
    if given and not any(key.startswith(given) for key in file.tensors) and given.startswith(f"{file.state}."):
        given = given.removeprefix(f"{file.state}.")
    if not any(key.startswith(given) for key in file.tensors):
        starts = ", ".join(dict.fromkeys(key.split(".")[0] for key in list(file.tensors)[:1000]))
        raise UserError(f"--prefix {hints.prefix} matches no tensor; their names start with {shown(starts)}")
    prefix, checkpoint_format, others = find_format(file.tensors, given)
    note = f"using {shown(prefix)}" + (f"; also available: {', '.join(others[:4])} (--prefix)" if others else "")
    return prefix, checkpoint_format, note if prefix and (others or len(prefix) > len(given)) else ""


def find_format(keys: Collection[str], given: str = "") -> tuple[str, CheckpointFormat | None, list[str]]:
    """Return prefix and format (or None) of a model among a file's keys below `given`, and other models' prefixes.

    The shortest prefix wins; among equally long ones, first one of neither student nor teacher, then a teacher's.
    """
    prefixes = {given: None}
    for key in keys:
        parts, depth = key.removeprefix(given).split(".") if key.startswith(given) else [], 0
        while depth < min(len(parts), _MAX_DEPTH) and _WRAPPER.fullmatch(parts[depth]):
            depth += 1
            if len(prefixes) < _MAX_PREFIXES:
                prefixes[given + "".join(f"{part}." for part in parts[:depth])] = None
    models = [
        (prefix, checkpoint_format)
        for prefix in sorted(prefixes, key=lambda prefix: (prefix.count("."), _rank(prefix)))
        for checkpoint_format in FORMATS
        if all(prefix + key in keys for key in checkpoint_format.required)
    ]
    if not models:
        return given, None, []
    prefix, checkpoint_format = models[0]
    others = dict.fromkeys(other for other, _ in models if not other.startswith(prefix))
    return prefix, checkpoint_format, list(others)


def _rank(prefix: str) -> int:
    if re.search("teacher|ema|online", prefix):
        return 1
    return 2 if re.search("student|momentum|target|encoder_k", prefix) else 0


_UNSUPPORTED = (
    ("*attn.logit_scale", "a Swin V2"),
    ("*self.logit_scale", "a Swin V2"),
    ("*.ls1.gamma", "a ViT with layer scale, such as DINOv2's or DeiT III's"),
    ("*.layer_scale1.lambda1", "a ViT with layer scale, such as DINOv2's"),
    ("*.mlp.w12.weight", "a ViT with SwiGLU, such as DINOv2's largest"),
    ("*rope*", "a ViT with rotary positions, such as EVA-02's or DINOv3's"),
    ("*attn.q_norm.weight", "a ViT with normalized queries and keys"),
    ("*attn.rel_pos_h", "a ViT with decomposed relative positions, such as SAM's or ViTDet's"),
    ("*dist_token", "a DeiT with a distillation token"),
    ("*distillation_token", "a DeiT with a distillation token"),
    ("*norm_pre.weight", "a ViT of CLIP"),
    ("*resblocks.0.ln_1.weight", "a transformer of CLIP"),
    ("*pre_layrnorm.weight", "a transformer of CLIP"),
    ("*absolute_pos_embed", "a Swin with absolute positions"),
)
_ATTENTION = ("*attn*", "*attention*", "*qkv*", "*self_att*")
_CONVOLUTION = ("*conv*.weight", "*bn1.running_mean", "*features.0.weight", "*dwconv.weight", "*downsample*.weight")


def describe_unsupported(tensors: Mapping[str, Tensor]) -> str:
    """Return the kind of an unsupported model, judged by the names of its tensors; empty if unclear."""
    for pattern, kind in _UNSUPPORTED:
        if any(fnmatchcase(key, pattern) for key in tensors):
            return kind
    if any(fnmatchcase(key, pattern) for key in tensors for pattern in _ATTENTION):
        return ""
    convolves = any(fnmatchcase(key, pattern) and v.ndim == 4 for key, v in tensors.items() for pattern in _CONVOLUTION)
    return "a convolutional network (CNN), such as a ResNet or a ConvNeXt" if convolves else ""
