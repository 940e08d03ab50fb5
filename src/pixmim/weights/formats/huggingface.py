"""Hugging Face's names: ViTMAE, ViT, Swin and Beit of transformers."""

from pixmim.weights.format import COMPUTED, CheckpointFormat, rows
from pixmim.weights.key_map import KeyMap
from pixmim.weights.tensor_ops import (
    drop_key_bias,
    fuse_qkv,
    move_downsampling,
    move_downsampling_back,
    split_qkv,
)

_SHARED = (
    ("layernorm_before.*", "norm1.*"),
    ("layernorm_after.*", "norm2.*"),
    ("intermediate.dense.*", "mlp.fc1.*"),
    ("output.dense.*", "mlp.fc2.*"),
    ("attention.output.dense.*", "attn.proj.*"),
)
_BLOCK = (
    *_SHARED,
    ("attention.attention.query.*", "attn.q.*"),
    ("attention.attention.key.*", "attn.k.*"),
    ("attention.attention.value.*", "attn.v.*"),
)
_LIVE_BLOCK = (  # what transformers 5 calls them in memory, and in files of a bare state_dict
    ("attention.q_proj.*", "attn.q.*"),
    ("attention.k_proj.*", "attn.k.*"),
    ("attention.v_proj.*", "attn.v.*"),
    ("attention.o_proj.*", "attn.proj.*"),
    ("mlp.*.*", "mlp.*.*"),
    ("layernorm_before.*", "norm1.*"),
    ("layernorm_after.*", "norm2.*"),
)
_SWIN_BLOCK = (
    *_SHARED,
    ("attention.self.query.*", "attn.q.*"),
    ("attention.self.key.*", "attn.k.*"),
    ("attention.self.value.*", "attn.v.*"),
    ("attention.self.relative_position_bias_table", "attn.relative_position_bias_table"),
)


def _vit(prefix: str) -> CheckpointFormat:
    """ViTMAE, and ViT plain or for masked images (which is SimMIM's); their bodies alone have no prefix."""
    return CheckpointFormat(
        "Hugging Face ViTMAE or ViT",
        "vit",
        (f"{prefix}embeddings.cls_token", f"{prefix}embeddings.patch_embeddings.projection.weight"),
        KeyMap(
            (f"{prefix}embeddings.cls_token", "encoder.cls_token"),
            (f"{prefix}embeddings.mask_token", "mask_token"),
            (f"{prefix}embeddings.position_embeddings", "encoder.pos_embed"),
            (f"{prefix}embeddings.patch_embeddings.projection.*", "encoder.patch_embed.proj.*"),
            *rows(f"{prefix}encoder.layer.*", "encoder.blocks.*", _BLOCK),
            *rows(f"{prefix}layers.*", "encoder.blocks.*", _LIVE_BLOCK),
            (f"{prefix}layernorm.*", "encoder.norm.*"),
            ("classifier.*", "encoder.head.*"),
            ("decoder.mask_token", "decoder.mask_token"),
            ("decoder.decoder_embed.*", "decoder.embed.*"),
            ("decoder.decoder_pos_embed", "decoder.pos_embed"),
            *rows("decoder.decoder_layers.*", "decoder.blocks.*", _BLOCK + _LIVE_BLOCK),
            *rows("decoder.decoder_encoder.layer.*", "decoder.blocks.*", _BLOCK),  # as transformers 5.23 saves them
            ("decoder.decoder_norm.*", "decoder.norm.*"),
            ("decoder.decoder_pred.*", "decoder.predict.*"),
            ("decoder.*.*", "head.*.*"),
        ),
        unused=((f"{prefix}pooler.*", "a layer over the class token that pre-training does not have"),),
        arrange=(fuse_qkv,),
        restore=(split_qkv,),
    )


HF_VIT, HF_VIT_BODY = _vit("vit."), _vit("")


def _swin(prefix: str) -> CheckpointFormat:
    return CheckpointFormat(
        "Hugging Face Swin",
        "swin",
        (f"{prefix}embeddings.norm.weight", f"{prefix}embeddings.patch_embeddings.projection.weight"),
        KeyMap(
            (f"{prefix}embeddings.mask_token", "mask_token"),
            (f"{prefix}embeddings.patch_embeddings.projection.*", "encoder.patch_embed.proj.*"),
            (f"{prefix}embeddings.norm.*", "encoder.patch_embed.norm.*"),
            *rows(f"{prefix}encoder.layers.*.blocks.*", "encoder.layers.*.blocks.*", _SWIN_BLOCK),
            (f"{prefix}encoder.layers.*.downsample.**", "encoder.layers.*.downsample.**"),
            (f"{prefix}layernorm.*", "encoder.norm.*"),
            ("classifier.*", "encoder.head.fc.*"),
            ("decoder.*.*", "head.*.*"),
        ),
        unused=COMPUTED,
        arrange=(fuse_qkv, move_downsampling),
        restore=(split_qkv, move_downsampling_back),
    )


HF_SWIN, HF_SWIN_BODY = _swin("swin."), _swin("")


def _beit(prefix: str) -> CheckpointFormat:
    return CheckpointFormat(
        "Hugging Face Beit",
        "beit",
        (f"{prefix}encoder.layer.0.lambda_1", f"{prefix}embeddings.patch_embeddings.projection.weight"),
        KeyMap(
            (f"{prefix}embeddings.cls_token", "encoder.cls_token"),
            (f"{prefix}embeddings.position_embeddings", "encoder.pos_embed"),
            (f"{prefix}embeddings.patch_embeddings.projection.*", "encoder.patch_embed.proj.*"),
            (f"{prefix}encoder.layer.*.lambda_1", "encoder.blocks.*.gamma_1"),
            (f"{prefix}encoder.layer.*.lambda_2", "encoder.blocks.*.gamma_2"),
            (f"{prefix}encoder.layer.*.attention.attention.query.bias", "encoder.blocks.*.attn.q_bias"),
            (f"{prefix}encoder.layer.*.attention.attention.value.bias", "encoder.blocks.*.attn.v_bias"),
            (
                f"{prefix}encoder.layer.*.attention.attention.relative_position_bias.relative_position_bias_table",
                "encoder.blocks.*.attn.relative_position_bias_table",
            ),
            *rows(f"{prefix}encoder.layer.*", "encoder.blocks.*", _BLOCK),
            (f"{prefix}encoder.relative_position_bias.*", "encoder.rel_pos_bias.*"),
            (f"{prefix}layernorm.*", "encoder.norm.*"),
            (f"{prefix}pooler.layernorm.*", "encoder.fc_norm.*"),
            ("classifier.*", "encoder.head.*"),
        ),
        unused=(*COMPUTED, ("*embeddings.mask_token", "of pre-training on visual words")),
        arrange=(fuse_qkv,),
        restore=(split_qkv, drop_key_bias),
    )


HF_BEIT, HF_BEIT_BODY = _beit("beit."), _beit("")
