"""The projects whose files pixmim reads. One literal tuple of them."""

from collections.abc import Collection

from pixmim.weights.huggingface import HF_BEIT, HF_SWIN, HF_SWIN_BODY, HF_VIT, HF_VIT_BODY
from pixmim.weights.official import CONVMAE, MAE, SIMMIM_SWIN, SIMMIM_VIT, SWIN
from pixmim.weights.openmmlab import MM, MM_BODY
from pixmim.weights.source import Source
from pixmim.weights.timm import BEIT, TIMM_SWIN, TIMM_VIT

SOURCES = (
    MAE,
    CONVMAE,
    SIMMIM_SWIN,
    SIMMIM_VIT,
    SWIN,
    TIMM_SWIN,
    BEIT,
    MM,
    MM_BODY,
    HF_VIT,
    HF_BEIT,  # before the body of a ViT, whose marks it has as well
    HF_VIT_BODY,
    HF_SWIN,
    HF_SWIN_BODY,
    TIMM_VIT,
)


def source_of(keys: Collection[str]) -> Source | None:
    """The first source all of whose marks are among the keys, or None."""
    return next((source for source in SOURCES if all(mark in keys for mark in source.marks)), None)
