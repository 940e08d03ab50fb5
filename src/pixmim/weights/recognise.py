"""A model's tensors with all that it takes to build it, and how they come out of anybody's file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pixmim.config import Mask, Model, Run, Target
from pixmim.disk import parse_json
from pixmim.errors import UserError, first_line, shown
from pixmim.options import check_options
from pixmim.runfile import from_json, read_config_text
from pixmim.trust import inside
from pixmim.weights import sizes
from pixmim.weights.own import KEY
from pixmim.weights.read import Foreign, read
from pixmim.weights.source import Source
from pixmim.weights.sources import source_of


@dataclass(frozen=True)
class Weights:
    """A model as data.

    run       what builds it (model, size, channels), feeds it (mean, std) and trained it (target, mask)
    tensors   with the names of the `state_dict` of pixmim's models: `encoder.` and timm's names, and the rest
    origin    who wrote the file, in words
    left_out  keys of the file that no model needs, each with the reason
    source    the table its names came through, to speak of them as the file does; None for pixmim's own
    step      updates of the weights in pixmim's training; 0 for others' files
    classes   names of a classifier's outputs, in their order; empty where the file does not name them
    """

    run: Run
    tensors: dict[str, Tensor]
    origin: str
    left_out: dict[str, str] = field(default_factory=dict)
    source: Source | None = None
    step: int = 0
    classes: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether there is more than the encoder: all that a model in pre-training has."""
        return "decoder.mask_token" in self.tensors or "mask_token" in self.tensors

    @property
    def encoder(self) -> dict[str, Tensor]:
        """The encoder's tensors, with timm's names."""
        return {
            name.removeprefix("encoder."): value for name, value in self.tensors.items() if name.startswith("encoder.")
        }


def read_run(folder: Path) -> Run | None:
    """The settings of the run in a folder, or of weights that were imported into it; None if there is no such run."""
    found = read_config(folder)
    return None if found is None else found[0]


def read_config(folder: Path) -> tuple[Run, str] | None:
    """Read a run's settings, and the text that they were read from; None if there is no run in the folder.

    Raises:
        UserError: If config.json is not JSON, or a run's and not valid, or leads out of the folder.
        OSError: If it cannot be read.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    text = read_config_text(path)
    content = parse_json(text, str(path))
    if not isinstance(content, dict) or "recipe" not in content:  # another project's
        return None
    inside(folder, path.name)
    return from_json(text, path), text


KNOWN = ("img_size", "num_heads", "decoder_heads")
"""What shapes do not always tell, and a caller may have to say."""


def read_weights(path: Path, known: Mapping[str, Any] | None = None) -> Weights:
    """The model in a file of weights, or in a folder that holds one.

    known  of KNOWN, what the caller says

    Raises UserError for a file that cannot be read, is of no kind that pixmim knows, or lacks what its kind has.
    """
    file = read(path)
    if KEY in file.metadata:
        return _own(file)
    known = {**_said(file), **{name: value for name, value in (known or {}).items() if value is not None}}
    try:
        check_options({name: known[name] for name in KNOWN if name in known})
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error
    source = source_of(file.tensors)
    if source is None:
        some = ", ".join(list(file.tensors)[:6])
        raise UserError(
            f"{file.path}: its {len(file.tensors)} tensors have names of no project that pixmim knows ({some} ...)"
        )
    try:
        tensors, left = source.translate(file.tensors)
        if source.kind == "convmae" and "encoder.fc_norm.weight" not in tensors:
            for key in [key for key in file.tensors if key.startswith("head.")]:
                left[key] = "a probe of the first token, which in ConvMAE is a corner's"
                tensors.pop(source.names.ours(key) or "", None)
        model, size = _model(source, tensors, known)
        run = Run(
            model=model,
            size=f"{size[0]}x{size[1]}",
            channels=tensors[_first(source)].shape[1],
            target=_target(file, model, source),
            mask=_mask(file, model),
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
    return Weights(run, tensors, source.name, left, source)


def _own(file: Foreign) -> Weights:
    run = from_json(file.metadata[KEY], file.path)
    whole = any(name.startswith("encoder.") for name in file.tensors)
    tensors = file.tensors if whole else {f"encoder.{name}": value for name, value in file.tensors.items()}
    step = file.metadata.get("step", "0")
    if not re.fullmatch(r"[0-9]{1,15}", step):
        raise UserError(f"{file.path}: its metadata's 'step' is {shown(step)}, which is no number of updates")
    classes = parse_json(file.metadata.get("classes", "[]"), f"{file.path}: its metadata's 'classes'")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{file.path}: its metadata's 'classes' are {shown(classes)}, and not a list of names")
    if len(set(classes)) < len(classes):
        raise UserError(f"{file.path}: its metadata's 'classes' hold a name twice")
    return Weights(run, tensors, "pixmim", step=int(step), classes=tuple(classes))


def _first(source: Source) -> str:
    return f"encoder.patch_embed{'1' if source.kind == 'convmae' else ''}.proj.weight"


def _model(source: Source, tensors: dict[str, Tensor], known: Mapping[str, Any]) -> tuple[Model, tuple[int, int]]:
    measure = {"vit": sizes.vit, "beit": sizes.beit, "swin": sizes.swin, "convmae": sizes.convmae}[source.kind]
    backbone, options, size = measure(tensors, known)
    if source.kind in ("swin", "beit") or "mask_token" in tensors:
        mlp = any(name.startswith("head.2.") for name in tensors)
        return Model("simmim", backbone, head="mlp" if mlp else "linear", options=options), size
    decoder = sizes.decoder(tensors, known)
    long = decoder.get("decoder_dim") == 384 or size == (448, 448)
    method = "convmae" if source.kind == "convmae" else "lsmae" if long else "mae"
    return replace(Model(method, backbone, options=options), **decoder), size  # type: ignore[arg-type]


def _said(file: Foreign) -> dict[str, Any]:
    """What a file's own settings say of sizes. MAE's `input_size` is not among them: its model ignores it."""
    names = {
        "DATA.IMG_SIZE": "img_size",
        "image_size": "img_size",
        "num_attention_heads": "num_heads",
        "decoder_num_attention_heads": "decoder_heads",
    }
    said = {**file.settings, **file.config}
    return {ours: said[theirs] for theirs, ours in names.items() if type(said.get(theirs)) is int}


def _target(file: Foreign, model: Model, source: Source) -> Target:
    """What the model was trained to predict, as far as the file tells; otherwise what its paper did."""
    if model.name == "simmim":
        return Target("pixels", normalise_patches=False, distance="l1")
    normalised = file.settings.get("norm_pix_loss", file.config.get("norm_pix_loss", True))
    if "target_generator.low_pass_filter" in file.tensors:
        return Target("low-frequency", radius=40.0, form="released")
    return Target("pixels", normalise_patches=bool(normalised))


def _mask(file: Foreign, model: Model) -> Mask:
    if model.name == "simmim":
        return Mask("units", ratio=0.6, unit=32, whole_units=True)
    ratio = file.settings.get("mask_ratio", file.config.get("mask_ratio", 0.75))
    if type(ratio) not in (int, float) or not 0 < ratio < 1:
        raise UserError(f"its settings' mask_ratio is {shown(ratio)}, and must be between 0 and 1")
    return Mask("units", ratio=ratio, unit=32) if model.name == "lsmae" else Mask(ratio=ratio)
