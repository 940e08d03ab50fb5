"""The classifier that fine-tuning trains: an encoder with a new head."""

from dataclasses import replace
from typing import Any

from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.build import build_encoder
from pixmim.config import ModelConfig
from pixmim.models.cnn import is_cnn
from pixmim.models.convmae import ConvMAEEncoder
from pixmim.models.vit import init_like_mae
from pixmim.utils.errors import UserError
from pixmim.utils.initialization import seeded
from pixmim.weights.adapt import interpolate_tables
from pixmim.weights.detect import Weights

_UNUSED = ("head.", "fc_norm.", "norm.")
"""Key prefixes that an encoder may have and its classifier not."""


def classifier_config(config: ModelConfig, module: nn.Module, classes: int, pool: str, size: str) -> ModelConfig:
    """Return the configuration of the classifier: the encoder's with a head, and optionally another image size.

    `pool` is "mean": mean of the patch tokens -> fc_norm -> head, as MAE; or "cls": class token after the final norm,
    which Swin, ConvMAE and CNNs lack. CNNs have timm's own classifier. Raises UserError if the kind of encoder is not
    supported, or it has no class token to pool.
    """
    options: dict[str, Any] = {**config.model.options, "num_classes": classes}
    if not isinstance(module, VisionTransformer | Beit | SwinTransformer | ConvMAEEncoder) and not is_cnn(module):
        raise UserError(f"{type(module).__name__} cannot be fine-tuned: pass a ViT, Beit, Swin, CNN or ConvMAE")
    if pool == "cls" and getattr(module, "cls_token", None) is None:
        raise UserError(f"{config.model.backbone} has no class token: pass --pool mean")
    if isinstance(module, VisionTransformer | Beit):
        options["global_pool"] = "avg" if pool == "mean" else "token"
    if isinstance(module, Beit) and module.rel_pos_bias is not None:
        # SimMIM's fine-tuning gives each block its own table, initialized from the shared one.
        options |= {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
    resized = replace(config, size=size or config.size)
    window = options.get("window_size")
    if isinstance(module, SwinTransformer) and resized.image_size != config.image_size and isinstance(window, int):
        options["window_size"] = max(1, round(window * resized.image_size[0] / config.image_size[0]))
    return replace(resized, model=replace(config.model, options=options))


def build(config: ModelConfig, drop_path: float, head_std: float, seed: int) -> nn.Module:
    """Build a classifier with random weights, all trainable; the head's are normal, its biases zero."""
    model = replace(config.model, options={**config.model.options, "drop_path_rate": drop_path})
    with seeded(seed):
        classifier: Any = build_encoder(replace(config, model=model))
        if isinstance(classifier, ConvMAEEncoder):
            init_like_mae(classifier)
        head: Any = classifier.head if isinstance(classifier, ConvMAEEncoder) else classifier.get_classifier()
        nn.init.normal_(head.weight, std=head_std)
        nn.init.zeros_(head.bias)
    return classifier.requires_grad_(True)


def load_encoder_weights(
    classifier: nn.Module, config: ModelConfig, encoder: nn.Module, encoder_config: ModelConfig
) -> list[str]:
    """Copy an encoder's weights into a classifier; return lines about interpolated tables. Raises UserError."""
    state = {f"encoder.{name}": value for name, value in classifier.state_dict().items()}
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    shared = "encoder.rel_pos_bias.relative_position_bias_table"
    if shared in tensors and shared not in state:
        table = tensors.pop(shared)
        tensors |= {name: table for name in state if name.endswith("attn.relative_position_bias_table")}
    new = _new_keys(classifier)
    fitted, lines = interpolate_tables(Weights(encoder_config, tensors, "the encoder"), state, config)
    fitted = {name.removeprefix("encoder."): value for name, value in fitted.items()}
    target = classifier.state_dict()
    used = {name: value for name, value in fitted.items() if name in target and not name.startswith(new)}
    missing = [name for name in target if name not in used and not name.startswith(new)]
    unexpected = [name for name in fitted if name not in target and not name.startswith((*new, *_UNUSED))]
    mismatched = [name for name, value in used.items() if value.shape != target[name].shape]
    if missing or unexpected or mismatched:
        names = ", ".join([*missing, *unexpected, *mismatched][:4])
        raise UserError(f"the encoder does not fit the classifier of {config.model.backbone}: {names}")
    classifier.load_state_dict(used, strict=False)
    return lines


def _new_keys(classifier: nn.Module) -> tuple[str, ...]:
    """Return key prefixes that are newly initialized in a classifier; ConvNeXt's head has a norm of the encoder too."""
    return (f"{classifier.pretrained_cfg['classifier']}.",) if is_cnn(classifier) else ("head.", "fc_norm.")  # type: ignore[index]
