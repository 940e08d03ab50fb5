"""Columns of a file of features."""

import numpy as np

from pixmim.data import open_dataset
from pixmim.data.dataset import DatasetWrapper
from pixmim.evaluation.embed import file_columns


def test_an_image_without_a_class_has_none_in_the_table() -> None:
    data = open_dataset("shapes:count=4,size=16")
    assert isinstance(data.labels, np.ndarray)

    class Unlabeled(DatasetWrapper):
        labels = np.asarray([0, -1, 2, -1])

    columns = file_columns(Unlabeled(data), [3, 2, 1])
    assert columns == {"file": [data.path_of(i) for i in (3, 2, 1)], "class": ["", data.classes[2], ""]}
