"""A model's tensors with all that it takes to build it, and how they come out of anybody's file."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from pixmim.config import ArchitectureConfig, MaskConfig, ModelConfig, Option, TargetConfig
from pixmim.config_io import from_json, is_config, read_config_text
from pixmim.utils.errors import UserError, first_line, shown
from pixmim.utils.files import parse_json
from pixmim.utils.trust import inside
from pixmim.utils.validation import check_name, check_options
from pixmim.weights import infer_config as sizes
from pixmim.weights.format import COMPUTED, CheckpointFormat
from pixmim.weights.formats import describe_unsupported, find_format
from pixmim.weights.infer_config import ModelHints, pair
from pixmim.weights.key_map import KeyMap
from pixmim.weights.safe_load import RawCheckpoint, read
from pixmim.weights.save import METADATA_KEY


@dataclass(frozen=True)
class Weights:
    """A model as data.

    run       its configuration: a PretrainConfig if pixmim trained it, otherwise a ModelConfig
    tensors   with the names of the `state_dict` of pixmim's models: `encoder.` and timm's names, and the rest
    origin    who wrote the file, in words
    left_out  keys of the file that no model needs, each with the reason
    source    the table its names came through, to speak of them as the file does; None for pixmim's own
    step      steps of the weights in pixmim's training; 0 for others' files
    steps     steps of the complete run; 0 if unknown
    classes   names of a classifier's outputs, in their order; empty where the file does not name them
    notes     lines to print: what was chosen among several models, and what was assumed
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    origin: str
    ignored_keys: dict[str, str] = field(default_factory=dict)
    source: CheckpointFormat | None = None
    step: int = 0
    steps: int = 0
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_decoder(self) -> bool:
        """Whether there is more than the encoder: all that a model in pre-training has."""
        return "decoder.mask_token" in self.tensors or "mask_token" in self.tensors

    @property
    def encoder(self) -> dict[str, Tensor]:
        """The encoder's tensors, with timm's names."""
        return {
            name.removeprefix("encoder."): value for name, value in self.tensors.items() if name.startswith("encoder.")
        }

    @property
    def progress(self) -> str:
        """How far its training is, "step 8 of 295"; empty for others' files."""
        of = f" of {self.steps:,}" if self.steps else ""
        return f"step {self.step:,}{of}" if self.step or self.steps else ""


def read_run(folder: Path) -> ModelConfig | None:
    """Return the configuration of the run, or of the imported weights, in a folder; None if there is none."""
    found = read_config(folder)
    return None if found is None else found[0]


def read_config(folder: Path) -> tuple[ModelConfig, str] | None:
    """Read a folder's configuration, and the text that it was read from; None if the folder holds none.

    Raises:
        UserError: If config.json is not JSON, or a run's and not valid, or leads out of the folder.
        OSError: If it cannot be read.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    text = read_config_text(path)
    content = parse_json(text, str(path))
    if not is_config(content):  # another project's
        return None
    inside(folder, path.name)
    return from_json(text, path), text


_TIMM = CheckpointFormat("timm", "vit", (), KeyMap(("**", "encoder.**")), unused=COMPUTED)
"""Any model of timm's whose config.json names its architecture."""

_EPS = {"vit": 1e-6, "beit": 1e-6, "swin": 1e-5, "convmae": 1e-6}
"""What the published models of each kind, and timm's, add to the variance in their layer norms."""

_HF_EPS = {"vit": 1e-12, "vit_mae": 1e-12, "beit": 1e-12, "swin": 1e-5}
"""What transformers adds where a config.json does not say."""


