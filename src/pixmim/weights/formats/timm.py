"""timm's names, which are pixmim's own for an encoder, and MAE's for an encoder alone or fine-tuned."""

from pixmim.weights.format import COMPUTED, CheckpointFormat
from pixmim.weights.key_map import KeyMap
from pixmim.weights.tensor_ops import fold_batch_norm, fuse_qkv

TIMM_VIT = CheckpointFormat(
    "timm's ViT (MAE's encoder alone, or fine-tuned, is the same)",
    "vit",
    ("blocks.0.norm1.weight", "patch_embed.proj.weight"),
    KeyMap(
        ("head.0.*", "probe.*"),  # MAE's linear probe: a BatchNorm before the head
        ("head.1.*", "encoder.head.*"),
        ("**", "encoder.**"),
    ),
    arrange=(fuse_qkv, fold_batch_norm),
)

TIMM_SWIN = CheckpointFormat(
    "timm's Swin",
    "swin",
    ("layers.0.blocks.0.attn.relative_position_bias_table", "layers.1.downsample.reduction.weight"),
    KeyMap(("**", "encoder.**")),
    unused=COMPUTED,
)

BEIT = CheckpointFormat(
    "timm's Beit (SimMIM's ViT, fine-tuned, is the same)",
    "beit",
    ("blocks.0.attn.q_bias", "blocks.0.gamma_1"),
    KeyMap(("**", "encoder.**")),
    unused=(*COMPUTED, ("mask_token", "of pre-training")),
)
