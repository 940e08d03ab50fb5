"""Checkpoint formats of other projects: one literal tuple, `FORMATS`, of key tables."""

from dataclasses import replace

from pixmim.weights.key_map import (
    CheckpointFormat,
    KeyMap,
    add_final_norm,
    downsampling_to_next_stage,
    downsampling_to_previous_stage,
    drop_key_bias,
    fold_batch_norm,
    fuse_qkv,
    join_class_tokens,
    reorder_merged_patches,
    split_class_tokens,
    split_qkv,
)

COMPUTED = (
    ("*relative_position_index", "computed when the model is built"),
    ("*attn_mask", "computed when the model is built"),
)
"""Buffers in the files of older code."""

_PRETRAINING_TOKEN = ("mask_token", "used in pre-training only")


def _rows(other: str, own: str, *pairs: tuple[str, str]) -> list[tuple[str, str]]:
    """Prepend the prefixes of a block to a table of its parts."""
    return [(f"{other}.{a}", f"{own}.{b}") for a, b in pairs]


# ---- the methods' own code: MAE and LSMAE, ConvMAE, SimMIM

_MAE_DECODER = (
    ("mask_token", "decoder.mask_token"),
    ("decoder_embed.*", "decoder.embed.*"),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_blocks.**", "decoder.blocks.**"),
    ("decoder_norm.*", "decoder.norm.*"),
    ("decoder_pred.*", "decoder.predict.*"),
)

MAE = CheckpointFormat(
    "MAE or Pixio (official code)",
    "vit",
    ("decoder_embed.weight", "patch_embed.proj.weight"),
    KeyMap(
        *_MAE_DECODER,
        ("decoder_downsample.*", "decoder.downsample.*"),  # this and the next: options of LSMAE
        ("decoder_upsample.*", "decoder.upsample.*"),
        ("**", "encoder.**"),
    ),
    transforms=(fuse_qkv, split_class_tokens),
)

CROSSMAE = CheckpointFormat(
    "CrossMAE (official code)",
    "vit",
    ("wfm.linear.weight", "decoder_blocks.0.cross_attn.q.weight"),
    KeyMap(
        ("wfm.linear.*", "decoder.mix.*"),
        ("dec_norms.*.*", "decoder.blocks.*.context_norm.*"),
        *((f"decoder_blocks.*.cross_attn.{part}.*", f"decoder.blocks.*.{part}.*") for part in ("q", "kv", "proj")),
        *_MAE_DECODER,
        ("**", "encoder.**"),
    ),
    transforms=(add_final_norm,),
)

CONVMAE = CheckpointFormat(
    "ConvMAE (official code)",
    "convmae",
    ("patch_embed1.proj.weight", "blocks1.0.conv1.weight"),
    KeyMap(
        *_MAE_DECODER,
        ("stage1_output_decode.*", "stage1_output_decode.*"),
        ("stage2_output_decode.*", "stage2_output_decode.*"),
        ("head.0.*", "probe.*"),
        ("head.1.*", "encoder.head.*"),
        ("**", "encoder.**"),
    ),
    transforms=(fold_batch_norm,),
)

_SIMMIM = KeyMap(("encoder.mask_token", "mask_token"), ("decoder.*.*", "head.*.*"), ("encoder.**", "encoder.**"))

SIMMIM_SWIN = CheckpointFormat(
    "SimMIM on Swin (official code)",
    "swin",
    ("encoder.mask_token", "encoder.layers.0.blocks.0.attn.relative_position_bias_table"),
    _SIMMIM,
    ignored=COMPUTED,
    transforms=(downsampling_to_next_stage,),
)

SIMMIM_VIT = CheckpointFormat(
    "SimMIM on ViT (official code)",
    "beit",
    ("encoder.mask_token", "encoder.blocks.0.norm1.weight"),
    _SIMMIM,
    ignored=COMPUTED,
)

SWIN = CheckpointFormat(
    "Swin (official code, or SimMIM fine-tuned)",
    "swin",
    ("layers.0.blocks.0.attn.relative_position_bias_table", "layers.0.downsample.reduction.weight"),
    KeyMap(("head.*", "encoder.head.fc.*"), ("**", "encoder.**")),
    ignored=(*COMPUTED, _PRETRAINING_TOKEN),
    transforms=(downsampling_to_next_stage,),
)

