"""Time the low-pass by four real products against its FFT forms, with errors against float64.

python benchmarks/lowpass.py
"""

import torch
from timing import interleaved, machine
from torch import Tensor

from pixmim import low_pass

SIZE, RADIUS, BATCH, ROUNDS = 224, 40, 64, 9


def by_fft(images: Tensor, variant: str) -> Tensor:
    """Filter by full complex FFTs, as in the definition."""
    h, w = images.shape[-2:]
    i = torch.arange(h, device=images.device)[:, None]
    j = torch.arange(w, device=images.device)[None, :]
    center = ((h - 1) / 2, (w - 1) / 2) if variant == "paper-code" else (h // 2, w // 2)
    keep = (i - center[0]) ** 2 + (j - center[1]) ** 2 <= RADIUS**2
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1)) * keep
    if variant == "paper-code":
        return torch.fft.ifft2(spectrum).abs()
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real


def by_rfft(images: Tensor) -> Tensor:
    """The exact variant, with half the spectrum."""
    h, w = images.shape[-2:]
    v = torch.fft.fftfreq(h, 1 / h, device=images.device)[:, None]
    u = torch.fft.rfftfreq(w, 1 / w, device=images.device)[None, :]
    return torch.fft.irfft2(torch.fft.rfft2(images) * (v * v + u * u <= RADIUS**2), s=(h, w))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.rand(BATCH, 3, SIZE, SIZE, device=device)
    candidates = {
        "exact: fft2": lambda: by_fft(images, "exact"),
        "exact: rfft2": lambda: by_rfft(images),
        "exact: pixmim": lambda: low_pass(images, RADIUS),
        "released: fft2": lambda: by_fft(images, "paper-code"),
        "released: pixmim": lambda: low_pass(images, RADIUS, "paper-code"),
    }
    seconds = interleaved(candidates, ROUNDS)
    print(f"{BATCH} images of {SIZE} px, radius {RADIUS}; {machine()}; median of {ROUNDS}")
    for name, run in candidates.items():
        variant = name.split(":")[0]
        error = (run()[:2].double() - by_fft(images[:2].double(), variant)).abs().max().item()
        ratio = seconds[f"{variant}: fft2"] / seconds[name]
        print(f"{name:<18}{seconds[name] * 1e3:8.1f} ms   {ratio:5.2f} x fft2   largest error {error:.1e}")


if __name__ == "__main__":
    main()
