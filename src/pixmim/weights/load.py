"""From somebody's weights to a ready model: a run's, a file's, or one of timm's."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

import timm
import torch
from torch import nn

from pixmim.build import Module, build_encoder, build_model, sketch
from pixmim.config import ArchitectureConfig, ModelConfig, PretrainConfig
from pixmim.config_io import portable, pretrain_config, to_json
from pixmim.models import published
from pixmim.models.base import MaskedModel
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.find_batch_size import in_gib
from pixmim.training.schedule import Schedule
from pixmim.utils.errors import UserError, did_you_mean, first_line
from pixmim.utils.files import atomic_folder, check_new, write_text_atomically
from pixmim.utils.memory import free_memory
from pixmim.utils.trust import inside
from pixmim.utils.validation import Size, check_name, check_options, check_value, parse_size
from pixmim.weights.adapt import fit, interpolate_tables, original_key, shape
from pixmim.weights.detect import Weights, feed, read_run, read_weights
from pixmim.weights.infer_config import ModelHints
from pixmim.weights.save import ENCODER_FOLDER, ENCODER_WEIGHTS, save_encoder, save_tensors, timm_config

_DECODER = ("decoder.", "head.", "stage1_output_decode.", "stage2_output_decode.", "mask_token")
"""How names begin that are not the encoder's."""

_CLASSIFIER = ("head.", "fc_norm.", "norm.")
"""How names begin in which classifiers differ from encoders."""


def load_model(file: str | Path, **options: Any) -> MaskedModel:
    """The ready model of a pre-training file, encoder and decoder, in evaluation mode on the CPU.

    file     pixmim's, or of MAE, LSMAE, ConvMAE, SimMIM (official code), mmselfsup, mmpretrain, Hugging Face; or a
             run's folder
    options  what the file does not tell: size ("192x384", which its tables are for), num_heads, decoder_heads, prefix,
             ema; or any other keyword of `create_model`: tables of positions are refitted to another img_size

    `load_model(file)(images, Mask.from_hidden(hidden))` predicts every patch. Raises UserError.
    """
    weights, options = _open(file, options, with_decoder=True)
    return build_with_weights(
        replace(weights, config=_with_options(weights.config, options)), trained_at=weights.config
    )


def _open(file: str | Path, options: dict[str, Any], with_decoder: bool = False) -> tuple[Weights, dict[str, Any]]:
    """The weights in a file, and those of the options that are for a model's constructor."""
    known = {**options, "wanted": options.get("img_size")}
    known.pop("img_size", None)
    of_file = {"size", "prefix", "ema"}
    return resolve_model(str(file), with_decoder=with_decoder, hints=known), {
        k: v for k, v in options.items() if k not in of_file
    }


def build_with_weights(weights: Weights, trained_at: ModelConfig | None = None) -> MaskedModel:
    """The whole model of such weights, in evaluation mode on the CPU.

    trained_at  the Run that the weights were trained_at for, where `weights.run` asks for another size

    Raises UserError if they are an encoder's only, or do not fit.
    """
    if not weights.has_decoder:
        raise UserError(f"this ({weights.origin}) holds an encoder only: it predicts nothing")
    return _filled(weights, build_model, trained_at).eval()


def build_encoder_with_weights(weights: Weights, trained_at: ModelConfig | None = None) -> nn.Module:
    """The encoder of such weights, with a classifier's head if they have one; otherwise as `build_with_weights`.

    Its `pretrained_cfg` says what input it takes, as timm's do, and its `pixmim_config` how to build it.
    """
    only = {name: value for name, value in weights.tensors.items() if name.startswith("encoder.")}
    encoder: Any = _filled(replace(weights, tensors=only), _holder, trained_at)["encoder"].eval()
    encoder.pixmim_config = weights.config
    about = timm_config(encoder, weights.config, list(weights.classes))
    known = {"architecture": about["architecture"], **about["pretrained_cfg"]}
    encoder.pretrained_cfg = encoder.default_cfg = known | {"input_size": tuple(known["input_size"])}
    module: nn.Module = encoder
    return module


