"""k-NN on frozen features, as DINO does it (arXiv 2104.14294, appendix; also used by DINOv2)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluate.bench import Bench, Values
from pixmim.evaluate.features import Frozen, same_classes
from pixmim.metrics import wilson_interval
from pixmim.protocols import Knn

ROWS, BLOCK = 1024, 16384
"""Asked features, and voters, that are compared at a time: 64 MiB of similarities, however many there are of each."""

CPU = torch.device("cpu")


def measure(bench: Bench, settings: Knn) -> Values:
    """Top-1 accuracy on the test data: see `knn`. Raises UserError."""
    yield from knn(bench.frozen(settings.train), bench.frozen(settings.test), settings.k, bench.encoder.device)


def knn(train: Frozen, test: Frozen, k: int = 20, device: torch.device = CPU) -> Values:
    """Top-1 accuracy in per cent, of the global token ("cls") and of the mean of the patch tokens ("mean").

    Yields each feature's accuracy and the ends of its 95 % interval. Raises UserError for a class train lacks.
    """
    wanted = same_classes(train, test)
    for name, voters, asked in (
        ("cls", train.vector[:, -1], test.vector[:, -1]),
        ("mean", train.mean, test.mean),
    ):
        answers = classify(voters, train.labels, asked, len(train.classes), k, device=device)
        correct = int((answers == wanted).sum())
        low, high = wilson_interval(correct, len(wanted))
        yield f"top1/{name}", 100 * correct / len(wanted)
        yield f"top1/{name}/low", 100 * low
        yield f"top1/{name}/high", 100 * high


def classify(
    voters: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    asked: Float[Tensor, "m d"],
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    rows: int = ROWS,
    block: int = BLOCK,
    device: torch.device = CPU,
) -> Int[Tensor, " m"]:
    """The class of each asked feature: the k most cosine-similar voters vote with weight exp(similarity / temperature).

    Of classes with equal votes, the first wins; of voters that are equally similar at the k-th place, any one votes.
    k is cut to the number of voters. Each block of voters goes to the device once, and meets all who ask, `rows` at a
    time; beside the features themselves, memory holds block x (d + rows) values, and the k best so far of each.
    """
    parts = asked.split(rows)
    best: list[tuple[Tensor, Tensor]] = [
        (torch.empty(len(part), 0, device=device), torch.empty(len(part), 0, dtype=torch.int64, device=device))
        for part in parts
    ]
    for some, theirs in zip(voters.split(block), labels.split(block), strict=True):
        some, theirs = F.normalize(some.to(device), dim=1), theirs.to(device)
        for i, part in enumerate(parts):
            found = (F.normalize(part.to(device), dim=1) @ some.T).topk(min(k, len(some)), dim=1)
            similar = torch.cat([best[i][0], found.values], dim=1)
            their_class = torch.cat([best[i][1], theirs[found.indices]], dim=1)
            similar, places = similar.topk(min(k, similar.shape[1]), dim=1)
            best[i] = similar, their_class.gather(1, places)
    answers = []
    for similar, their_class in best:
        votes = torch.zeros(len(similar), classes, dtype=similar.dtype, device=device)
        votes.scatter_add_(1, their_class, (similar / temperature).exp())
        answers.append(votes.argmax(dim=1).cpu())
    return torch.cat(answers)
