"""Fair timing in one process: the candidates take turns, so that a drift of the machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            began = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> str:
    """One line on what computes."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU with {torch.get_num_threads()} threads ({capability}), torch {torch.__version__}"