# ---- timm, whose keys are pixmim's for an encoder, and MAE's for an encoder alone or fine-tuned

TIMM_VIT = CheckpointFormat(
    "timm's ViT (or MAE, Pixio: encoder alone, or fine-tuned)",
    "vit",
    ("blocks.0.norm1.weight", "patch_embed.proj.weight"),
    KeyMap(
        ("head.0.*", "probe.*"),  # MAE's linear probe: a BatchNorm before the head
        ("head.1.*", "encoder.head.*"),
        ("**", "encoder.**"),
    ),
    transforms=(fuse_qkv, split_class_tokens, fold_batch_norm),
)

TIMM_SWIN = CheckpointFormat(
    "timm's Swin",
    "swin",
    ("layers.0.blocks.0.attn.relative_position_bias_table", "layers.1.downsample.reduction.weight"),
    KeyMap(("**", "encoder.**")),
    ignored=COMPUTED,
)

TIMM_BEIT = CheckpointFormat(
    "timm's Beit (or SimMIM on ViT, fine-tuned)",
    "beit",
    ("blocks.0.attn.q_bias", "blocks.0.gamma_1"),
    KeyMap(("**", "encoder.**")),
    ignored=(*COMPUTED, _PRETRAINING_TOKEN),
)

TIMM_ANY = CheckpointFormat("timm", "vit", (), KeyMap(("**", "encoder.**")), ignored=COMPUTED)
"""Any model in a folder with timm's config.json, which names the architecture."""

# ---- mmselfsup and mmpretrain, with which PixMIM's own models were trained

_MM_BLOCK = (
    ("ln1.*", "norm1.*"),
    ("ln2.*", "norm2.*"),
    ("ffn.layers.0.0.*", "mlp.fc1.*"),
    ("ffn.layers.1.*", "mlp.fc2.*"),
    ("attn.**", "attn.**"),
)


def _mm_vit(prefix: str) -> CheckpointFormat:
    """A complete model, or without prefix a backbone alone, as MMSegmentation takes it."""
    return CheckpointFormat(
        "mmselfsup or mmpretrain",
        "vit",
        (f"{prefix}layers.0.ln1.weight", f"{prefix}patch_embed.projection.weight"),
        KeyMap(
            (f"{prefix}cls_token", "encoder.cls_token"),
            (f"{prefix}pos_embed", "encoder.pos_embed"),
            (f"{prefix}patch_embed.projection.*", "encoder.patch_embed.proj.*"),
            *_rows(f"{prefix}layers.*", "encoder.blocks.*", *_MM_BLOCK),
            (f"{prefix}ln1.*", "encoder.norm.*"),
            (f"{prefix}ln2.*", "encoder.fc_norm.*"),
            (f"{prefix}proj_layers.*.*", "fusion.projections.*.*"),  # this and the next: MFF
            (f"{prefix}proj_weights", "fusion.weights"),
            ("neck.mask_token", "decoder.mask_token"),
            ("neck.decoder_embed.*", "decoder.embed.*"),
            ("neck.decoder_pos_embed", "decoder.pos_embed"),
            *_rows("neck.decoder_blocks.*", "decoder.blocks.*", *_MM_BLOCK),
            ("neck.ln1.*", "decoder.norm.*"),
            ("neck.decoder_pred.*", "decoder.predict.*"),
            ("neck.bn.*", "probe.*"),
            ("head.fc.*", "encoder.head.*"),
            ("head.layers.head.*", "encoder.head.*"),
            (f"{prefix}fc_norm.*", "encoder.fc_norm.*"),  # this and the next two: mmselfsup 0
            ("head.head.*", "encoder.head.*"),
            ("head.bn.*", "probe.*"),
        ),
        ignored=(
            ("target_generator.low_pass_filter", "PixMIM's filter, which is recomputed"),
            ("data_preprocessor.*", "belongs to the data loader"),
        ),
        transforms=(fold_batch_norm,),
    )