def _holder(config: ModelConfig) -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": build_encoder(config)})


def _filled(weights: Weights, build: Callable[[ModelConfig], Module], trained_at: ModelConfig | None) -> Module:
    """What `build` makes of the weights' Run, with their tensors.

    A file may say what it likes of sizes: memory is taken only once its tensors are known to have them.
    """
    shapes = sketch(lambda: build(weights.config), weights.config.model.backbone).state_dict()
    state = fit(replace(weights, config=trained_at or weights.config), shapes, weights.config)
    with torch.random.fork_rng(devices=[]):
        module = build(weights.config)
    module.load_state_dict(state)
    return module


def load_encoder(file: str | Path, **options: Any) -> nn.Module:
    """The encoder in any file that pixmim reads, or of timm:NAME, as a timm module; fine-tuned ones with their head.

    Otherwise as `load_model`.
    """
    weights, options = _open(file, options)
    return build_encoder_with_weights(
        replace(weights, config=_with_options(weights.config, options)), trained_at=weights.config
    )


def resolve_model(
    name: str, *, with_decoder: bool = False, head: bool = False, hints: Mapping[str, Any] | None = None
) -> Weights:
    """Open the weights that `name` means: a run's folder, a file or folder of weights, or timm:NAME.

    Args:
        name: Of a run, finished or not, its newest weights are meant.
        with_decoder: Of a run: everything, and not just its encoder, if there is more.
        head: Of timm:NAME: with its classifier, if it has one; a file's classifier always comes along.
        hints: Fields of `ModelHints`: what a file does not say of its model.

    Raises:
        UserError: If there is no such model, or it cannot be used.
    """
    checked = _known(hints or {})
    if name.startswith("timm:"):
        return feed(_of_timm(name.removeprefix("timm:"), head), checked)
    path = Path(name).expanduser()
    run = read_run(path) if path.is_dir() else None
    if run is None:
        return _in_memory(read_weights(path, checked))
    return feed(_newest(path, run, with_decoder, checked), checked)


def _known(values: Mapping[str, Any]) -> ModelHints:
    """Return what a caller says, checked; `size` is HEIGHTxWIDTH or a side, as on the command line."""
    given = {
        key: value for key, value in values.items() if key in {f.name for f in fields(ModelHints)} and value is not None
    }
    if size := values.get("size"):
        check_value("--size", size, Size)
        given["img_size"] = list(parse_size(size) or ())
    check_options({key: given[key] for key in ("num_heads", "decoder_heads") if key in given})
    return ModelHints(**given)


def _newest(path: Path, config: ModelConfig, with_decoder: bool, hints: ModelHints) -> Weights:
    """Return the newest weights of a run, finished or not, or those of an import. Raises UserError."""
    imported, product = inside(path, "model.safetensors"), inside(path, ENCODER_WEIGHTS)
    file = imported if with_decoder and imported.is_file() else product
    checkpoints = CheckpointManager(inside(path, "checkpoints"))
    newest = max(checkpoints.steps(), default=0)
    weights = replace(read_weights(file, hints), config=config) if file.is_file() else None  # the folder may have moved
    if newest and (weights is None or newest > weights.step or (with_decoder and file is product)):
        model = build_model(config)
        step, images = checkpoints.load_model(model)
        tensors = {n: value for n, value in model.state_dict().items() if with_decoder or n.startswith("encoder.")}
        return Weights(
            config, tensors, "pixmim", step=step, steps=Schedule.of(pretrain_config(config, path), images).steps
        )
    if weights is None:
        raise UserError(
            f"{path} holds a run without weights: there is neither a checkpoint nor {ENCODER_WEIGHTS} in it"
        )
    return _in_memory(weights)


