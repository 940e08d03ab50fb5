"""The names of mmselfsup and mmpretrain, which PixMIM's own release was trained_at with."""

from pixmim.weights.format import COMPUTED, CheckpointFormat, rows
from pixmim.weights.key_map import KeyMap
from pixmim.weights.tensor_ops import fold_batch_norm, move_downsampling, order_merged

_MM_BLOCK = (
    ("ln1.*", "norm1.*"),
    ("ln2.*", "norm2.*"),
    ("ffn.layers.0.0.*", "mlp.fc1.*"),
    ("ffn.layers.1.*", "mlp.fc2.*"),
    ("attn.**", "attn.**"),
)


def _vit(prefix: str) -> CheckpointFormat:
    """A whole model, or with no prefix its backbone alone, as MMSegmentation takes it."""
    return CheckpointFormat(
        "mmselfsup or mmpretrain",
        "vit",
        (f"{prefix}layers.0.ln1.weight", f"{prefix}patch_embed.projection.weight"),
        KeyMap(
            (f"{prefix}cls_token", "encoder.cls_token"),
            (f"{prefix}pos_embed", "encoder.pos_embed"),
            (f"{prefix}patch_embed.projection.*", "encoder.patch_embed.proj.*"),
            *rows(f"{prefix}layers.*", "encoder.blocks.*", _MM_BLOCK),
            (f"{prefix}ln1.*", "encoder.norm.*"),
            (f"{prefix}ln2.*", "encoder.fc_norm.*"),
            ("neck.mask_token", "decoder.mask_token"),
            ("neck.decoder_embed.*", "decoder.embed.*"),
            ("neck.decoder_pos_embed", "decoder.pos_embed"),
            *rows("neck.decoder_blocks.*", "decoder.blocks.*", _MM_BLOCK),
            ("neck.ln1.*", "decoder.norm.*"),
            ("neck.decoder_pred.*", "decoder.predict.*"),
            ("neck.bn.*", "probe.*"),
            ("head.fc.*", "encoder.head.*"),
            ("head.layers.head.*", "encoder.head.*"),
            (f"{prefix}fc_norm.*", "encoder.fc_norm.*"),  # here and below, mmselfsup 0
            ("head.head.*", "encoder.head.*"),
            ("head.bn.*", "probe.*"),
        ),
        unused=(
            ("target_generator.low_pass_filter", "PixMIM's filter, computed anew"),
            ("data_preprocessor.*", "of the loader"),
        ),
        arrange=(fold_batch_norm,),
    )


MM, MM_BODY = _vit("backbone."), _vit("")


def _swin(prefix: str) -> CheckpointFormat:
    """SimMIM of mmselfsup and mmpretrain, classifiers, or with no prefix the backbone alone."""
    block = f"{prefix}stages.*.blocks.*"
    return CheckpointFormat(
        "mmselfsup or mmpretrain (Swin)",
        "swin",
        (f"{prefix}stages.0.blocks.0.attn.w_msa.qkv.weight", f"{prefix}patch_embed.projection.weight"),
        KeyMap(
            (f"{prefix}mask_token", "mask_token"),
            (f"{prefix}patch_embed.projection.*", "encoder.patch_embed.proj.*"),
            (f"{prefix}patch_embed.norm.*", "encoder.patch_embed.norm.*"),
            (f"{block}.attn.w_msa.**", "encoder.layers.*.blocks.*.attn.**"),
            (f"{block}.ffn.layers.0.0.*", "encoder.layers.*.blocks.*.mlp.fc1.*"),
            (f"{block}.ffn.layers.1.*", "encoder.layers.*.blocks.*.mlp.fc2.*"),
            (f"{block}.norm*.*", "encoder.layers.*.blocks.*.norm*.*"),
            (f"{prefix}stages.*.downsample.**", "encoder.layers.*.downsample.**"),
            (f"{prefix}norm3.*", "encoder.norm.*"),
            ("neck.decoder.*.*", "head.*.*"),
            ("head.fc.*", "encoder.head.fc.*"),
        ),
        unused=(*COMPUTED, ("data_preprocessor.*", "of the loader")),
        arrange=(move_downsampling, order_merged),
    )


MM_SWIN, MM_SWIN_BODY = _swin("backbone."), _swin("")