def read_weights(path: Path, known: ModelHints | None = None) -> Weights:
    """Read the model in a file of weights, or in a folder that holds one.

    What neither the caller nor the file's own settings say is taken from the published models, and noted.

    Args:
        path: The file or folder.
        known: What the caller says.

    Raises:
        UserError: If it cannot be read, is not of a kind that pixmim uses, or lacks what its kind has.
    """
    known = replace(known or ModelHints(), assumed=[])
    file = read(path, known.prefix.split(".")[0], known.ema)
    try:
        if METADATA_KEY in file.metadata:
            return feed(_own(file, known), known)
        said = _said(file)
        options = {name: getattr(known, name) for name in ("img_size", "num_heads", "decoder_heads", "norm_eps")}
        options = {name: said.get(name) if value is None else value for name, value in options.items()}
        check_options({name: value for name, value in options.items() if value is not None})
        known = replace(known, **options)
        weights = _of_timm(file) if "architecture" in file.config else _recognized(file, known)
        return _fed(weights, known, said)
    except UserError as error:
        text = str(error)
        raise error if text.startswith(str(file.path)) else UserError(f"{file.path}: {text}") from error


def feed(weights: Weights, known: ModelHints) -> Weights:
    """Return the weights with the mean and std that the caller says. Raises UserError for numbers out of bounds."""
    given = {name: value for name in ("mean", "std") if (value := getattr(known, name)) is not None}
    return replace(weights, config=replace(weights.config, **given)) if given else weights


def _fed(weights: Weights, known: ModelHints, said: dict[str, Any]) -> Weights:
    """Return others' weights with what their files, or the caller, say of their input, and a note of what nobody says.

    Values for another number of channels say nothing: one list stands in many a config.json of a grey model.
    """
    run, assumed = weights.config, list(known.assumed)
    theirs = {
        name: said[name] * (run.channels if len(said[name]) == 1 else 1) for name in ("mean", "std") if name in said
    }
    theirs = {name: values for name, values in theirs.items() if len(values) == run.channels}
    run = replace(run, dtype=said.get("dtype", run.dtype), **theirs)
    weights = feed(replace(weights, config=run), known)
    for name, values in zip(("mean", "std"), run.normalization, strict=True):
        if getattr(weights.config, name) is None:
            assumed.append(f"--{name} {' '.join(f'{value:g}' for value in values[:3])}")
    note = f"assumed, since the file does not say it: {' '.join(assumed)}"
    return replace(weights, notes=(*weights.notes, note)) if assumed else weights


def _recognized(file: RawCheckpoint, known: ModelHints) -> Weights:
    """A model by the names and shapes of its tensors."""
    prefix, source, note = _choose(file, known)
    behind = {key.removeprefix(prefix): value for key, value in file.tensors.items() if key.startswith(prefix)}
    kind = describe_unsupported(behind)
    if kind:
        also = "; others of timm's come as timm:NAME, or as a folder with timm's config.json"
        raise UserError(
            f"it is {kind}, which pixmim does not use: it takes plain ViT, Beit (SimMIM's ViT), Swin and ConvMAE"
            + also * kind.startswith("a ViT")
        )
    if source is None:
        some = ", ".join(list(behind)[:6])
        raise UserError(f"its {len(behind)} tensors have names of no project that pixmim knows ({some} ...)")
    try:
        tensors, left = source.translate(behind)
        left |= {key: f"outside of '{prefix}'" for key in file.tensors if not key.startswith(prefix)}
        if source.kind == "convmae" and "encoder.fc_norm.weight" not in tensors:
            for key in [key for key in behind if key.startswith("head.")]:
                left[prefix + key] = "a probe of the first token, which in ConvMAE is a corner's"
                tensors.pop(source.names.ours(key) or "", None)
        model, size = _model(source, tensors, known)
        pretrained = "mask_token" in tensors or "decoder.mask_token" in tensors
        run = ModelConfig(
            model=model,
            size=f"{size[0]}x{size[1]}",
            channels=tensors[_first(source)].shape[1],
            target=_target(file, model) if pretrained else None,
            mask=_mask(file, model) if pretrained else None,
        )
    except KeyError as error:
        name = str(error.args[0])
        raise UserError(
            f"{file.path} looks like {source.name}, but lacks '{source.names.theirs(name) or name}'"
        ) from error
    except UserError as error:
        raise UserError(f"{file.path} ({source.name}): {error}") from error
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:  # of shapes that are no model's
        raise UserError(
            f"{file.path} looks like {source.name}, but the shapes of its tensors do not: {first_line(error)}"
        ) from error
    return Weights(run, tensors, source.name, left, source, notes=tuple(filter(None, (file.choice, note))))


