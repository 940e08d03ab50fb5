"""Keep the encoder of the best periodic measurement of a run (--keep-best)."""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import nn

from pixmim.config import PretrainConfig
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.trust import inside
from pixmim.weights.safe_load import read
from pixmim.weights.save import save_encoder

BEST_FOLDER = "encoder-best"  # folder of a run with its best encoder, in timm's layout like encoder/
BEST_WEIGHTS = f"{BEST_FOLDER}/model.safetensors"


class Measure(NamedTuple):
    """A logged value that tells which of two encoders is better."""

    key: str  # Pattern of its key in metrics.jsonl. Of several keys, the one with the largest number is used.
    higher: bool  # True if higher is better
    label: str  # its name in messages


MEASURES: dict[str, Measure] = {
    "knn": Measure(r"knn/k([0-9]{1,9})/mean/top1", True, "k-NN top-1 (%)"),
    "knn-balanced": Measure(r"knn/k([0-9]{1,9})/mean/balanced", True, "k-NN balanced (%)"),
    "held-out-loss": Measure("held_out_loss", False, "held-out loss"),
    "rankme": Measure("rankme", True, "effective rank"),
}
"""Measures that --keep-best takes, by name."""


class Best(NamedTuple):
    """The best measurement of a run: name of the measure, value, and number of steps done."""

    measure: str
    value: float
    step: int

    def __str__(self) -> str:
        return f"{MEASURES[self.measure].label} {self.value:.4g} at step {self.step:,}"


def find_key(pattern: str, metrics: Mapping[str, object]) -> str | None:
    """Return the key that matches a pattern; of several, the one with the largest number in it."""
    matches = filter(None, (re.fullmatch(pattern, key) for key in metrics))
    return max(((tuple(map(int, match.groups())), match[0]) for match in matches), default=((), None))[1]


class BestEncoder:
    """The best encoder of a run so far, whose file is its state when a run resumes. Raises UserError."""

    def __init__(self, config: PretrainConfig, out: Path, steps: int, console: Console) -> None:
        self._config, self._out, self._steps, self._console = config, out, steps, console
        name = config.keep_best
        if name and name not in MEASURES:
            raise UserError(
                f"--keep-best {name} is not a measure{did_you_mean(name, MEASURES)} Known: {', '.join(MEASURES)}"
            )
        if name.startswith("knn") and not (config.knn.train and config.knn.test):
            raise UserError(f"--keep-best {name} needs labeled data: pass --knn.train and --knn.test")
        held_out = name in ("held-out-loss", "rankme")
        if held_out and not config.hold_out:
            raise UserError(f"--keep-best {name} needs images that are held out: pass --hold-out 0.02")
        measured_on = config.hold_out if held_out else (config.knn.train, config.knn.test)
        self._data = hashlib.sha256(repr(measured_on).encode()).hexdigest()[:16]
        self._best = read_best(out, self._data) if name else None

    def offer(self, step: int, metrics: Mapping[str, float], encoder: nn.Module) -> None:
        """Save an encoder if its measurement is the best so far; of equal ones, the first. Call on rank 0 only."""
        name = self._config.keep_best
        key = find_key(MEASURES[name].key, metrics) if name else None
        if key is None or not math.isfinite(metrics[key]):
            return
        value, sign = metrics[key], 1 if MEASURES[name].higher else -1
        if self._best is not None and self._best.measure == name and sign * value <= sign * self._best.value:
            return
        more = {"measure": name, "value": repr(float(value)), "measured_on": self._data}
        try:
            save_encoder(encoder, self._out / BEST_FOLDER, self._config, step, self._steps, more=more)
        except OSError as error:
            print_plain(self._console, f"warning: --keep-best cannot write the encoder of step {step:,}: {error}")
            return
        self._best = Best(name, float(value), step)


def read_best(out: Path, measured_on: str = "") -> Best | None:
    """Return the best measurement of a run, which may be untrusted; None if no encoder was kept, or it is damaged.

    Measurements on other images than those of the digest `measured_on` are not compared.
    """
    try:
        path = inside(out, BEST_WEIGHTS)
        found = read(path).metadata if path.exists() else {}
        best = Best(found["measure"], float(found["value"]), int(found["step"]))
    except (UserError, KeyError, ValueError):
        return None
    known = best.measure in MEASURES and math.isfinite(best.value) and best.step >= 0
    return best if known and measured_on in ("", found.get("measured_on")) else None