def _mm_swin(prefix: str) -> CheckpointFormat:
    """SimMIM or a classifier, or without prefix a backbone alone."""
    return CheckpointFormat(
        "mmselfsup or mmpretrain (Swin)",
        "swin",
        (f"{prefix}stages.0.blocks.0.attn.w_msa.qkv.weight", f"{prefix}patch_embed.projection.weight"),
        KeyMap(
            (f"{prefix}mask_token", "mask_token"),
            (f"{prefix}patch_embed.projection.*", "encoder.patch_embed.proj.*"),
            (f"{prefix}patch_embed.norm.*", "encoder.patch_embed.norm.*"),
            *_rows(
                f"{prefix}stages.*.blocks.*",
                "encoder.layers.*.blocks.*",
                ("attn.w_msa.**", "attn.**"),
                ("ffn.layers.0.0.*", "mlp.fc1.*"),
                ("ffn.layers.1.*", "mlp.fc2.*"),
                ("norm*.*", "norm*.*"),
            ),
            (f"{prefix}stages.*.downsample.**", "encoder.layers.*.downsample.**"),
            (f"{prefix}norm3.*", "encoder.norm.*"),
            ("neck.decoder.*.*", "head.*.*"),
            ("head.fc.*", "encoder.head.fc.*"),
        ),
        ignored=(*COMPUTED, ("data_preprocessor.*", "belongs to the data loader")),
        transforms=(downsampling_to_next_stage, reorder_merged_patches),
    )


# ---- CNNs: timm (ResNet: torchvision too), and A2MIM's OpenMixup, whose keys are mmpretrain's

TIMM_RESNET = CheckpointFormat(
    "timm's or torchvision's ResNet",
    "resnet",
    ("conv1.weight", "layer1.0.conv1.weight", "layer4.0.bn1.running_mean"),
    KeyMap(("**", "encoder.**")),
    ignored=(("mask_*", "used in pre-training only"),),  # of A2MIM, whose tool extracts the backbone
)

TIMM_CONVNEXT = CheckpointFormat(
    "timm's ConvNeXt",
    "convnext",
    ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
    KeyMap(("**", "encoder.**")),
)

_MM_CNN = (
    ("backbone.mask_token", "mask_token"),
    ("backbone.mask_gamma", "mask_scale"),
    ("neck.decoder_pred.*.*", "head.*.*"),
    ("neck.decoder.*.*", "head.*.*"),  # SimMIM's
)
_MM_CNN_IGNORED = (
    ("ema_*", "a moving average of the training"),
    ("data_preprocessor.*", "belongs to the data loader"),
)

MM_RESNET = CheckpointFormat(
    "OpenMixup (A2MIM) or mmpretrain, ResNet",
    "resnet",
    ("backbone.conv1.weight", "backbone.layer1.0.conv1.weight"),
    KeyMap(*_MM_CNN, ("head.fc.*", "encoder.fc.*"), ("backbone.**", "encoder.**")),
    ignored=_MM_CNN_IGNORED,
)


def _mm_convnext(prefix: str) -> CheckpointFormat:
    """A complete model, or without prefix a backbone alone, as A2MIM's tool extracts it."""
    return CheckpointFormat(
        "OpenMixup (A2MIM) or mmpretrain, ConvNeXt",
        "convnext",
        (f"{prefix}downsample_layers.0.0.weight", f"{prefix}stages.0.0.depthwise_conv.weight"),
        KeyMap(
            *_MM_CNN,
            (f"{prefix}downsample_layers.0.*.*", "encoder.stem.*.*"),
            (f"{prefix}downsample_layers.*.*.*", "encoder.stages.*.downsample.*.*"),
            *_rows(
                f"{prefix}stages.*.*",
                "encoder.stages.*.blocks.*",
                ("depthwise_conv.*", "conv_dw.*"),
                ("norm.*", "norm.*"),
                ("pointwise_conv1.*", "mlp.fc1.*"),
                ("pointwise_conv2.*", "mlp.fc2.*"),
                ("gamma", "gamma"),
            ),
            (f"{prefix}norm3.*", "encoder.head.norm.*"),
            ("head.fc.*", "encoder.head.fc.*"),
        ),
        ignored=(*_MM_CNN_IGNORED, ("mask_*", "used in pre-training only")),
    )


