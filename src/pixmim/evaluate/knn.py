"""k-NN on frozen features, as DINO does it (arXiv 2104.14294, appendix; also used by DINOv2)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluate.bench import Bench, Values
from pixmim.evaluate.features import Frozen, same_classes
from pixmim.metrics import wilson_interval
from pixmim.protocols import Knn


def measure(bench: Bench, settings: Knn) -> Values:
    """Top-1 accuracy on the test data: see `knn`. Raises UserError."""
    yield from knn(bench.frozen(settings.train), bench.frozen(settings.test), settings.k)


def knn(train: Frozen, test: Frozen, k: int = 20) -> Values:
    """Top-1 accuracy in per cent, of the global token ("cls") and of the mean of the patch tokens ("mean").

    Yields each feature's accuracy and the ends of its 95 % interval. Raises UserError for a class train lacks.
    """
    wanted = same_classes(train, test)
    for name, voters, asked in (
        ("cls", train.vector[:, -1], test.vector[:, -1]),
        ("mean", train.mean, test.mean),
    ):
        correct = int((classify(voters, train.labels, asked, len(train.classes), k) == wanted).sum())
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
    chunk: int = 1024,
) -> Int[Tensor, " m"]:
    """The class of each asked feature: the k most cosine-similar voters vote with weight exp(similarity / temperature).

    Takes `chunk` rows at a time, so memory is bounded at chunk x n; k is cut to the number of voters.
    """
    voters, k = F.normalize(voters, dim=1), min(k, len(voters))
    answers = []
    for part in F.normalize(asked, dim=1).split(chunk):
        similarity, nearest = (part @ voters.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, dtype=similarity.dtype)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        answers.append(votes.argmax(dim=1))
    return torch.cat(answers)