def _choose(file: RawCheckpoint, known: ModelHints) -> tuple[str, CheckpointFormat | None, str]:
    """The prefix behind which the model is, its source, and a note of what it was chosen among."""
    given = f"{known.prefix.strip('.')}." if known.prefix else ""
    if given and not any(key.startswith(given) for key in file.tensors) and given.startswith(f"{file.state}."):
        given = given.removeprefix(f"{file.state}.")
    if not any(key.startswith(given) for key in file.tensors):
        begin = ", ".join(dict.fromkeys(key.split(".")[0] for key in list(file.tensors)[:1000]))
        raise UserError(f"--prefix {known.prefix}: no tensor's name begins so; they begin with {shown(begin)}")
    prefix, source, others = find_format(file.tensors, given)
    also = f"; there is also {', '.join(others[:4])} (--prefix)" if others else ""
    return prefix, source, f"taken: {shown(prefix)}{also}" if prefix and (others or len(prefix) > len(given)) else ""


def _own(file: RawCheckpoint, known: ModelHints) -> Weights:
    run = from_json(file.metadata[METADATA_KEY], file.path)
    if known.img_size is not None and pair(known.img_size) != run.image_size:
        raise UserError(f"it was trained_at for images of {run.size} pixels, as it says itself: leave out --size")
    whole = any(name.startswith("encoder.") for name in file.tensors)
    tensors = file.tensors if whole else {f"encoder.{name}": value for name, value in file.tensors.items()}
    done = {name: file.metadata.get(name, "0") for name in ("step", "steps")}
    for name, value in done.items():
        if not re.fullmatch(r"[0-9]{1,15}", value):
            raise UserError(f"its metadata's '{name}' is {shown(value)}, which is no number of updates")
    classes = parse_json(file.metadata.get("classes", "[]"), "its metadata's 'classes'")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"its metadata's 'classes' are {shown(classes)}, and not a list of names")
    if len(set(classes)) < len(classes):
        raise UserError("its metadata's 'classes' hold a name twice")
    return Weights(run, tensors, "pixmim", step=int(done["step"]), steps=int(done["steps"]), classes=tuple(classes))


def _of_timm(file: RawCheckpoint) -> Weights:
    """A model in timm's layout: config.json names the architecture and its keywords, and what its input must be."""
    config = file.config
    about, arguments = config.get("pretrained_cfg", config), config.get("model_args") or {}
    if not isinstance(about, dict) or not isinstance(arguments, dict):
        raise UserError("its config.json is not timm's: pretrained_cfg and model_args must be objects")
    check_name(config["architecture"])
    check_options(arguments)
    arguments = dict(arguments)
    size = about.get("input_size", [3, 224, 224])
    if not isinstance(size, list) or len(size) != 3:
        raise UserError(f"its config.json's input_size is {shown(size)}, which is not [channels, height, width]")
    check_options({"in_chans": size[0], "img_size": size[1:]})
    tensors, left = _TIMM.translate(file.tensors)
    classifier = tensors.get(f"encoder.{about.get('classifier', 'head')}.weight")
    own: dict[str, Option] = {"num_classes": 0 if classifier is None else classifier.shape[0]}
    pool = arguments.get("global_pool", about.get("global_pool", config.get("global_pool")))
    own |= {"global_pool": pool} if pool is not None else {}
    sides, channels = pair(arguments.pop("img_size", size[1:])), arguments.pop("in_chans", size[0])
    run = ModelConfig(
        model=ArchitectureConfig("timm", config["architecture"], options={**arguments, **own}),
        size="x".join(map(str, sides)),
        channels=cast(int, channels),
        mean=_numbers(about, "mean"),
        std=_numbers(about, "std"),
    )
    return Weights(run, tensors, "timm", left, _TIMM)


