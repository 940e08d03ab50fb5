"""Columns of a file of features, and features that mean nothing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pixmim.build import build_model
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import DatasetWrapper
from pixmim.evaluation.embed import embed_batches, file_columns
from pixmim.evaluation.frozen_encoder import wrap_live_encoder
from pixmim.utils.errors import UserError


def test_features_that_are_not_finite_are_refused(tiny_run: Callable[..., PretrainConfig]) -> None:
    module = build_model(tiny_run()).encoder
    encoder = wrap_live_encoder(tiny_run(), module, torch.device("cpu"), "fp32")
    data = open_dataset("shapes:count=4,size=32")
    assert len(list(embed_batches(encoder, data, BadImageLog(None, 4, 1.0), 2))) == 2
    module.norm.bias.data[3] = torch.inf  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match=r"the features of shapes:.* are not finite for 2 of 2 images"):
        list(embed_batches(encoder, data, BadImageLog(None, 4, 1.0), 2))


def test_an_image_without_a_class_has_none_in_the_table() -> None:
    data = open_dataset("shapes:count=4,size=16")
    assert isinstance(data.labels, np.ndarray)

    class Unlabeled(DatasetWrapper):
        labels = np.asarray([0, -1, 2, -1])

    columns = file_columns(Unlabeled(data), [3, 2, 1])
    assert columns == {"file": [data.path_of(i) for i in (3, 2, 1)], "class": ["", data.classes[2], ""]}
