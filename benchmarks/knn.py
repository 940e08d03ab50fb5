"""Compare k-NN in blocks, as in evaluations, with one matrix of all similarities; and time it at ImageNet's size.

python benchmarks/knn.py

The features are random and have 768 values: their content changes neither time nor memory.
"""

import argparse
import resource

import torch
from timing import CLOCKS, interleaved, machine
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluation.knn import classify

WIDTH, CLASSES, K, TEMPERATURE = 768, 1000, 20, 0.07
IMAGENET = 1_281_167, 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voters", type=int, default=100_000, help="of the large set")
    parser.add_argument("--asked", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a CPU that others use too")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    print(f"{machine()}; features of {WIDTH} values, k = {K}, {CLASSES} classes, float32; {options.clock} time")

    voters, labels, asked = features(options.voters, options.asked)
    before, began = peak(), clock()  # first, before anything else could raise the peak
    classify(voters, labels, asked, CLASSES, (K,), TEMPERATURE)[K]
    seconds, grown = clock() - began, peak() - before
    minutes = seconds / 60 * IMAGENET[0] * IMAGENET[1] / (len(voters) * len(asked))
    print(f"{len(asked):,} against {len(voters):,}: {seconds:.1f} s; memory grew by {grown:.0f} MiB")
    print(f"in proportion, ImageNet's {IMAGENET[1]:,} against {IMAGENET[0]:,}: {minutes:.0f} min")

    voters, labels = voters[:20_000], labels[:20_000]
    times = interleaved(
        {
            "one matrix": lambda: at_once(voters, labels, asked),
            "pixmim": lambda: classify(voters, labels, asked, CLASSES, (K,), TEMPERATURE)[K],
        },
        options.rounds,
        clock=clock,
    )
    same = (at_once(voters, labels, asked) == classify(voters, labels, asked, CLASSES, (K,))[K]).double().mean()
    print(
        f"{len(asked):,} against {len(voters):,}, median of {options.rounds}; {float(same):.2%} of answers are the same"
    )
    for name, median in times.items():
        print(f"  {name:<12}{median:6.2f} s   {times['one matrix'] / median:.2f} x")


def features(voters: int, asked: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (voters,), generator=generator)
    return torch.randn(voters, WIDTH, generator=generator), labels, torch.randn(asked, WIDTH, generator=generator)


def at_once(voters: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Compute all similarities in one matrix, as the formula is written."""
    found = (F.normalize(asked, dim=1) @ F.normalize(voters, dim=1).T).topk(K, dim=1)
    votes = torch.zeros(len(asked), CLASSES).scatter_add_(1, labels[found.indices], (found.values / TEMPERATURE).exp())
    return votes.argmax(dim=1)


def peak() -> float:
    """Return the peak resident memory of the process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
