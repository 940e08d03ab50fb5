"""Pre-training from top to bottom: data, model, optimizer, resume, train, export.

The module is not called `pretrain`: importing `pixmim.pretrain` would replace the function of that name in the package.
"""

import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from rich.console import Console
from torch import Tensor, nn

from pixmim.build import build_crop, build_model, image_spec, with_dataset_stats
from pixmim.config import PretrainConfig
from pixmim.config_io import pretrain_config, to_json
from pixmim.data import create_loader, open_dataset
from pixmim.data.bad_images import BadImageLog, merge_logs
from pixmim.data.caching import choose_cache_location
from pixmim.data.dataset import ImageDataset
from pixmim.data.loader import Batch
from pixmim.data.sampler import BatchShard
from pixmim.evaluation.evaluate import online_knn
from pixmim.evaluation.visualize import labeled_grid
from pixmim.method import Method
from pixmim.models.base import MaskedModel
from pixmim.models.layer_decay import not_decayed
from pixmim.report import write_report
from pixmim.report.reconstruct import reconstruct
from pixmim.run_folder import check_links, check_new_run, check_same_run, claim, with_full_paths
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.distributed import Distributed, init_distributed
from pixmim.training.find_batch_size import halve, images_at_once, is_out_of_memory
from pixmim.training.metric_logger import read_metrics
from pixmim.training.optim import SyncFreeOptimizer, adamw
from pixmim.training.parallelize import full_state_dict, parallel_mode, parallelize, step_context, sync_last_microbatch
from pixmim.training.preemption import Interrupted
from pixmim.training.schedule import Schedule
from pixmim.training.summary import end_summary, start_summary
from pixmim.training.trackers import Trackers
from pixmim.training.trainer import Trainer
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.console import print_plain
from pixmim.utils.errors import AlreadyReportedError, UserError, first_line
from pixmim.utils.files import write_text_atomically
from pixmim.utils.lock import locked_folder
from pixmim.utils.threads import num_threads
from pixmim.utils.trust import trust_config
from pixmim.weights.detect import read_run
from pixmim.weights.load import build_encoder_with_weights, initialize_from, load_encoder, resolve_model
from pixmim.weights.save import ENCODER_FOLDER, ENCODER_WEIGHTS, save_encoder


@dataclass(frozen=True)
class PretrainResult:
    """A pre-training run that has ended, or was interrupted."""

    config: PretrainConfig
    """The configuration that was written to config.json."""
    folder: Path
    """The folder of the run."""
    step: int
    """Steps done."""
    finished: bool
    """False after an interruption: the same call resumes the run."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl, each with `step`, `epoch` and numbers."""
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def encoder(self) -> nn.Module:
        """The trained encoder as a timm module, on the CPU and in eval mode, its `pretrained_cfg` that of the run."""
        return load_encoder(self.folder)