def describe(name: str, weights: Weights) -> list[str]:
    """Return lines to print of a model that was opened: how far its training is, and what was chosen or assumed."""
    return [f"{name}: {line}" for line in (weights.progress, *weights.notes) if line]


def _in_memory(weights: Weights) -> Weights:
    """Weights whose file may change or vanish: mapped bytes that are gone would end the process. Raises UserError."""
    size, free = sum(value.nbytes for value in weights.tensors.values()), free_memory()
    if free is not None and size > free:
        raise UserError(f"the weights ({weights.origin}) take {in_gib(size)} GiB, and {in_gib(free)} are free")
    return replace(weights, tensors={name: value.clone() for name, value in weights.tensors.items()})


@torch.no_grad()
def initialize_from(model: MaskedModel, config: PretrainConfig) -> list[str]:
    """Put the weights that `run.init` names into a model, as far as they fit; says in lines what was used and what not.

    The encoder must fit, but for tables of positions, which are refitted, the first convolution, which is
    adapted to the run's channels, and a classifier's head. What decodes is used as a whole or not at all.

    Raises UserError.
    """
    heads = next((m.num_heads for m in model.encoder.modules() if hasattr(m, "num_heads")), None)
    known = {"num_heads": heads, "decoder_heads": config.model.decoder_heads, "wanted": config.image_size}
    first = f"`pixmim import {quote(config.init)} --prefix NAME --to FOLDER` (or --ema) first, then --init FOLDER"
    try:
        weights = resolve_model(config.init, with_decoder=True, hints=known)
    except UserError as error:
        if not Path(config.init).expanduser().is_file():
            raise
        raise UserError(f"--init {error}. If its model is behind another prefix: {first}") from error
    state = model.state_dict()
    fitted, refits = interpolate_tables(weights, state, config)
    about = ", ".join(filter(None, (weights.origin, weights.progress)))
    lines = [f"begins from {config.init} ({about})", *(f"  {note}" for note in weights.notes), *refits]
    if any("--prefix" in note or "--ema" in note for note in weights.notes):
        lines.append(f"  for another model of this file: {first}")

    encoder = {name: value for name, value in fitted.items() if name.startswith("encoder.")}
    wrong = [n for n, v in encoder.items() if n in state and v.shape != state[n].shape]
    if wrong:
        n = wrong[0]
        raise UserError(
            f"--init {config.init}: the encoder differs: {original_key(weights, n)} is {shape(encoder[n])} there "
            f"and {shape(state[n])} in {config.model.backbone}"
        )
    missing = [n for n in state if n.startswith("encoder.") and n not in encoder]
    if any(not n.startswith("encoder.norm.") for n in missing):
        raise UserError(f"--init {config.init}: its encoder lacks {', '.join(missing[:4])} of {config.model.backbone}")
    used = {n: v for n, v in encoder.items() if n in state}
    lines.append(f"  the encoder: {len(used)} tensors")
    if missing:
        lines.append(f"  not in it, so at their start: {', '.join(missing)}")
    unused = [n.removeprefix("encoder.") for n in encoder if n not in state]
    strange = [n for n in unused if not n.startswith(_CLASSIFIER)]
    if strange:
        raise UserError(
            f"--init {config.init}: its encoder has {', '.join(strange[:4])}, which {config.model.backbone} does not"
        )
    if unused:
        lines.append(f"  left out of the encoder: {', '.join(unused)}")

    decoder = {n: v for n, v in fitted.items() if n.startswith(_DECODER)}
    ours = [n for n in state if n.startswith(_DECODER)]
    differ = [n for n in {*ours, *decoder} if n not in decoder or n not in state or decoder[n].shape != state[n].shape]
    if decoder and not differ:
        used |= decoder
        lines.append(f"  what decodes: {len(decoder)} tensors")
    elif decoder:
        lines.append(f"  what decodes begins anew: it differs in {original_key(weights, sorted(differ)[0])}")
    else:
        lines.append("  what decodes begins anew: the file holds an encoder only")
    model.load_state_dict(used, strict=False)
    return lines


