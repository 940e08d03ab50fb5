"""Advise on a dataset: what its images are like, which settings suit them, and the commands to type.

`data/survey.py` measures and `rules.py` concludes. docs/my-images.md lists the rules with their sources.

The package is not called `advise`: importing `pixmim.advise` would replace the function of that name.
"""

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from pixmim.advice.page import write_page
from pixmim.advice.prepare import can_list, check_list, prepare_cache, prepare_list, write_image_list
from pixmim.advice.rules import (
    QUESTIONS,
    Suggestion,
    apply_rules,
    choose_recipe,
    configure,
    judge_speed,
    leave_out_masks,
)
from pixmim.advice.speed import measure_speed
from pixmim.config import PretrainConfig
from pixmim.data.survey import MAX_SAMPLE, Survey, is_cache, open_unconverted, split_masks, survey
from pixmim.data.uri import spec_text
from pixmim.recipes import get_recipe
from pixmim.training.precision import choose_device
from pixmim.utils.torch_defaults import torch_defaults
from pixmim.utils.validation import Integer, check_value


@dataclass(frozen=True)
class Advice:
    """The survey of a dataset, and what follows from it. `print` shows all of it, `write_page` draws it.

    Attributes:
        survey: What was found.
        suggestions: What follows, each with its `topic`, `flags`, `reason` and `basis`: "measured" on these images,
            "published", or "guess".
        questions: What only the user can answer.
        commands: Commands to type in this order. The last one pre-trains; the others prepare its data.
        config: The configuration of the last command.
    """

    survey: Survey
    suggestions: list[Suggestion]
    questions: list[str]
    commands: list[str]
    config: PretrainConfig

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values for JSON."""
        values = asdict(self)
        if self.survey.spectrum is not None:
            for name in ("power", "variance"):
                values["survey"]["spectrum"][name] = getattr(self.survey.spectrum, name).tolist()
        return values

    def write_page(self, folder: str | os.PathLike[str]) -> Path:
        """Write a self-contained page, index.html, and return its path.

        Args:
            folder: Its folder. A page of pixmim in it is replaced.

        Raises:
            UserError: If another file has the name of the page.
        """
        return write_page(self, Path(folder))

    def __str__(self) -> str:
        sections = {
            "Found": self.survey.lines(),
            "Suggestions": [str(suggestion) for suggestion in self.suggestions],
            "Questions": self.questions,
            "Commands": self.commands,
        }
        return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


@torch_defaults()
def advise(
    data: str | os.PathLike[str],
    *,
    images: int = 2_000,
    write_list: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str = "auto",
    trial: bool = True,
    console: Console | None = None,
) -> Advice:
    """Examine a dataset, and advise on settings for pre-training on it.

    Args:
        data: The dataset, anything that --data takes.
        images: Images to examine (1 to 20,000), evenly distributed and always the same.
        write_list: A new file that lists the images without masks; the commands then use it. A .txt has their paths, a
            .csv also their class, if they have one, and near-duplicates as groups that a split keeps together.
        overwrite: Replace an existing list.
        device: Device to train on: "auto", "cpu", "cuda" or "mps".
        trial: Measure the speed of training with a few steps.
        console: Shows progress.

    Returns:
        What was found, suggestions with their reasons, and commands.

    Raises:
        UserError: If the dataset cannot be opened, no image can be read, or the list cannot be written.
    """
    check_value("--images", images, Annotated[int, Integer(1, MAX_SAMPLE)])
    target = choose_device(device)
    spec = spec_text(data)
    dataset = open_unconverted(spec)
    split = split_masks(dataset)
    if write_list is not None:
        check_list(dataset, len(split[0]), images, Path(write_list), overwrite)
    size = min(get_recipe(choose_recipe(len(split[0]), target)).image_size)
    found = survey(spec, dataset, split, size=size, sample=images, console=console)
    if write_list is not None:
        commands, source = list[str](), write_image_list(dataset, split[0], found, Path(write_list))
    else:
        commands, source = prepare_list(dataset, found)
    suggestions = apply_rules(found, source, target)
    if found.masks and not can_list(dataset):
        suggestions.append(leave_out_masks(found))
    config, cached = configure(source, suggestions), False
    if trial:
        speed, cached = judge_speed(config, found, measure_speed(config, target), can_cache=not is_cache(dataset))
        suggestions += speed
    more, source = prepare_cache(found, config, cached=cached)
    recipe, *flags = [flag for suggestion in suggestions for flag in suggestion.flags]
    commands += [*more, shlex.join(["pixmim", "pretrain", recipe, "--data", source, *flags])]
    return Advice(found, suggestions, QUESTIONS, commands, configure(source, suggestions))