def pretrain(
    config: PretrainConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_step_end: Callable[[int], None] | None = None,
    track: Sequence[str] = (),
    report: bool = True,
    console: Console | None = None,
    world: Distributed | None = None,
) -> PretrainResult:
    """Pre-train an encoder. Resumes from the newest checkpoint if the run was interrupted.

    Writes to `out`: config.json, metrics.jsonl, skipped.csv, checkpoints/, and at the end encoder/ and report.html. On
    a CPU, a run that was interrupted and resumed on as many ranks ends with bitwise the weights of one that was not.
    Ctrl-C finishes the step, saves a checkpoint and returns. Under torchrun or Slurm, call it on every rank.

    Args:
        config: What to train; see `get_recipe`. Missing mean and std are those that `pixmim stats` has measured.
        out: Folder of the run; otherwise `config.out`, or a new folder runs/RECIPE-TIME.
        resume: Continue the run in `out` although its length (`epochs`, `steps`) or the path of its data has changed.
        on_log: Called on rank 0 with each record that is written to metrics.jsonl.
        on_step_end: Called on every rank after each step, with the number of steps done.
        track: Trackers that receive metrics, configuration and reconstructions, of "tensorboard", "wandb", "mlflow" and
            "trackio". Their own environment variables configure them; one that fails costs a warning.
        report: Write report.html when the run is finished.
        console: Where progress and notes are printed; `Console(quiet=True)` prints nothing.
        world: The ranks, where the caller has joined them already; otherwise those of torchrun or Slurm are joined.

    Returns:
        The run, with its encoder and metrics.

    Raises:
        UserError: If `out` holds another run or is in use, or if the configuration, the data or the memory do not do.
    """
    if not config.data:
        raise UserError("no data given: pass --data FOLDER, or --data shapes: for the built-in synthetic dataset")
    joined = init_distributed(config.device, config.parallel.timeout) if world is None else nullcontext(world)
    with joined as world, ExitStack() as stack:
        console = Console(quiet=not world.is_main) if console is None else console
        try:
            trackers = Trackers(track, console)
            folder = claim(str(out or config.out), config.recipe or "run", world, stack, console)
            config = with_full_paths(config, folder)
            check_links(folder)
            if (folder / "config.json").exists():
                config = check_same_run(config, folder, resume=resume)
            elif resume:
                raise UserError(f"there is no {folder / 'config.json'}: resume=True continues a run that is there")
            else:
                check_new_run(folder)
                config, lines = with_dataset_stats(config)
                for line in lines:
                    print_plain(console, line)
            world.gather(None)  # all have looked before the first one writes
            stack.enter_context(trackers)
            step, finished = _train(config, folder, world, console, trackers, on_log, on_step_end)
            if finished and world.is_main:
                if report:
                    _report(folder, console, config.data)
                trackers.log_image(step, "reconstructions", partial(_reconstructions, folder, config))
        except UserError as error:
            if world.claim_once(str(error)):
                raise
            raise AlreadyReportedError(str(error)) from None
    return PretrainResult(config, folder, step, finished)


def finish_run(out: str | os.PathLike[str], *, console: Console | None = None) -> PretrainResult:
    """End a run at its newest checkpoint: write its encoder and report. `pretrain` can still resume it.

    Args:
        out: Folder of the run.
        console: Where notes are printed.

    Returns:
        The run.

    Raises:
        UserError: If there is no such run, or it has no checkpoint.
    """
    folder, console = Path(out), console or Console()
    check_links(folder)
    with locked_folder(folder, partial(print_plain, console)):
        weights = resolve_model(str(folder), with_decoder=True)
        config = pretrain_config(weights.config, folder)
        save_encoder(build_encoder_with_weights(weights), folder / ENCODER_FOLDER, config, weights.step, weights.steps)
        _report(folder, console, None)
    return PretrainResult(config, folder, weights.step, finished=True)


def _report(folder: Path, console: Console, data: str | None) -> None:
    write_report([folder], folder / "report.html", data, lambda line: print_plain(console, f"warning: {line}"))


def _reconstructions(folder: Path, config: PretrainConfig) -> Image:
    """Draw reconstructions of a run's own images."""
    data = open_dataset(config.data, image_spec(config), config.shard_cache_gib)
    drawn = reconstruct(resolve_model(str(folder), with_decoder=True), data)
    return labeled_grid(drawn.columns, drawn.names)


