"""Fair timing in one process: the candidates take turns, so that a drift of the machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""What `--clock` may name: the processor's time, of all threads, is for a CPU that others use, too."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

STATED = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense products in bf16, FLOP a second, as the makers state them (of H100 and H200, the SXM form)."""


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    steps: int = 1,
    warm: int = 0,
) -> dict[str, float]:
    """Median seconds of one step of each candidate over `rounds` turns, after one that does not count.

    A turn is `warm` steps that do not count either, and then `steps` together: what a step has others do ahead of it
    must be counted, too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            for _ in range(warm):
                run()
            wait()
            began = clock()
            for _ in range(steps):
                run()
            wait()
            if turn:
                seconds[name].append((clock() - began) / steps)
    return {name: statistics.median(times) for name, times in seconds.items()}


def wait() -> None:
    """Until a GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(device: torch.device, precision: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP a second of one large matrix product here: the best of eight. What a step could reach at most."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        wait()
        began = clock()
        a @ b
        wait()
        best = min(best, clock() - began)
    return 2 * side**3 / best


def stated_peak() -> float | None:
    """FLOP a second in bf16 that the maker of this GPU states; None for another, or for a CPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in STATED.items() if part in name), None)


def machine() -> str:
    """One line on what computes."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU with {torch.get_num_threads()} threads ({capability}), torch {torch.__version__}"
