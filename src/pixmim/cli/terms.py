"""What the commands share: whole paths of data."""


def absolute(data: str) -> str:
    """Whole paths instead of relative ones, so that a run finds its data from wherever it is resumed or reported on."""
    from pixmim.data.spec import absolute as whole

    return whole(data)
