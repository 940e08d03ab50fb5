"""Attentive probe on frozen patch tokens: learned queries pool them, and a linear layer classifies the result.

Efficient probing (arXiv 2506.10178). Masked image modeling spreads what it learns over the patch tokens, so a linear
probe of their mean or of the class token understates the encoder.
"""

import json
import math
import os
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.data.dataset import BadImage
from pixmim.evaluation.classification import (
    class_indices,
    compare_held_out,
    hold_out_rows,
    is_unequal,
    majority,
    rated,
    tally,
)
from pixmim.evaluation.context import EvalContext, Values
from pixmim.evaluation.patch_tokens import TokenSet, check_space, extract_tokens, token_shape
from pixmim.evaluation.repeated import check_repeated, repeat, selected_blocks
from pixmim.evaluation.results import result_file
from pixmim.evaluation.settings import AttentiveSettings
from pixmim.evaluation.visualize import Pixels, heat_overlay, labeled_grid, to_rgb
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils import rng
from pixmim.utils.console import progress
from pixmim.utils.errors import UserError
from pixmim.utils.files import parse_json, write_text_atomically
from pixmim.utils.initialization import seeded
from pixmim.utils.trust import inside
from pixmim.weights.safe_load import read

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates of AdamW; the best on a held-out part of the train set is chosen, see `compare_held_out`."""

BATCH = 256  # Images per step, at most. Small sets have smaller batches, for about eight steps per epoch.

CPU = torch.device("cpu")

_DRAWN_IMAGES, _DRAWN_QUERIES = 6, 6


class AttentiveProbe(nn.Module):
    """A classifier of patch tokens x (n d); the number of queries must divide d.

    Query u_q attends with a_q = softmax(x u_q / sqrt(d)). Values x W are split into one part of the channels for each
    query, and part q is pooled: sum_n a_q[n] v[n, q]. BatchNorm without parameters and a linear layer follow.
    Source: arXiv 2506.10178, section 3.
    """

    def __init__(self, width: int, classes: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.values = nn.Parameter(torch.randn(queries, width, width // queries) * width**-0.5)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, classes)

    def attention(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b q n"]:
        """Return the attention of each query over the tokens; it sums to one."""
        return (self.queries @ x.transpose(1, 2) / math.sqrt(x.shape[-1])).softmax(dim=-1)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """Return the logits."""
        # Tokens are pooled before they are multiplied with W: equal, for a fraction of the work.
        pooled = torch.einsum("bqd,qdv->bqv", self.attention(x) @ x, self.values)
        logits: Tensor = self.head(self.norm(pooled.flatten(1)))
        return logits


@dataclass(frozen=True)
class FittedProbe:
    """A probe that is fitted to the complete train set."""

    module: AttentiveProbe  # the probe, in eval mode
    rate: float  # its learning rate: the best on the held-out part
    held_out: float  # score of `compare_held_out` on the held-out part, of a probe of that rate fitted without it


def check_attentive(context: EvalContext, settings: AttentiveSettings) -> None:
    """Raise UserError for data or settings that `evaluate_attentive` would refuse, or if the disk is too full."""
    smallest, images = check_repeated(context, settings)
    _check_count(smallest)
    check_space(context, images, len(selected_blocks(context, settings)) or 1)


def evaluate_attentive(context: EvalContext, settings: AttentiveSettings) -> Values:
    """Evaluate an attentive probe on the frozen patch tokens after the final norm, and draw the last one's attention.

    Yields the values of `classification.rated`, "majority", the held-out score, the learning rate and the queries,
    as often as `repeated.repeat` does. Raises UserError for unsuitable data.
    """
    check_attentive(context, settings)
    blocks, width = selected_blocks(context, settings), token_shape(context.encoder)[2]
    queries = usable_queries(settings.queries, width)
    if queries < settings.queries:
        context.print(f"{queries} queries: {settings.queries} do not divide the width of {width}")
    probes: list[tuple[AttentiveProbe, TokenSet]] = []

    def measure(train: TokenSet, test: TokenSet) -> Values:
        options: Any = {"queries": queries, "device": context.encoder.device, "console": context.console}
        probe = fit_probe(train, epochs=settings.epochs, seed=settings.seed, **options)
        probes[:] = [(probe.module, test)]
        labels = class_indices(test.classes, train.classes, "the test data", test.labels)[test.labels]
        counts = tally(predict([probe.module], test, np.arange(len(labels)))[0], labels, len(train.classes))
        yield from rated(counts, train.classes)
        yield "majority", majority(counts)
        yield "held_out", 100 * probe.held_out
        yield "setting/rate", probe.rate
        yield "setting/queries", queries
        yield "setting/chosen_by_balanced", float(is_unequal(train.labels))

    with ExitStack() as stack:
        tokens = {s: stack.enter_context(extract_tokens(context, s, blocks)) for s in dict.fromkeys(settings.sources)}
        train, test = (tokens[source] for source in settings.sources)
        yield from repeat(context, settings, train, test, measure)
        draw_attention(context, probes[0][0], settings.sources[1], probes[0][1])
    if context.encoder_state == "trained" and not (settings.folds or settings.shots or settings.layers):
        path = result_file(context.folder, "attentive", "trained", asdict(settings), ".safetensors")
        save_probe(probes[0][0], train[0].classes, context.encoder.step, path)


def usable_queries(queries: int, width: int) -> int:
    """Return the largest number of queries up to `queries` that divides the width."""
    return max(count for count in range(1, min(queries, width) + 1) if width % count == 0)


def fit_probe(
    train: TokenSet,
    *,
    queries: int,
    epochs: int = 50,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device = CPU,
    console: Console | None = None,
) -> FittedProbe:
    """Choose the learning rate on the share `held_out` of train, and fit a probe to all of train. Raises UserError."""
    _check_count(len(train.labels))
    test, rest = map(np.sort, hold_out_rows(len(train.labels), train.groups, held_out, seed))
    options: Any = {"queries": queries, "epochs": epochs, "seed": seed, "device": device, "console": console}
    probes = fit(train, rest, RATES, **options)
    predictions, labels = torch.stack(predict(probes, train, test)), train.labels[torch.from_numpy(test)]
    scores = compare_held_out(predictions, labels, train.labels, len(train.classes))
    best = scores.index(max(scores))
    (module,) = fit(train, np.arange(len(train.labels)), (RATES[best],), **options)
    return FittedProbe(module, RATES[best], scores[best])


def fit(
    train: TokenSet,
    rows: Int[np.ndarray, " r"],
    rates: tuple[float, ...],
    *,
    queries: int,
    epochs: int,
    seed: int,
    device: torch.device = CPU,
    console: Console | None = None,
) -> list[AttentiveProbe]:
    """Fit a probe per learning rate by AdamW, with equal initial weights and batches: a tenth of warm-up, cosine."""
    width, classes = train.tokens.shape[2], len(train.classes)
    with seeded(seed):
        first = AttentiveProbe(width, classes, queries).to(device)
    probes = [deepcopy(first) for _ in rates]
    optimizer = torch.optim.AdamW(
        [{"params": list(probe.parameters()), "lr": rate} for probe, rate in zip(probes, rates, strict=True)],
        weight_decay=0.01,
    )
    batch = min(BATCH, len(rows), max(16, len(rows) // 8))
    steps = max(1, epochs * len(rows) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / max(1, steps // 10)) * (0.5 + 0.5 * math.cos(math.pi * i / steps)),
    )
    epochs = -(-steps * batch // len(rows))
    order = np.concatenate([rows[rng.permutation(seed, 1 + epoch, len(rows))] for epoch in range(epochs)])
    with progress("steps of the attentive probe", steps, console) as advance:
        for step in range(steps):
            selected = np.sort(order[step * batch : (step + 1) * batch])  # read in the order of the file
            x, labels = train.batch(selected, device)
            optimizer.zero_grad()
            for probe in probes:
                F.cross_entropy(probe(x), labels).backward()
            optimizer.step()
            schedule.step()
            advance(step + 1)
    return [probe.eval() for probe in probes]


@torch.no_grad()
def predict(probes: list[AttentiveProbe], data: TokenSet, rows: Int[np.ndarray, " r"]) -> list[Int[Tensor, " r"]]:
    """Return the class that each probe predicts for these rows, on the CPU. They are read once."""
    parts = []
    for start in range(0, len(rows), BATCH):
        x, _ = data.batch(rows[start : start + BATCH], probes[0].queries.device)
        parts.append(torch.stack([probe(x).argmax(dim=1) for probe in probes]).cpu())
    return list(torch.cat(parts, dim=1))


@torch.no_grad()
def draw_attention(context: EvalContext, probe: AttentiveProbe, spec: str, test: TokenSet) -> None:
    """Add to the context's images: a few test images, and the attention of some queries, as `draw_queries` does."""
    data, config, size = context.data(spec), context.encoder.config, context.encoder.size
    rows, pictures, names = [], [], []
    for row in np.unique(np.linspace(0, len(test.labels) - 1, _DRAWN_IMAGES).round().astype(np.int64)):
        index = int(test.indices[row])
        with suppress(BadImage):  # it was readable when the tokens were computed
            pictures.append(to_rgb(evaluation_crop(size).crop(data.image(index)), config))
            names.append(os.path.basename(data.path_of(index)))
            rows.append(row)
    if not rows:
        return
    pixels = np.stack(pictures)
    x, _ = test.batch(np.asarray(rows), probe.queries.device)
    columns = {"image": pixels, **draw_queries(probe, x, test.grid, pixels)}
    context.images["Attention of the probe's queries"] = labeled_grid(columns, names)


