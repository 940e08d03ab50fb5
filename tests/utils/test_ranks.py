import torch

from pixmim.utils.ranks import inverse, ranks


def test_ranks_are_those_of_a_stable_sort() -> None:
    ties = torch.randint(-3, 4, (50, 40)).float() / 4
    signed_zeros = torch.where(torch.rand(50, 40) < 0.5, 0.0, -0.0)
    extremes = torch.tensor([[float("inf"), -1e-45, 0.0, 1e-45, -float("inf"), 3.4e38, -3.4e38, -0.0]])
    for values in (ties, signed_zeros, ties + signed_zeros, torch.randn(50, 196), extremes):
        for row, found in zip(values.tolist(), ranks(values), strict=True):
            order = sorted(range(len(row)), key=row.__getitem__)  # Python's sort is stable
            assert [found[index] for index in order] == list(range(len(row)))
        assert torch.equal(ranks(values), ranks(values.double()))


def test_the_inverse_of_a_permutation_undoes_it() -> None:
    order = torch.stack([torch.randperm(30) for _ in range(4)])
    assert torch.equal(order.gather(1, inverse(order)), torch.arange(30).expand(4, -1))
