"""The names of the methods' own code: MAE and LSMAE, ConvMAE, SimMIM."""

from pixmim.weights.format import COMPUTED, Source
from pixmim.weights.key_map import Names
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

MAE = Source(
    "MAE (official code)",
    "vit",
    ("decoder_embed.weight", "patch_embed.proj.weight"),
    Names(
        *_DECODER,
        ("decoder_downsample.*", "decoder.downsample.*"),  # LSMAE's options, here and below
        ("decoder_upsample.*", "decoder.upsample.*"),
        ("**", "encoder.**"),
    ),
    arrange=(fuse_qkv,),
)

CONVMAE = Source(
    "ConvMAE (official code)",
    "convmae",
    ("patch_embed1.proj.weight", "blocks1.0.conv1.weight"),
    Names(
        *_DECODER,
        ("stage1_output_decode.*", "stage1_output_decode.*"),
        ("stage2_output_decode.*", "stage2_output_decode.*"),
        ("head.0.*", "probe.*"),
        ("head.1.*", "encoder.head.*"),
        ("**", "encoder.**"),
    ),
    arrange=(fold_batch_norm,),
)

_SIMMIM = Names(
    ("encoder.mask_token", "mask_token"),
    ("decoder.*.*", "head.*.*"),
    ("encoder.**", "encoder.**"),
)

SIMMIM_SWIN = Source(
    "SimMIM on Swin (official code)",
    "swin",
    ("encoder.mask_token", "encoder.layers.0.blocks.0.attn.relative_position_bias_table"),
    _SIMMIM,
    unused=COMPUTED,
    arrange=(move_downsampling,),
)

SIMMIM_VIT = Source(
    "SimMIM on ViT (official code)",
    "beit",
    ("encoder.mask_token", "encoder.blocks.0.norm1.weight"),
    _SIMMIM,
    unused=COMPUTED,
)

SWIN = Source(
    "Swin (official code; SimMIM's, fine-tuned)",
    "swin",
    ("layers.0.blocks.0.attn.relative_position_bias_table", "layers.0.downsample.reduction.weight"),
    Names(("head.*", "encoder.head.fc.*"), ("**", "encoder.**")),
    unused=(*COMPUTED, ("mask_token", "of pre-training")),
    arrange=(move_downsampling,),
)