def _numbers(settings: dict[str, Any], name: str) -> tuple[float, ...] | None:
    """A list of numbers that a file's settings hold; None if they do not. Raises UserError for anything else."""
    value = settings.get(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value or any(type(one) not in (int, float) for one in value):
        raise UserError(f"its settings' {name} is {shown(value)}, which is not a list of numbers")
    return tuple(float(one) for one in value)


def _said(file: RawCheckpoint) -> dict[str, Any]:
    """What a file's own settings say. MAE's `input_size` is not among them: its model ignores it."""
    names: dict[str, tuple[str, tuple[type, ...]]] = {
        "DATA.IMG_SIZE": ("img_size", (int,)),
        "img_size": ("img_size", (int, list, tuple)),
        "image_size": ("img_size", (int, list)),
        "num_attention_heads": ("num_heads", (int,)),
        "decoder_num_attention_heads": ("decoder_heads", (int,)),
        "layer_norm_eps": ("norm_eps", (float, int)),
    }
    settings = {**file.settings, **file.config}
    said = {ours: settings[theirs] for theirs, (ours, types) in names.items() if type(settings.get(theirs)) in types}
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in _HF_EPS:
        said.setdefault("norm_eps", _HF_EPS[kind])
    prepared = file.prepared
    found = {"mean": _numbers(settings, "mean"), "std": _numbers(settings, "std")}
    for name in found:
        found[name] = _numbers(prepared, f"image_{name}") or found[name]
    if prepared.get("do_rescale") is False:
        said["dtype"] = "float32"
    elif isinstance(factor := prepared.get("rescale_factor"), float) and 0 < factor < 1 / 4096:
        said["dtype"] = "uint16"
    if prepared.get("do_normalize") is False:
        found |= {"mean": (0.0,), "std": (1.0,)}
    return said | {name: value for name, value in found.items() if value is not None}


def _first(source: CheckpointFormat) -> str:
    return f"encoder.patch_embed{'1' if source.kind == 'convmae' else ''}.proj.weight"


def _model(
    source: CheckpointFormat, tensors: dict[str, Tensor], known: ModelHints
) -> tuple[ArchitectureConfig, tuple[int, int]]:
    measure = {"vit": sizes.vit, "beit": sizes.beit, "swin": sizes.swin, "convmae": sizes.convmae}[source.kind]
    backbone, options, size = measure(tensors, known)
    if known.norm_eps not in (None, _EPS[source.kind]):
        options["norm_eps"] = cast(float, known.norm_eps)
    if source.kind in ("swin", "beit") or "mask_token" in tensors:
        mlp = any(name.startswith("head.2.") for name in tensors)
        return ArchitectureConfig("simmim", backbone, head="mlp" if mlp else "linear", options=options), size
    decoder = sizes.decoder(tensors, known)
    long = decoder.get("decoder_dim") == 384 or size == (448, 448)
    method = "convmae" if source.kind == "convmae" else "lsmae" if long else "mae"
    return replace(ArchitectureConfig(method, backbone, options=options), **decoder), size  # type: ignore[arg-type]


def _target(file: RawCheckpoint, model: ArchitectureConfig) -> TargetConfig:
    """What the model was trained to predict, as far as the file tells; otherwise what its paper did."""
    if model.name == "simmim":
        return TargetConfig("pixels", normalize_patches=False, distance="l1")
    normalized = file.settings.get("norm_pix_loss", file.config.get("norm_pix_loss", True))
    if "target_generator.low_pass_filter" in file.tensors:
        return TargetConfig("low-frequency", radius=40.0, variant="paper-code")
    return TargetConfig("pixels", normalize_patches=bool(normalized))


def _mask(file: RawCheckpoint, model: ArchitectureConfig) -> MaskConfig:
    if model.name == "simmim":
        return MaskConfig("blocks", ratio=0.6, block_size=32, whole_blocks=True)
    ratio = file.settings.get("mask_ratio", file.config.get("mask_ratio", 0.75))
    if type(ratio) not in (int, float) or not 0 <= ratio <= 1:
        raise UserError(f"its settings' mask_ratio is {shown(ratio)}, and must be between 0 and 1")
    if ratio in (0, 1):  # a setting of whoever fine-tuned or drew with it: nothing can be learnt so
        ratio = 0.75
    return MaskConfig("blocks", ratio=ratio, block_size=32) if model.name == "lsmae" else MaskConfig(ratio=ratio)
