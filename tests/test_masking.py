import pytest
import torch

from pixmim.masking import Mask, RandomMask


@pytest.mark.parametrize(("patches", "visible"), [(196, 49), (256, 64), (784, 196), (36, 9)])
def test_random_mask_keeps_the_published_counts(patches: int, visible: int) -> None:
    mask = RandomMask(0.75)(5, patches)
    assert mask.keep.shape == (5, visible)
    assert ((~mask.hidden).sum(dim=1) == visible).all()


def test_tables_agree_with_hidden() -> None:
    mask = RandomMask(0.6)(3, 20)
    tokens = torch.arange(20).expand(3, -1)
    for row in range(3):
        seen = tokens[row][~mask.hidden[row]]
        assert torch.equal(tokens[row][mask.keep[row]], seen)
        rebuilt = torch.cat([seen, tokens[row][mask.hidden[row]]])[mask.restore[row]]
        assert torch.equal(rebuilt, tokens[row])


def test_from_hidden_gives_the_same_mask() -> None:
    mask = RandomMask(0.75)(4, 16)
    again = Mask.from_hidden(mask.hidden)
    assert torch.equal(again.keep, mask.keep) and torch.equal(again.restore, mask.restore)


def test_every_patch_is_hidden_as_often() -> None:
    hidden = RandomMask(0.75)(4000, 16, torch.Generator().manual_seed(1)).hidden
    assert (hidden.float().mean(dim=0) - 0.75).abs().max() < 0.03  # four standard errors


def test_the_generator_decides() -> None:
    one, two = (RandomMask()(2, 64, torch.Generator().manual_seed(3)).hidden for _ in range(2))
    assert torch.equal(one, two)


def test_masks_that_hide_nothing_everything_or_unevenly_are_refused() -> None:
    with pytest.raises(ValueError, match="same number"):
        Mask.from_hidden(torch.tensor([[True, False, False], [True, True, False]]))
    with pytest.raises(ValueError, match="leave some"):
        Mask.from_hidden(torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 visible"):
        RandomMask(0.9)(1, 4)
    with pytest.raises(ValueError, match="between 0 and 1"):
        RandomMask(1.0)
