"""The names of the methods' own code: MAE and LSMAE, ConvMAE, SimMIM."""

from pixmim.weights.format import COMPUTED, CheckpointFormat
from pixmim.weights.key_map import KeyMap
from pixmim.weights.tensor_ops import fold_batch_norm, fuse_qkv, move_downsampling

_DECODER = (
    ("mask_token", "decoder.mask_token"),
    ("decoder_embed.*", "decoder.embed.*"),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_blocks.**", "decoder.blocks.**"),
    ("decoder_norm.*", "decoder.norm.*"),
    ("decoder_pred.*", "decoder.predict.*"),
)
"""MAE's decoder, which ConvMAE uses, too."""

MAE = CheckpointFormat(
    "MAE (official code)",
    "vit",
    ("decoder_embed.weight", "patch_embed.proj.weight"),
    KeyMap(
        *_DECODER,
        ("decoder_downsample.*", "decoder.downsample.*"),  # LSMAE's options, here and below
        ("decoder_upsample.*", "decoder.upsample.*"),
        ("**", "encoder.**"),
    ),
    arrange=(fuse_qkv,),
)

CONVMAE = CheckpointFormat(
    "ConvMAE (official code)",
    "convmae",
    ("patch_embed1.proj.weight", "blocks1.0.conv1.weight"),
    KeyMap(
        *_DECODER,
        ("stage1_output_decode.*", "stage1_output_decode.*"),
        ("stage2_output_decode.*", "stage2_output_decode.*"),
        ("head.0.*", "probe.*"),
        ("head.1.*", "encoder.head.*"),
        ("**", "encoder.**"),
    ),
    arrange=(fold_batch_norm,),
)

_SIMMIM = KeyMap(
    ("encoder.mask_token", "mask_token"),
    ("decoder.*.*", "head.*.*"),
    ("encoder.**", "encoder.**"),
)

SIMMIM_SWIN = CheckpointFormat(
    "SimMIM on Swin (official code)",
    "swin",
    ("encoder.mask_token", "encoder.layers.0.blocks.0.attn.relative_position_bias_table"),
    _SIMMIM,
    unused=COMPUTED,
    arrange=(move_downsampling,),
)

SIMMIM_VIT = CheckpointFormat(
    "SimMIM on ViT (official code)",
    "beit",
    ("encoder.mask_token", "encoder.blocks.0.norm1.weight"),
    _SIMMIM,
    unused=COMPUTED,
)

SWIN = CheckpointFormat(
    "Swin (official code; SimMIM's, fine-tuned)",
    "swin",
    ("layers.0.blocks.0.attn.relative_position_bias_table", "layers.0.downsample.reduction.weight"),
    KeyMap(("head.*", "encoder.head.fc.*"), ("**", "encoder.**")),
    unused=(*COMPUTED, ("mask_token", "of pre-training")),
    arrange=(move_downsampling,),
)
