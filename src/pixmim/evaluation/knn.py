"""k-NN on frozen features, as DINO does it (arXiv 2104.14294, appendix; also used by DINOv2)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluation.classification import majority, open_labelled, rated, tally
from pixmim.evaluation.context import Bench, Values
from pixmim.evaluation.features import Frozen, same_classes
from pixmim.evaluation.settings import Knn
from pixmim.utils.console import say
from pixmim.utils.errors import UserError

DEFAULT = (1, 20)
"""Numbers of neighbours that vote, each a measure of its own."""

ROWS, BLOCK = 1024, 16384
"""Asked features, and voters, that are compared at a time: 64 MiB of similarities, however many there are of each."""

CPU = torch.device("cpu")


def check(bench: Bench, settings: Knn) -> None:
    """Raise UserError now for data or settings that `measure` would refuse."""
    data = open_labelled(bench, settings.train, settings.test)
    usable(settings.k, len(data.train))


def measure(bench: Bench, settings: Knn) -> Values:
    """Top-1 accuracy on the test data: see `knn`. Raises UserError."""
    check(bench, settings)
    train = bench.frozen(settings.train)
    _, line = usable(settings.k, len(train.labels))
    if line and bench.console is not None:
        say(bench.console, line)
    yield from knn(train, bench.frozen(settings.test), settings.k, bench.encoder.device)


def usable(k: Sequence[int], voters: int) -> tuple[list[int], str]:
    """Return the k that so many voters allow, each once, and a warning about those that are larger.

    Raises:
        UserError: If there is no k, or one is less than 1.
    """
    if not k or min(k) < 1:
        raise UserError(f"--k takes numbers of neighbours from 1 on, such as 1 20, not {' '.join(map(str, k))}")
    large = [f"{each:,}" for each in k if each > voters]
    line = f"warning: k = {' and '.join(large)} exceeds the {voters:,} train images; measured with k = {voters:,}"
    return list(dict.fromkeys(min(each, voters) for each in k)), line if large else ""


def knn(train: Frozen, test: Frozen, k: Sequence[int] = DEFAULT, device: torch.device = CPU) -> Values:
    """How good k-NN is with the global token ("cls") and the mean of the patch tokens ("mean"), in per cent.

    Yields what `labelled.rated` does, as kK/FEATURE/..., and "majority". K is the number that voted: see `usable`.
    Raises UserError for a class that train lacks.
    """
    k, _ = usable(k, len(train.labels))
    wanted = same_classes(train, test)
    for name, voters, asked in (
        ("cls", train.vector[:, -1], test.vector[:, -1]),
        ("mean", train.mean, test.mean),
    ):
        answers = classify(voters, train.labels, asked, len(train.classes), k, device=device)
        for each, answer in answers.items():
            counts = tally(answer, wanted, len(train.classes))
            yield from rated(counts, train.classes, f"k{each}/{name}/")
    yield "majority", majority(counts)


def classify(
    voters: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    asked: Float[Tensor, "m d"],
    classes: int,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    rows: int = ROWS,
    block: int = BLOCK,
    device: torch.device = CPU,
) -> dict[int, Int[Tensor, " m"]]:
    """The class of each asked feature for each k: the k most similar voters vote with weight exp(cosine / temperature).

    Of classes with equal votes, the first wins; of voters that are equally similar at the k-th place, any one votes.
    k is cut to the number of voters. Each block of voters goes to the device once, and meets all who ask, `rows` at a
    time; beside the features themselves, memory holds block x (d + rows) values, and the max(k) best so far of each.
    """
    most = max(k)
    parts = asked.split(rows)
    best: list[tuple[Tensor, Tensor]] = [
        (torch.empty(len(part), 0, device=device), torch.empty(len(part), 0, dtype=torch.int64, device=device))
        for part in parts
    ]
    for some, theirs in zip(voters.split(block), labels.split(block), strict=True):
        some, theirs = F.normalize(some.to(device), dim=1), theirs.to(device)
        for i, part in enumerate(parts):
            near = (F.normalize(part.to(device), dim=1) @ some.T).topk(min(most, len(some)), dim=1)
            similar = torch.cat([best[i][0], near.values], dim=1)
            their_class = torch.cat([best[i][1], theirs[near.indices]], dim=1)
            similar, places = similar.topk(min(most, similar.shape[1]), dim=1)
            best[i] = similar, their_class.gather(1, places)
    answers: dict[int, list[Tensor]] = {each: [] for each in k}
    for similar, their_class in best:
        weight = (similar / temperature).exp()
        for each, found in answers.items():
            votes = torch.zeros(len(similar), classes, dtype=similar.dtype, device=device)
            votes.scatter_add_(1, their_class[:, :each], weight[:, :each])
            found.append(votes.argmax(dim=1).cpu())
    return {each: torch.cat(found) for each, found in answers.items()}
