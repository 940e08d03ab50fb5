"""Load models from runs, checkpoint files or timm; initialize a run from weights; import weights into a folder."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from pixmim.build import build_encoder, build_model
from pixmim.config import ArchitectureConfig, ModelConfig, PretrainConfig
from pixmim.config_io import defaults_for, portable, pretrain_config, to_json
from pixmim.models.base import MaskedModel
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.optim import Schedule
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_folder, check_new, write_text_atomically
from pixmim.utils.initialization import Module, WithoutInitialization, build_on_meta
from pixmim.utils.memory import free_memory, in_gib
from pixmim.utils.torch_defaults import torch_defaults
from pixmim.utils.trust import inside
from pixmim.utils.validation import Size, check_options, check_value, parse_size, plain, size_text
from pixmim.weights.adapt import adapt_weights, format_shape, interpolate_tables, original_key
from pixmim.weights.detect import Weights, read_run, read_weights, with_hints
from pixmim.weights.infer_config import ModelHints
from pixmim.weights.published import download_hub, download_timm
from pixmim.weights.save import ENCODER_FOLDER, ENCODER_WEIGHTS, save_encoder, save_tensors, timm_config

_CLASSIFIER = ("head.", "fc.", "classifier.", "fc_norm.", "norm.", "attn_pool.")
"""Prefixes of the encoder's tensors in which classifiers differ from pre-training."""

_FINAL_NORM = ("encoder.norm.", "encoder.head.norm.")

_FACTS = ("size", "mean", "std", "prefix", "ema")
"""Hints that are no keywords of `create_model`."""


@torch_defaults()
def load_model(file: str | os.PathLike[str], **options: Any) -> MaskedModel:
    """Load a pre-training model, encoder and decoder, in evaluation mode on the CPU.

    `load_model(file)(images, Mask.from_hidden(hidden))` predicts every patch.

    Args:
        file: A checkpoint file of pixmim, the methods' own code, mmselfsup, mmpretrain, OpenMixup or Hugging Face, or
            a run.
        **options: Facts that the file does not contain: size ("192x384", that its tables were trained at), num_heads,
            decoder_heads, mean, std, prefix, ema. Any other keyword of `create_model` overrides the file's: with
            another img_size, position tables are interpolated.

    Warns:
        UserWarning: For each fact that was assumed, since neither the file nor the caller states it.

    Raises:
        UserError: If the file cannot be read, contains only an encoder, or does not match.
    """
    weights, config = _open(file, options, with_decoder=True)
    return build_with_weights(replace(weights, config=config), trained_at=weights.config)


