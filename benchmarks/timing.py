"""Time candidates in one process, interleaved, so that a drift of the machine affects all of them equally."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Clocks by the name that `--clock` takes: processor time, of all threads, is for a CPU that others use too."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

STATED = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Peak FLOP/s of dense bf16 products, as stated by the vendor (H100 and H200: SXM)."""


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    steps: int = 1,
    warm: int = 0,
) -> dict[str, float]:
    """Return the median seconds of one step of each candidate over `rounds` turns, after an untimed one.

    A turn is `warm` untimed steps, and then `steps` that are timed together, so that work which one step does ahead for
    another is included.
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
    """Wait until a GPU, if there is one, has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(
    device: torch.device, precision: str, clock: Callable[[], float] = time.perf_counter, side: int = 0
) -> float:
    """Return FLOP/s of one large matrix product, the best of eight: the upper bound for a step."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    return 2 * side**3 / least(lambda: a @ b, 8, clock)


def copy_rate(device: torch.device, size: int) -> float:
    """Return bytes/s that are read and written by a copy of `size` bytes on the device, the best of eight."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / least(lambda: target.copy_(source), 8)


def least(run: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the least seconds of a call."""
    best = float("inf")
    for _ in range(rounds):
        wait()
        began = clock()
        run()
        wait()
        best = min(best, clock() - began)
    return best


def profiled(run: Callable[[], object], device: torch.device) -> torch.profiler.profile:
    """Profile three calls, by kernel or operator."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(3):
            run()
        wait()
    return found


def largest_costs(run: Callable[[], object], device: torch.device, count: int) -> list[tuple[str, float]]:
    """Return the most expensive kernels or operators of a call, each with its share of all."""
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: float(getattr(event, own)) for event in profiled(run, device).key_averages()}
    total = sum(times.values()) or 1.0
    return [(name[:60], times[name] / total) for name in sorted(times, key=times.__getitem__, reverse=True)[:count]]


def stated_peak() -> float | None:
    """Return the peak FLOP/s in bf16 that the vendor states for this GPU; None for an unknown GPU or a CPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in STATED.items() if part in name), None)


def machine() -> str:
    """Describe the device and the version of torch in a line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU with {torch.get_num_threads()} threads ({capability}), torch {torch.__version__}"