def import_weights(weights: Weights, folder: Path | None) -> list[str]:
    """Check that weights make a model, say what was used and what not, and keep them in `folder` if it is given.

    The folder is then like a finished run's: config.json, encoder/ and, of a model in pre-training, model.safetensors.
    Raises UserError.
    """
    run = weights.config
    if folder is not None:
        if (folder / "config.json").exists():
            raise UserError(f"{folder} holds a run already: choose another folder")
        check_new(folder)
    encoder = build_with_weights(weights).encoder if weights.has_decoder else build_encoder_with_weights(weights)

    rest = len(weights.tensors) - len(weights.encoder)
    values = sum(value.numel() for value in weights.tensors.values())
    classes = run.model.options.get("num_classes", 0)
    lines = [
        f"recognized as {weights.origin}" + (f", {weights.progress}" if weights.progress else ""),
        f"  model: {run.model.name} on {run.model.backbone}, {run.size} pixels, channels: {run.channels}"
        + (f", {classes} classes" if classes else ""),
        f"  used: {len(weights.encoder)} tensors of the encoder"
        + (f", {rest} of what decodes" if rest else "; it decodes nothing")
        + f": {values:,} values",
        *(f"  {note}" for note in weights.notes),
    ]
    for why in dict.fromkeys(weights.ignored_keys.values()):
        keys = [key for key, reason in weights.ignored_keys.items() if reason == why]
        lines.append(f"  left out ({why}): {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else ""))
    if folder is None:
        return [*lines, "nothing was written: --to FOLDER keeps it"]
    written = [f"{ENCODER_FOLDER}/"]
    with atomic_folder(folder) as beside:
        save_encoder(encoder, beside / ENCODER_FOLDER, run, weights.step, weights.steps, list(weights.classes))
        if weights.has_decoder:
            save_tensors(weights.tensors, beside / "model.safetensors", run, weights.step, weights.steps)
            written.append("model.safetensors")
        write_text_atomically(beside / "config.json", to_json(portable(run)))
    return [*lines, f"written to {folder}: config.json, {', '.join(written)}"]


def _of_timm(name: str, head: bool) -> Weights:
    """One of timm's pre-trained models, which timm downloads or finds in its cache."""
    check_name(name)
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model '{name}'{did_you_mean(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    classes = int(config.num_classes or 0) if head and config is not None else 0
    options: dict[str, Any] = {"num_classes": classes} if classes else {}
    try:
        module: Any = published(name, classes)
    except UserError:
        raise
    except Exception as error:  # no network, no such weights: the kinds of exception are the hub's
        raise UserError(f"timm:{name} cannot be had: {first_line(error)}") from error
    trained_at = module.pretrained_cfg
    channels, h, w = trained_at["input_size"]
    run = ModelConfig(
        model=ArchitectureConfig("timm", name, options=options),
        size=f"{h}x{w}",
        channels=channels,
        mean=tuple(trained_at["mean"]),
        std=tuple(trained_at["std"]),
    )
    return Weights(run, {f"encoder.{n}": v for n, v in module.state_dict().items()}, "timm's pre-trained weights")


def _with_options(config: ModelConfig, options: Mapping[str, Any]) -> ModelConfig:
    """A file's Run with the caller's keywords of `create_model` over it."""
    own = {f.name for f in fields(ArchitectureConfig)} - {"options"}
    check_options({name: value for name, value in options.items() if name not in ("name", "backbone")})
    size = options.get("img_size", config.image_size)
    h, w = (size, size) if isinstance(size, int) else (size[0], size[-1])
    rest = {n: v for n, v in options.items() if n not in own | {"img_size", "in_chans"}}
    model = replace(
        config.model,
        **{n: v for n, v in options.items() if n in own},
        options={**config.model.options, **rest},
    )
    return replace(config, model=model, size=f"{h}x{w}", channels=options.get("in_chans", config.channels))
