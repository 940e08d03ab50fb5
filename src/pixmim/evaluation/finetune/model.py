"""An encoder with a head for classes, as fine-tuning begins with it."""

from dataclasses import replace
from typing import Any

from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.build import build_encoder, seeded
from pixmim.config import ModelConfig
from pixmim.models.convmae import ConvMAEEncoder
from pixmim.models.vit import init_like_mae
from pixmim.utils.errors import UserError
from pixmim.weights.adapt import interpolate_tables
from pixmim.weights.detect import Weights

_NEW = ("head.", "fc_norm.")
"""How names begin that start anew in a classifier."""

_LEFT = (*_NEW, "norm.")
"""How names begin that an encoder may have and its classifier not."""


def classifier_config(config: ModelConfig, module: nn.Module, classes: int, pool: str, size: str) -> ModelConfig:
    """The Run that builds the classifier: the encoder's with a head, and perhaps another image size.

    pool  "mean": the patch tokens' mean -> fc_norm -> head, as MAE; "cls": the class token after the final norm. A Swin
          and ConvMAE know the mean only.

    Raises UserError for an encoder that is none of pixmim's kinds, and for a pooling that it does not have.
    """
    options: dict[str, Any] = {**config.model.options, "num_classes": classes}
    if isinstance(module, VisionTransformer | Beit):
        if pool == "cls" and getattr(module, "cls_token", None) is None:
            raise UserError(f"{config.model.backbone} has no class token: --pool mean")
        options["global_pool"] = "avg" if pool == "mean" else "token"
    elif isinstance(module, SwinTransformer | ConvMAEEncoder):
        if pool == "cls":
            raise UserError(f"{config.model.backbone} has no class token: --pool mean")
    else:
        raise UserError(
            f"{type(module).__name__} is no encoder that pixmim can fine-tune: it takes ViT, Beit, Swin, ConvMAE"
        )
    if isinstance(module, Beit) and module.rel_pos_bias is not None:
        # SimMIM's fine-tuning gives each block a table of its own, which begins as the shared one.
        options |= {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
    resized = replace(config, size=size or config.size)
    window = options.get("window_size")
    if isinstance(module, SwinTransformer) and resized.image_size != config.image_size and isinstance(window, int):
        options["window_size"] = max(1, round(window * resized.image_size[0] / config.image_size[0]))
    return replace(resized, model=replace(config.model, options=options))


def build(config: ModelConfig, drop_path: float, head_std: float, seed: int) -> nn.Module:
    """A classifier with random weights, all of them trained; the head's are normal, its biases zero."""
    model = replace(config.model, options={**config.model.options, "drop_path_rate": drop_path})
    with seeded(seed):
        classifier = build_encoder(replace(config, model=model))
        if isinstance(classifier, ConvMAEEncoder):
            init_like_mae(classifier)
        head: Any = classifier.head.fc if isinstance(classifier, SwinTransformer) else classifier.head
        nn.init.normal_(head.weight, std=head_std)
        nn.init.zeros_(head.bias)
    return classifier.requires_grad_(True)


def load_encoder_weights(
    classifier: nn.Module, config: ModelConfig, encoder: nn.Module, made: ModelConfig
) -> list[str]:
    """Put an encoder's weights into a classifier; what had to be refitted, in lines.

    run, made  what built the classifier, and the encoder

    Raises UserError if they do not fit.
    """
    state = {f"encoder.{name}": value for name, value in classifier.state_dict().items()}
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    shared = "encoder.rel_pos_bias.relative_position_bias_table"
    if shared in tensors and shared not in state:
        table = tensors.pop(shared)
        for name in state:
            if name.endswith("attn.relative_position_bias_table"):
                tensors[name] = table
    fitted, lines = interpolate_tables(Weights(made, tensors, "the encoder"), state, config)
    used = {
        name.removeprefix("encoder."): value
        for name, value in fitted.items()
        if name in state and not name.removeprefix("encoder.").startswith(_NEW)
    }
    names = classifier.state_dict()
    missing = [name for name in names if name not in used and not name.startswith(_NEW)]
    odd = [n.removeprefix("encoder.") for n in fitted if n not in state]
    odd = [name for name in odd if not name.startswith(_LEFT)]
    wrong = [name for name, value in used.items() if value.shape != names[name].shape]
    if missing or odd or wrong:
        some = ", ".join([*missing, *odd, *wrong][:4])
        raise UserError(f"the encoder does not fit the classifier of {config.model.backbone}: {some}")
    classifier.load_state_dict(used, strict=False)
    return lines
