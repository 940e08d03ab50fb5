"""k-NN on frozen features, as in DINO (arXiv 2104.14294, appendix) and DINOv2."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluation.classification import majority, rated, same_classes, tally
from pixmim.evaluation.context import EvalContext, FeatureSet, Values
from pixmim.evaluation.repeated import check_repeated, repeat, selected_blocks
from pixmim.evaluation.settings import KnnSettings
from pixmim.utils.errors import UserError

DEFAULT_K = (1, 20)  # numbers of neighbors; each gives its own result

ROWS, BLOCK = 1024, 16384  # queries and references compared at a time: 64 MiB of similarities for datasets of any size

CPU = torch.device("cpu")


def check_knn(context: EvalContext, settings: KnnSettings) -> None:
    """Raise UserError for data or settings that `evaluate_knn` would refuse."""
    usable_k(settings.k, check_repeated(context, settings)[0])


def evaluate_knn(context: EvalContext, settings: KnnSettings) -> Values:
    """Classify the test data by k-NN: see `knn` and `repeated.repeat`. Raises UserError.

    With folds or numbers of labels, a k above the number of train images keeps its name, so that means are of the same.
    """
    smallest, _ = check_repeated(context, settings)
    train, test = (context.features(spec, selected_blocks(context, settings)) for spec in settings.sources)
    _, warning = usable_k(settings.k, min(smallest, len(train[0].labels)))
    if warning:
        context.print(warning)

    def measure(references: FeatureSet, queries: FeatureSet) -> Values:
        found = dict(knn(references, queries, settings.k, context.encoder.device))
        if not (settings.folds or settings.shots):
            yield from found.items()
            return
        for k in settings.k:
            used = f"k{min(k, len(references.labels))}/"
            yield from ((f"k{k}/{key.removeprefix(used)}", v) for key, v in found.items() if key.startswith(used))
        yield "majority", found["majority"]

    yield from repeat(context, settings, train, test, measure)


def usable_k(k: Sequence[int], references: int) -> tuple[list[int], str]:
    """Limit each k to the number of references; also return a warning for larger ones. Raises UserError."""
    if not k or min(k) < 1:
        raise UserError(f"--k takes numbers of neighbors from 1 on, such as 1 20, not {' '.join(map(str, k))}")
    large = " and ".join(f"{each:,}" for each in k if each > references)
    warning = f"warning: k = {large} exceeds the {references:,} train images; measured with k = {references:,}"
    return list(dict.fromkeys(min(each, references) for each in k)), warning if large else ""


def knn(train: FeatureSet, test: FeatureSet, k: Sequence[int] = DEFAULT_K, device: torch.device = CPU) -> Values:
    """Yield the metrics of k-NN on the mean of the patch tokens ("mean"), and on the class token ("cls").

    Of an encoder without a class token it is the vector that the network pools ("pooled"), unless that is the mean. The
    names are those of `classification.rated` with the prefix kK/FEATURE/, and "majority"; values are in per cent. K is
    limited to the number of train images (`usable_k`). Raises UserError if a k is below 1, or train lacks a test class.
    """
    k, _ = usable_k(k, len(train.labels))
    labels, classes = same_classes(train, test), len(train.classes)
    for name, references, queries in (
        (train.vector_name, train.vector[:, -1], test.vector[:, -1]),
        ("mean", train.mean, test.mean),
    ):
        if name == "pooled" and torch.equal(references, train.mean):
            continue
        predictions = classify(references, train.labels, queries, classes, k, device=device)
        for each, predicted in predictions.items():
            counts = tally(predicted, labels, classes)
            yield from rated(counts, train.classes, f"k{each}/{name}/")
    yield "majority", majority(counts)


def classify(
    references: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    classes: int,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    rows: int = ROWS,
    block: int = BLOCK,
    device: torch.device = CPU,
) -> dict[int, Int[Tensor, " m"]]:
    """Classify queries, for each k, by the k most similar references, weighted by exp(cosine / temperature).

    The first class wins among classes with equal votes; among references that are equally similar at the k-th rank any
    may vote. Each block of references is moved to the device once and compared with `rows` queries at a time. Memory
    holds the features, block x (d + rows) values and the max(k) best references of each query.
    """
    parts = queries.split(rows)
    best: list[tuple[Tensor, Tensor]] = [
        (torch.empty(len(part), 0, device=device), torch.empty(len(part), 0, dtype=torch.int64, device=device))
        for part in parts
    ]
    for chunk, chunk_labels in zip(references.split(block), labels.split(block), strict=True):
        chunk, chunk_labels = F.normalize(chunk.to(device), dim=1), chunk_labels.to(device)
        for i, part in enumerate(parts):
            nearest = (F.normalize(part.to(device), dim=1) @ chunk.T).topk(min(max(k), len(chunk)), dim=1)
            similarities = torch.cat([best[i][0], nearest.values], dim=1)
            neighbors = torch.cat([best[i][1], chunk_labels[nearest.indices]], dim=1)
            similarities, order = similarities.topk(min(max(k), similarities.shape[1]), dim=1)
            best[i] = similarities, neighbors.gather(1, order)
    predictions: dict[int, list[Tensor]] = {each: [] for each in k}
    for similarities, neighbors in best:
        weights = (similarities / temperature).exp()
        for each, predicted in predictions.items():
            votes = torch.zeros(len(similarities), classes, dtype=similarities.dtype, device=device)
            votes.scatter_add_(1, neighbors[:, :each], weights[:, :each])
            predicted.append(votes.argmax(dim=1).cpu())
    return {each: torch.cat(predicted) for each, predicted in predictions.items()}