def draw_queries(
    probe: AttentiveProbe, x: Float[Tensor, "b n d"], grid: tuple[int, int], pixels: Pixels
) -> dict[str, Pixels]:
    """Draw the attention of the queries with the largest head weights, at most six, over images (b h w 3).

    Inputs of the head have unit variance, so the norm of its weights is the share of a query in the logits.
    """
    norms = probe.head.weight.unflatten(1, (len(probe.queries), -1)).norm(dim=(0, 2))
    order = norms.argsort(descending=True, stable=True)[:_DRAWN_QUERIES].tolist()
    maps = probe.attention(x)[:, order].unflatten(2, grid).cpu()
    maps = F.interpolate(maps, size=pixels.shape[1:3], mode="bilinear")
    return {f"query {query + 1}": heat_overlay(pixels, maps[:, i]) for i, query in enumerate(order)}


def save_probe(probe: AttentiveProbe, classes: list[str], step: int, path: Path) -> None:
    """Save a probe as safetensors: its `state_dict`, and in the metadata its classes and the step of the encoder."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in probe.state_dict().items()}
    write_text_atomically(path, save(tensors, {"probe": json.dumps({"classes": classes, "step": step})}))


def load_probe(path: Path) -> tuple[AttentiveProbe, list[str], int]:
    """Return a saved probe in eval mode, its classes, and its encoder's step. Raises UserError for any other file."""
    file = read(path)
    info = parse_json(file.metadata.get("probe", "null"), str(path))
    classes: Any = info.get("classes") if isinstance(info, dict) and type(info.get("step")) is int else None
    shapes = {name: tuple(value.shape) for name, value in file.tensors.items()}
    queries, width = shapes["queries"] if len(shapes.get("queries", ())) == 2 else (0, 0)
    known = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    fits = queries and width % queries == 0 and shapes.get("values") == (queries, width, width // queries)
    if known and fits and shapes.get("head.weight") == (len(classes), width):
        probe = AttentiveProbe(width, len(classes), queries)
        if shapes == {name: tuple(value.shape) for name, value in probe.state_dict().items()}:
            probe.load_state_dict(file.tensors)
            return probe.eval(), classes, info["step"]
    raise UserError(f"{path} is not an attentive probe of pixmim: repeat `pixmim evaluate attentive`")


def load_newest_probe(run: Path, step: int) -> tuple[AttentiveProbe, list[str]]:
    """Return the newest attentive probe of a run, and its classes. The folder may be untrusted.

    Raises:
        UserError: If the run has no probe, or its encoder is of another `step`.
    """
    files = sorted(inside(run, "evaluations").glob("attentive-trained-*.safetensors"), key=lambda f: f.lstat().st_mtime)
    if not files:
        raise UserError(f"{run} has no attentive probe: run `pixmim evaluate attentive` with it as MODEL first")
    probe, classes, trained = load_probe(inside(run, f"evaluations/{files[-1].name}"))
    if trained != step:
        raise UserError(f"the probe is of step {trained:,}, the encoder of {step:,}: repeat the evaluation")
    return probe, classes


def _check_count(images: int) -> None:
    if images < 3:
        raise UserError(
            f"the attentive probe needs at least 3 train images, and is to be fitted to {images}: pass more as "
            "--train, or larger numbers as --shots"
        )