def _train(
    config: PretrainConfig,
    out: Path,
    world: Distributed,
    console: Console,
    trackers: Trackers,
    on_log: Callable[[dict[str, Any]], None] | None,
    on_step_end: Callable[[int], None] | None,
) -> tuple[int, bool]:
    """Train in a folder that is checked and locked; return the steps done, and whether those are all."""
    watch = online_knn(config, console)
    data, crop = open_dataset(config.data, image_spec(config), config.shard_cache_gib), build_crop(config)
    _agree(config, world, data)
    method = Method.of(config)
    model, device, precision = method.model, method.device, method.precision
    here = world.local_world_size()
    place, kept = choose_cache_location(data, crop, config.cache_images, device, processes=here)
    schedule, epoch = Schedule.of(config, len(data)), config.batch_size / len(data)

    begun = max(CheckpointManager(out / "checkpoints").steps(), default=0)
    if not begun and (out / ENCODER_WEIGHTS).exists():
        raise UserError(
            f"{out} holds a finished encoder, and no checkpoint to go on from: `--init {shlex.quote(str(out))}` begins "
            "a new run with it, in another --out"
        )
    if begun > schedule.steps:
        raise UserError(
            f"{out} is at step {begun:,} already, and the length asked for ends at step {schedule.steps:,}: give more "
            "--epochs (or --steps), or --finish, which ends it where it is"
        )
    lines = _longer(out, schedule, begun, len(data))
    origin = initialize_from(model, config) if config.init and not begun else []
    network = parallelize(model, config.parallel, world, device, precision)
    optimizer = adamw(model, config.lr, config.optim.betas, config.optim.weight_decay, not_decayed(model.encoder))
    updater = SyncFreeOptimizer(optimizer, config.optim.clip, scaling=precision == "fp16", device=device)
    with step_context(config.parallel):
        parts = _parts(config, method, network, updater, world, beside=data if place == "gpu" else None)
    shard, text = BatchShard(config.batch_size, 0, world.rank, world.size, parts), to_json(config)
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)  # not before all that a mistake in the settings could stop
        write_text_atomically(out / "config.json", text)
    trust_config(text)

    about = [f"images: {line}" for line in (data.description, kept) if line]
    for line in [*start_summary(config, len(data), schedule, device, precision, world, parts), *about, *origin, *lines]:
        print_plain(console, line)

    def record(line: dict[str, Any]) -> None:
        trackers.log(line)
        if on_log is not None:
            on_log(line)

    trainer = Trainer(
        model,
        updater,
        schedule.lr,
        schedule.steps,
        out,
        images=len(data),
        batch_size=config.batch_size,
        accumulation_steps=parts,
        network=network,
        world=world,
        checkpoint=config.checkpoint,
        log_every=config.log_every,
        on_log=record,
        console=console,
    )
    start = trainer.resume()
    if world.is_main:
        trackers.open(out, json.loads(text), start)
    if start:
        done = "is complete" if start >= schedule.steps else "goes on"
        print_plain(console, f"the run {done}: {start:,} updates are done")
    mean, std = (torch.tensor(values, device=device) for values in config.normalization)
    skipped = BadImageLog(
        out / (f"skipped-{world.rank}.csv" if world.rank else "skipped.csv"), len(data), config.max_bad_fraction
    )
    watch_every = max(1, round(config.knn.every / epoch))

    def loss_of(batch: Batch, number: int) -> Tensor:
        """Return what a part of a batch adds to the loss of its step."""
        images = flip_and_normalize(
            batch.images.to(device, non_blocking=True), batch.flip.to(device, non_blocking=True), mean, std
        )
        assert batch.mask is not None
        # Gradients are averaged over the ranks, and summed over the parts.
        return method.loss(network, images, batch.mask) * (batch.weight * world.size)

    measured = True

    def measure(step: int) -> None:
        """Where the run asks for it: at the start, every so often, and at the end."""
        nonlocal measured
        if watch is not None and (step in (0, schedule.steps) or step % watch_every == 0):
            try:
                with trainer.interrupts.waiting(world.size == 1):
                    values = watch(_whole(model, config, device, world).encoder)
            except Interrupted:
                measured = False  # the resumed run measures it
                return
            trainer.log.write({"step": step, "epoch": round(step * epoch, 6), **values})
            trainer.log.pause()

    def after_step(step: int) -> None:
        measure(step)
        if on_step_end is not None:
            on_step_end(step)

    with (
        create_loader(
            data,
            crop,
            replace(shard, start=start * config.batch_size),
            place,
            device=device,
            skipped=skipped,
            flip=config.crop.flip,
            seed=config.seed,
            masks=method.masks.at,
            threads=num_threads(config.threads, processes=here),
        ) as batches,
        trainer,
        step_context(config.parallel),
        _short_of_memory(shard),
    ):
        noted = [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" not in line]
        if world.broadcast(start not in noted):
            measure(start)
        step = trainer.fit(batches, loss_of, after_step)

    if step < schedule.steps or not measured:
        return step, False
    product = _whole(model, config, device, world).encoder
    world.gather(None)  # until then, others may still write to their accounts of skipped images
    if world.is_main:
        save_encoder(product, out / ENCODER_FOLDER, config, step, schedule.steps)
        lost, bad = int(updater.state["skipped"].item()), merge_logs(out)
        for line in end_summary(config, out, step, lost=lost, bad=bad, images=len(data), waited=trainer.log.data_wait):
            print_plain(console, line)
    return step, True


def _longer(out: Path, schedule: Schedule, done: int, images: int) -> list[str]:
    """Say what becomes of the learning rate where a run goes on that was begun with another length."""
    before = read_run(out) if done else None
    planned = schedule.steps if before is None else Schedule.of(pretrain_config(before, out), images).steps
    if planned == schedule.steps:
        return []
    return [
        f"the run goes on to step {schedule.steps:,} instead of {planned:,}: from step {done:,} on, the learning rate "
        f"is that of a run of {schedule.steps:,} steps, {schedule.lr(min(done, schedule.steps - 1)):.3g} at first"
    ]


def _parts(
    config: PretrainConfig,
    method: Method,
    network: nn.Module,
    updater: SyncFreeOptimizer,
    world: Distributed,
    beside: ImageDataset | None,
) -> int:
    """Return the number of parts in which this rank computes its share of a batch. Collective.

    beside: The data set that will be kept on the device as well.
    """
    share, device = config.batch_size // world.size, method.device
    if config.accumulation_steps:
        return config.accumulation_steps
    if device.type == "cpu":
        width = int(method.model.encoder.num_features)  # type: ignore[arg-type]
        at_once = images_at_once(math.prod(config.image_size), width) // world.local_world_size()
        return -(-share // max(1, at_once))
    if (
        parallel_mode(config.parallel, world) == "fsdp"
    ):  # an all-gather that one rank cannot finish would leave the others waiting
        return 1
    spare = 2 * sum(p.nbytes for p in method.model.parameters() if p.requires_grad)  # the optimizer's moments
    if beside is not None and beside.sizes is not None:
        spare += int(beside.sizes.prod(axis=1).sum()) * config.channels * beside.image_spec.torch_dtype.itemsize

    def attempt(images: int) -> None:
        try:
            taken = torch.empty(spare, dtype=torch.uint8, device=device)
            noise = torch.randn(images, config.channels, *config.image_size, device=device)
            with sync_last_microbatch(network, last=False):
                updater.backward(method.loss(network, noise, method.masks(0, range(images))))
            del taken
        finally:
            updater.optimizer.zero_grad(set_to_none=True)

    return -(-share // halve(attempt, share, lambda fits: all(world.gather(fits))))


@contextmanager
def _short_of_memory(shard: BatchShard) -> Iterator[None]:
    """Raise UserError with the way out when memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = (
            f"--accumulation-steps {2 * shard.parts} halves them"
            if shard.local_batch_size > 1
            else "choose a smaller model"
        )
        raise UserError(
            f"memory ran out, with {shard.local_batch_size:,} images computed at once ({first_line(error)}): "
            f"{advice}, a smaller --size takes less as well"
        ) from None


def _agree(config: PretrainConfig, world: Distributed, data: ImageDataset) -> None:
    """Raise UserError unless each process gets an equal share of every batch, out of the same images."""
    config.check_divisible(world.size, "processes")
    counts = world.gather(len(data))
    other = next((rank for rank, count in enumerate(counts) if count != counts[0]), 0)
    if other:
        raise UserError(
            f"process {other} sees {counts[other]:,} images and process 0 {counts[0]:,}: all need the same data"
        )


def _whole(model: MaskedModel, config: PretrainConfig, device: torch.device, world: Distributed) -> MaskedModel:
    """The model, or where it lies in shards a copy of all of it; every process must ask."""
    if parallel_mode(config.parallel, world) != "fsdp":
        return model
    copy = build_model(config).to(device)
    copy.load_state_dict(full_state_dict(model))
    return copy