MM_CONVNEXT, MM_CONVNEXT_BODY = _mm_convnext("backbone."), _mm_convnext("")

# ---- transformers of Hugging Face

_HF_NORMS = (("layernorm_before.*", "norm1.*"), ("layernorm_after.*", "norm2.*"))
_HF_MLP = (
    ("intermediate.dense.*", "mlp.fc1.*"),
    ("output.dense.*", "mlp.fc2.*"),
    ("attention.output.dense.*", "attn.proj.*"),
)
_HF_BLOCK = (
    *_HF_NORMS,
    *_HF_MLP,
    ("attention.attention.query.*", "attn.q.*"),
    ("attention.attention.key.*", "attn.k.*"),
    ("attention.attention.value.*", "attn.v.*"),
)
_HF_BLOCK_IN_MEMORY = (  # transformers 5's names in memory, and in files of a bare state_dict
    *_HF_NORMS,
    ("attention.q_proj.*", "attn.q.*"),
    ("attention.k_proj.*", "attn.k.*"),
    ("attention.v_proj.*", "attn.v.*"),
    ("attention.o_proj.*", "attn.proj.*"),
    ("mlp.*.*", "mlp.*.*"),
)
_HF_SWIN_BLOCK = (
    *_HF_NORMS,
    *_HF_MLP,
    ("attention.self.query.*", "attn.q.*"),
    ("attention.self.key.*", "attn.k.*"),
    ("attention.self.value.*", "attn.v.*"),
    ("attention.self.relative_position_bias_table", "attn.relative_position_bias_table"),
)


def _hf_vit(prefix: str, norms: tuple[tuple[str, str], ...] = _HF_NORMS) -> CheckpointFormat:
    """ViTMAE, and ViT plain or for masked images (SimMIM's); without prefix their body alone. Pixio has other norms."""
    return CheckpointFormat(
        "Hugging Face ViTMAE or ViT",
        "vit",
        (f"{prefix}embeddings.cls_token", f"{prefix}embeddings.patch_embeddings.projection.weight"),
        KeyMap(
            (f"{prefix}embeddings.cls_token", "encoder.cls_token"),
            (f"{prefix}embeddings.mask_token", "mask_token"),
            (f"{prefix}embeddings.position_embeddings", "encoder.pos_embed"),
            (f"{prefix}embeddings.patch_embeddings.projection.*", "encoder.patch_embed.proj.*"),
            *_rows(f"{prefix}encoder.layer.*", "encoder.blocks.*", *norms, *_HF_BLOCK),
            *_rows(f"{prefix}layers.*", "encoder.blocks.*", *_HF_BLOCK_IN_MEMORY),
            (f"{prefix}layernorm.*", "encoder.norm.*"),
            ("classifier.*", "encoder.head.*"),
            ("decoder.mask_token", "decoder.mask_token"),
            ("decoder.decoder_embed.*", "decoder.embed.*"),
            ("decoder.decoder_pos_embed", "decoder.pos_embed"),
            *_rows("decoder.decoder_layers.*", "decoder.blocks.*", *_HF_BLOCK, *_HF_BLOCK_IN_MEMORY),
            *_rows("decoder.decoder_encoder.layer.*", "decoder.blocks.*", *_HF_BLOCK),  # saved by transformers 5.23
            ("decoder.decoder_norm.*", "decoder.norm.*"),
            ("decoder.decoder_pred.*", "decoder.predict.*"),
            ("decoder.*.*", "head.*.*"),
        ),
        ignored=((f"{prefix}pooler.*", "a layer over the class token that pre-training does not have"),),
        transforms=(fuse_qkv, split_class_tokens),
        inverse=(split_qkv, join_class_tokens),
    )