@torch_defaults()
def load_encoder(file: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load an encoder, with its head if it was fine-tuned, as a timm module in evaluation mode on the CPU.

    Args:
        file: As in `load_model`, or timm:NAME, or hf:NAME.
        **options: As in `load_model`.

    Warns:
        UserWarning: As in `load_model`.

    Raises:
        UserError: If the file cannot be read or does not match.
    """
    weights, config = _open(file, options)
    return build_encoder_with_weights(replace(weights, config=config), trained_at=weights.config)


def _open(
    file: str | os.PathLike[str], options: dict[str, Any], with_decoder: bool = False
) -> tuple[Weights, ModelConfig]:
    """Return the weights in a file, and their configuration with the caller's keywords of `create_model`."""
    options = plain(options)
    hints = {**options, "target_size": options.get("img_size")}
    hints.pop("img_size", None)
    weights = resolve_model(os.fspath(file), with_decoder=with_decoder, hints=hints)
    for note in weights.notes:
        if note.startswith(("warning: ", "assumed")):
            warnings.warn(note.removeprefix("warning: "), stacklevel=4)  # in torch_defaults's caller
    config = weights.config
    options = {name: value for name, value in options.items() if name not in _FACTS}
    check_options({name: value for name, value in options.items() if name not in ("name", "backbone")})
    size, channels = options.pop("img_size", config.image_size), options.pop("in_chans", config.channels)
    h, w = (size, size) if isinstance(size, int) else (size[0], size[-1])
    own = {one.name for one in fields(ArchitectureConfig)} - {"options"}
    model = replace(
        config.model,
        **{name: value for name, value in options.items() if name in own},
        options={**config.model.options, **{name: value for name, value in options.items() if name not in own}},
    )
    config = defaults_for(config, {"channels": channels})
    return weights, replace(config, model=model, size=f"{h}x{w}", channels=channels)


def build_with_weights(weights: Weights, trained_at: ModelConfig | None = None) -> MaskedModel:
    """Build the complete model of weights, in evaluation mode on the CPU.

    `trained_at` is the configuration that they were trained with, if `weights.config` has another image size. Raises
    UserError if they contain only an encoder, or do not match.
    """
    if not weights.has_decoder:
        raise UserError(f"this file ({weights.format_name}) contains only an encoder, which cannot predict patches")
    return _build(weights, build_model, trained_at).eval()


def build_encoder_with_weights(weights: Weights, trained_at: ModelConfig | None = None) -> nn.Module:
    """Build the encoder of weights, with its classifier if there is one. Otherwise as `build_with_weights`.

    Its `pretrained_cfg` describes its input, as timm's do; its `pixmim_config` is the configuration that builds it.
    """
    only = {name: value for name, value in weights.tensors.items() if name.startswith("encoder.")}
    weights = replace(weights, tensors=only)
    module: Any = _build(weights, _encoder_only, trained_at)
    encoder: Any = module["encoder"].eval()
    config = timm_config(encoder, weights.config, list(weights.classes))
    cfg = {"architecture": config["architecture"], **config["pretrained_cfg"]}
    encoder.pretrained_cfg = encoder.default_cfg = cfg | {"input_size": tuple(cfg["input_size"])}
    encoder.pixmim_config = weights.config
    return encoder


def _build(weights: Weights, build: Callable[[ModelConfig], Module], trained_at: ModelConfig | None) -> Module:
    """Build a module and load the weights. Allocates memory only after the shapes of its tensors have been checked."""
    state = build_on_meta(lambda: build(weights.config), weights.config.model.backbone).state_dict()
    tensors = adapt_weights(replace(weights, config=trained_at or weights.config), state, weights.config)
    with torch.random.fork_rng(devices=[]), WithoutInitialization():
        module = build(weights.config)
    module.load_state_dict(tensors)
    return module


def resolve_model(
    name: str, *, with_decoder: bool = False, head: bool = False, hints: Mapping[str, Any] | None = None
) -> Weights:
    """Read the weights of a model by name: the folder of a run, a checkpoint file or folder, timm:NAME or hf:NAME.

    Of a run, finished or not, the newest weights are read: its encoder, or if available all (`with_decoder`). A file's
    classifier is always included, that of timm:NAME with `head`. `hints` are fields of `ModelHints`, and `size`
    (HEIGHTxWIDTH or a side): facts that the file does not contain. Raises UserError if the model does not exist or is
    unsupported.
    """
    names, values = {one.name for one in fields(ModelHints)}, hints or {}
    known = {name: value for name, value in values.items() if name in names and value is not None}
    if size := size_text(values.get("size")):
        check_value("--size", size, Size)
        known["img_size"] = list(parse_size(size) or ())
    check_options({name: known[name] for name in ("num_heads", "decoder_heads") if name in known})
    model_hints = ModelHints(**known)
    if name.startswith("timm:"):
        weights = download_timm(name.removeprefix("timm:"), head)
    else:
        path = download_hub(name.removeprefix("hf:")) if name.startswith("hf:") else Path(name).expanduser()
        run = read_run(path) if path.is_dir() else None
        if run is None:
            return _in_memory(read_weights(path, model_hints))
        weights = _read_newest(path, run, with_decoder)
    try:
        return with_hints(weights, model_hints)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _read_newest(path: Path, config: ModelConfig, with_decoder: bool) -> Weights:
    """Read the newest weights of a run, finished or not, or those of an imported folder."""
    complete, encoder = inside(path, "model.safetensors"), inside(path, ENCODER_WEIGHTS)
    file = complete if with_decoder and complete.is_file() else encoder
    notes = list[str]()
    checkpoints = CheckpointManager(inside(path, "checkpoints"), warn=notes.append)
    newest = max(checkpoints.steps(), default=0)
    weights = replace(read_weights(file), config=config) if file.is_file() else None  # paths as in config.json
    suffices = weights is not None and not (with_decoder and file is encoder)
    if newest and not (suffices and weights is not None and newest <= weights.step):
        with WithoutInitialization():
            model = build_model(config)
        try:
            step, images = checkpoints.load_model(model)
        except UserError as error:
            if not suffices:
                raise
            step, notes = 0, [f"warning: using {file.relative_to(path)}, since {error}"]
        if not suffices or (weights is not None and step > weights.step):
            tensors = {n: value for n, value in model.state_dict().items() if with_decoder or n.startswith("encoder.")}
            steps = Schedule.of(pretrain_config(config, path), images).steps
            return Weights(config, tensors, "pixmim", step=step, steps=steps, notes=tuple(notes))
    if weights is None:
        raise UserError(f"the run {path} contains no weights: neither a checkpoint nor {ENCODER_WEIGHTS}")
    return _in_memory(replace(weights, notes=(*weights.notes, *notes)))


def describe(name: str, weights: Weights) -> list[str]:
    """Return lines to print about a loaded model: its training step, and what was chosen or assumed."""
    lines = [line.partition("warning: ") for line in (weights.progress, *weights.notes) if line]
    return [f"{level}{name}: {before}{line}" for before, level, line in lines]


def _in_memory(weights: Weights) -> Weights:
    """Copy memory-mapped tensors: if their file is truncated, reading them would end the process with SIGBUS."""
    size, free = sum(value.nbytes for value in weights.tensors.values()), free_memory()
    if free is not None and size > free:
        raise UserError(f"the weights ({weights.format_name}) take {in_gib(size)} GiB, but {in_gib(free)} are free")
    return replace(weights, tensors={name: value.clone() for name, value in weights.tensors.items()})


@torch.no_grad()
def initialize_from(model: MaskedModel, config: PretrainConfig) -> list[str]:
    """Load the weights that `config.init` names into a model; return lines about what was used, unused and assumed.

    The encoder must match, except for position tables, which are interpolated, the first convolution, which is adapted
    to the number of channels, and a classifier's head; otherwise raises UserError. The decoder is used only if all of
    it matches.
    """
    own = _heads(model)
    first = next(iter(_heads(model.encoder).values()), None)
    hints = {
        "likely_heads": first,
        "likely_decoder_heads": config.model.decoder_heads,
        "target_size": config.image_size,
    }
    alternative = f"`pixmim import {quote(config.init)} --prefix NAME --to FOLDER` (or --ema), then --init FOLDER"
    try:
        weights = resolve_model(config.init, with_decoder=True, hints=hints)
    except UserError as error:
        if not Path(config.init).expanduser().is_file():
            raise
        raise UserError(f"--init {error}. If its model has another prefix: {alternative}") from error
    state = model.state_dict()
    adapted, adaptations = interpolate_tables(weights, state, config)
    origin = ", ".join(filter(None, (weights.format_name, weights.progress)))
    lines = [f"initialized from {config.init} ({origin})", *(f"  {note}" for note in weights.notes), *adaptations]
    if any("--prefix" in note or "--ema" in note for note in weights.notes):
        lines.append(f"  to use another model of this file: {alternative}")

    encoder = {name: value for name, value in adapted.items() if name.startswith("encoder.")}
    mismatched = [name for name, value in encoder.items() if name in state and value.shape != state[name].shape]
    missing = [name for name in state if name.startswith("encoder.") and name not in encoder]
    unused = [name.removeprefix("encoder.") for name in encoder if name not in state]
    unexpected = [name for name in unused if not name.startswith(_CLASSIFIER)]
    failure = f"--init {config.init}: the encoder does not match {config.model.backbone}"
    if mismatched:
        name = mismatched[0]
        shapes = f"has shape {format_shape(encoder[name].shape)}, expected {format_shape(state[name].shape)}"
        raise UserError(f"{failure}: {original_key(weights, name)} {shapes}")
    build: Callable[[ModelConfig], nn.Module] = build_model if weights.has_decoder else _encoder_only
    heads = _heads(build_on_meta(lambda: build(weights.config), weights.config.model.backbone))
    other_heads = [name for name in heads if heads[name] != own.get(name, heads[name])]
    if other_heads and other_heads[0].startswith("encoder."):
        name = other_heads[0]
        raise UserError(f"{failure}: {name} has {heads[name]} attention heads, expected {own[name]}")
    if any(not name.startswith(_FINAL_NORM) for name in missing):
        raise UserError(f"{failure}: missing {', '.join(missing[:4])}")
    if unexpected:
        raise UserError(f"{failure}: unexpected {', '.join(unexpected[:4])}")
    used = {name: value for name, value in encoder.items() if name in state}
    lines.append(f"  encoder: {len(used)} tensors")
    lines += [f"  kept at their initial values, since the file lacks them: {', '.join(missing)}"] if missing else []
    lines += [f"  not used: {', '.join(unused)}"] if unused else []

    decoder = {name: value for name, value in adapted.items() if name not in encoder}
    names = {*decoder, *(name for name in state if not name.startswith("encoder."))}
    differing = sorted(n for n in names if n not in decoder or n not in state or decoder[n].shape != state[n].shape)
    if differing or other_heads:
        differs = original_key(weights, differing[0]) if differing else f"the heads of {other_heads[0]}"
        reason = f"it differs in {differs}" if decoder else "the file contains only an encoder"
        advice = "" if config.optim.decoder_warmup else "; --optim.decoder-warmup 5 trains it before the encoder"
        lines.append(f"  decoder: initialized randomly ({reason}){advice}")
    else:
        used |= decoder
        lines.append(f"  decoder: {len(decoder)} tensors")
    model.load_state_dict(used, strict=False)
    return lines


def _encoder_only(config: ModelConfig) -> nn.Module:
    return nn.ModuleDict({"encoder": build_encoder(config)})


def _heads(model: nn.Module) -> dict[str, int]:
    """Return the number of attention heads of each module that has any: no shape of a tensor shows it."""
    return {name: module.num_heads for name, module in model.named_modules() if hasattr(module, "num_heads")}


def import_weights(weights: Weights, folder: Path | None) -> list[str]:
    """Check that weights build a model, and save them in a new folder, if one is given, like a finished run's.

    The folder contains config.json, encoder/ and, with a decoder, model.safetensors. Returns lines about what was
    recognized, used, ignored and assumed. Raises UserError if the weights do not match, or the folder exists.
    """
    config = weights.config
    if folder is not None:
        if (folder / "config.json").exists():
            raise UserError(f"{folder} already contains a run: choose another folder")
        check_new(folder)
    encoder = build_with_weights(weights).encoder if weights.has_decoder else build_encoder_with_weights(weights)

    others = len(weights.tensors) - len(weights.encoder)
    classes = config.model.options.get("num_classes", 0)
    lines = [
        f"recognized as {weights.format_name}" + (f", {weights.progress}" if weights.progress else ""),
        f"  model: {config.model.name} on {config.model.backbone}, {config.size} pixels, channels: {config.channels}"
        + (f", {classes} classes" if classes else ""),
        f"  used: {len(weights.encoder)} tensors of the encoder, "
        + (f"{others} of the decoder" if others else "no decoder")
        + f": {sum(value.numel() for value in weights.tensors.values()):,} values",
        *(f"  {note}" for note in weights.notes),
    ]
    for reason in dict.fromkeys(weights.ignored_keys.values()):
        keys = [key for key, value in weights.ignored_keys.items() if value == reason]
        lines.append(f"  not used ({reason}): {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else ""))
    if folder is None:
        return [*lines, "nothing was written: add --to FOLDER to save the model"]
    with atomic_folder(folder) as temporary:
        save_encoder(encoder, temporary / ENCODER_FOLDER, config, weights.step, weights.steps, list(weights.classes))
        if weights.has_decoder:
            save_tensors(weights.tensors, temporary / "model.safetensors", config, weights.step, weights.steps)
        write_text_atomically(temporary / "config.json", to_json(portable(config)))
    model = ", model.safetensors" if weights.has_decoder else ""
    return [*lines, f"written to {folder}: config.json, {ENCODER_FOLDER}/{model}"]
