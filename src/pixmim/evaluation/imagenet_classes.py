"""ImageNet's thousand classes, and those parts of them that its relatives are labeled with."""

from importlib.resources import files


def _spans(*spans: tuple[int, int]) -> tuple[int, ...]:
    """All numbers from the first to the last of each pair."""
    return tuple(number for first, last in spans for number in range(first, last + 1))


CATEGORIES: dict[str, tuple[int, ...]] = {
    "airplane": (404,),
    "bear": _spans((294, 297)),
    "bicycle": (444, 671),
    "bird": _spans((8, 8), (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100), (127, 133), (135, 145)),
    "boat": (472, 554, 625, 814, 914),
    "bottle": (440, 720, 737, 898, 899, 901, 907),
    "car": (436, 511, 817),
    "cat": _spans((281, 286)),
    "chair": (423, 559, 765, 857),
    "clock": (409, 530, 892),
    "dog": _spans(
        (152, 191), (193, 203), (205, 226), (228, 241), (243, 250), (252, 257), (259, 259), (261, 263), (265, 268)
    ),
    "elephant": (385, 386),
    "keyboard": (508, 878),
    "knife": (499,),
    "oven": (766,),
    "truck": (555, 569, 656, 675, 717, 734, 864, 867),
}
"""The 16 categories of the cue-conflict stimuli (arXiv 1811.12231), each with its classes of ImageNet."""


def wnids() -> list[str]:
    """The WordNet ids of the thousand classes, in the order of a classifier's outputs, which is theirs sorted."""
    return _info("imagenet_synsets.txt")


def part(name: str) -> list[str]:
    """The WordNet ids of the 200 classes of ImageNet-A ("a") or -R ("r"), sorted as their labels count them."""
    every = wnids()
    return [every[int(index)] for index in _info(f"imagenet_{name}_indices.txt")]


def _info(name: str) -> list[str]:
    return files("timm.data").joinpath("_info", name).read_text().split()