def _hf_swin(prefix: str) -> CheckpointFormat:
    return CheckpointFormat(
        "Hugging Face Swin",
        "swin",
        (f"{prefix}embeddings.norm.weight", f"{prefix}embeddings.patch_embeddings.projection.weight"),
        KeyMap(
            (f"{prefix}embeddings.mask_token", "mask_token"),
            (f"{prefix}embeddings.patch_embeddings.projection.*", "encoder.patch_embed.proj.*"),
            (f"{prefix}embeddings.norm.*", "encoder.patch_embed.norm.*"),
            *_rows(f"{prefix}encoder.layers.*.blocks.*", "encoder.layers.*.blocks.*", *_HF_SWIN_BLOCK),
            (f"{prefix}encoder.layers.*.downsample.**", "encoder.layers.*.downsample.**"),
            (f"{prefix}layernorm.*", "encoder.norm.*"),
            ("classifier.*", "encoder.head.fc.*"),
            ("decoder.*.*", "head.*.*"),
        ),
        ignored=COMPUTED,
        transforms=(fuse_qkv, downsampling_to_next_stage),
        inverse=(split_qkv, downsampling_to_previous_stage),
    )


def _hf_beit(prefix: str) -> CheckpointFormat:
    return CheckpointFormat(
        "Hugging Face Beit",
        "beit",
        (f"{prefix}encoder.layer.0.lambda_1", f"{prefix}embeddings.patch_embeddings.projection.weight"),
        KeyMap(
            (f"{prefix}embeddings.cls_token", "encoder.cls_token"),
            (f"{prefix}embeddings.position_embeddings", "encoder.pos_embed"),
            (f"{prefix}embeddings.patch_embeddings.projection.*", "encoder.patch_embed.proj.*"),
            *_rows(
                f"{prefix}encoder.layer.*",
                "encoder.blocks.*",
                ("lambda_1", "gamma_1"),
                ("lambda_2", "gamma_2"),
                ("attention.attention.query.bias", "attn.q_bias"),
                ("attention.attention.value.bias", "attn.v_bias"),
                (
                    "attention.attention.relative_position_bias.relative_position_bias_table",
                    "attn.relative_position_bias_table",
                ),
                *_HF_BLOCK,
            ),
            (f"{prefix}encoder.relative_position_bias.*", "encoder.rel_pos_bias.*"),
            (f"{prefix}layernorm.*", "encoder.norm.*"),
            (f"{prefix}pooler.layernorm.*", "encoder.fc_norm.*"),
            ("classifier.*", "encoder.head.*"),
        ),
        ignored=(*COMPUTED, ("*embeddings.mask_token", "used in pre-training on visual words only")),
        transforms=(fuse_qkv,),
        inverse=(split_qkv, drop_key_bias),
    )


MM, MM_BODY = _mm_vit("backbone."), _mm_vit("")
MM_SWIN, MM_SWIN_BODY = _mm_swin("backbone."), _mm_swin("")
HF_VIT, HF_VIT_BODY = _hf_vit("vit."), _hf_vit("")
HF_PIXIO = replace(
    _hf_vit("", (("norm1.*", "norm1.*"), ("norm2.*", "norm2.*"))),
    name="Hugging Face Pixio",
    required=("embeddings.cls_token", "encoder.layer.0.norm1.weight"),
)
HF_SWIN, HF_SWIN_BODY = _hf_swin("swin."), _hf_swin("")
HF_BEIT, HF_BEIT_BODY = _hf_beit("beit."), _hf_beit("")

FORMATS = (
    *(CROSSMAE, MAE, CONVMAE, SIMMIM_SWIN, SIMMIM_VIT, SWIN, TIMM_SWIN, TIMM_BEIT, MM, MM_BODY, MM_SWIN, MM_SWIN_BODY),
    *(HF_VIT, HF_BEIT, HF_BEIT_BODY),  # HF_BEIT_BODY has the keys that identify HF_VIT_BODY too, so it comes first
    *(HF_PIXIO, HF_VIT_BODY, HF_SWIN, HF_SWIN_BODY, TIMM_VIT),
    *(MM_RESNET, MM_CONVNEXT, MM_CONVNEXT_BODY, TIMM_RESNET, TIMM_CONVNEXT),
)
"""Formats in the order in which they are tried."""
