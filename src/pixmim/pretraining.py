"""Pre-training from top to bottom: data, model, optimizer, resume, train, export.

The module is not called `pretrain`: importing `pixmim.pretrain` would replace the function of that name in the package.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from rich.console import Console
from torch import Tensor, nn

from pixmim.build import build_model, image_spec
from pixmim.config import PretrainConfig
from pixmim.config_io import to_json
from pixmim.data import create_loader, open_dataset
from pixmim.data.bad_images import BadImageLog, merge_logs
from pixmim.data.caching import choose_cache_location, decoded_bytes
from pixmim.data.loader import Batch, BatchLoader
from pixmim.data.loader_chain import LoaderChain
from pixmim.data.sampler import BatchShard
from pixmim.data.split import hold_out
from pixmim.evaluation.best import BestEncoder
from pixmim.evaluation.evaluate import online_knn
from pixmim.evaluation.held_out import measure_every, online_held_out
from pixmim.evaluation.visualize import labeled_grid
from pixmim.losses import ReconstructionLoss
from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.models.layer_decay import layer_ids, not_decayed
from pixmim.report.gain import gain_summary
from pixmim.report.reconstruct import reconstruct
from pixmim.run_folder import PretrainResult, check_config, check_length, open_run, report_run
from pixmim.stages import build_stages
from pixmim.training.checkpoint import CheckpointManager, is_multiple_of
from pixmim.training.distributed import Distributed, init_distributed
from pixmim.training.find_batch_size import find_accumulation_steps, out_of_memory_hint
from pixmim.training.metric_logger import end_summary, read_metrics, start_summary
from pixmim.training.optim import Schedule, SyncFreeOptimizer, adamw_by_layer
from pixmim.training.parallelize import (
    batch_norm_notes,
    choose_compilation,
    parallel_mode,
    parallelize,
    step_context,
    trial_step,
    unsharded,
)
from pixmim.training.precision import Precision, autocast, choose_attention, choose_device, choose_precision
from pixmim.training.preemption import Interrupted
from pixmim.training.trackers import Trackers
from pixmim.training.trainer import Trainer
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.console import print_plain
from pixmim.utils.errors import AlreadyReportedError, UserError
from pixmim.utils.files import write_text_atomically
from pixmim.utils.threads import num_threads
from pixmim.utils.torch_defaults import torch_defaults
from pixmim.utils.trust import trust_config
from pixmim.weights.load import initialize_from, resolve_model
from pixmim.weights.save import ENCODER_FOLDER, save_encoder


@torch_defaults()
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

    Writes config.json, metrics.jsonl, skipped.csv and checkpoints/ to `out`, and at the end encoder/ and report.html.
    With `keep_best`, encoder-best/ is the encoder of the best periodic measurement.
    On a CPU, an interrupted and resumed run ends with bitwise the same weights as an uninterrupted one on as many
    ranks. Ctrl-C finishes the step, saves a checkpoint and returns. Under torchrun or Slurm, call it on every rank.

    Args:
        config: Configuration, see `get_recipe`. A missing mean or std is taken from `pixmim stats` if it has run.
        out: Folder of the run; otherwise `config.out`, or a new folder runs/RECIPE-TIME.
        resume: Resume the run in `out` even if its length (`epochs`, `steps`) or the path of its data has changed.
        on_log: Called on rank 0 with each record that is written to metrics.jsonl.
        on_step_end: Called on every rank after each step, with the number of steps done.
        track: Trackers that receive metrics, configuration and reconstructions: "tensorboard", "wandb", "mlflow",
            "trackio". They are configured by their own environment variables. One that fails costs a warning.
        report: Write report.html at the end.
        console: Prints progress; `Console(quiet=True)` prints nothing.
        world: Process group, if the caller has initialized it; otherwise that of torchrun or Slurm.

    Returns:
        The run, with its encoder and metrics.

    Raises:
        UserError: If `out` holds another run or is in use, or the configuration, data or memory do not suffice.
    """
    check_config(config)
    group = init_distributed(config.device, config.parallel.timeout) if world is None else nullcontext(world)
    with group as world, ExitStack() as stack:
        console = Console(quiet=not world.is_main) if console is None else console
        try:
            trackers = Trackers(track, console)
            config, folder = open_run(config, str(out or config.out), world, stack, console, resume=resume)
            stack.enter_context(trackers)
            step, finished = _train(config, folder, world, console, trackers, on_log, on_step_end)
            if finished and world.is_main:
                if report:
                    report_run(folder, console, config.data)
                trackers.log_image(step, "reconstructions", partial(_reconstructions, folder, config))
        except UserError as error:
            if world.claim_once(str(error)):
                raise
            raise AlreadyReportedError(str(error)) from None
    return PretrainResult(config, folder, step, finished)


def compute_loss(
    network: nn.Module,
    criterion: ReconstructionLoss,
    images: Float[Tensor, "b c h w"],
    mask: Mask,
    precision: Precision,
) -> Float[Tensor, ""]:
    """Return the loss of predicting the hidden patches: the algorithm of the paper (arXiv 2303.02416).

    Args:
        network: The masked model, or its DDP wrapper.
        criterion: Target, and the distance to it.
        images: Normalized images, on the device.
        mask: Their masks, on any device.
        precision: Precision of the forward pass. The loss is computed in float32.
    """
    mask = mask.to(images.device)
    with autocast(images.device, precision):
        prediction = network(images, mask)
    return criterion(prediction, images, mask).loss


def _train(
    config: PretrainConfig,
    out: Path,
    world: Distributed,
    console: Console,
    trackers: Trackers,
    on_log: Callable[[dict[str, Any]], None] | None,
    on_step_end: Callable[[int], None] | None,
) -> tuple[int, bool]:
    """Train in a checked and locked folder; return the number of steps done, and whether the run is finished."""
    # Data, masks, model and loss.
    knn = online_knn(config, console)
    data = open_dataset(config.data, image_spec(config), config.shard_cache_gib)
    data, held_out = hold_out(data, config.hold_out, config.seed) if config.hold_out else (data, None)
    config.check_divisible(world.size, "processes")
    counts = world.gather(len(data))
    if len(set(counts)) > 1:
        raise UserError(f"the ranks found {', '.join(f'{n:,}' for n in counts)} images: all need the same dataset")
    device = choose_device(config.device)
    precision = world.broadcast(choose_precision(config.precision, device))  # ranks may have different devices
    model = build_model(config)
    choose_attention(model, device, precision)
    model = model.to(device)

    # Length, and where to start.
    schedule = Schedule.of(config, len(data))
    stages = build_stages(config, model, schedule.steps)
    criteria, last = {stage.size: stage.loss.to(device) for stage in stages}, stages[-1]
    local_ranks = world.local_world_size()
    location, cache_line = choose_cache_location(data, stages[0].crop, config.cache_images, device, local_ranks)
    done = max(CheckpointManager(out / "checkpoints").steps(), default=0)
    notes = check_length(out, schedule, done, len(data))
    if config.init and not done:
        notes = initialize_from(model, config) + notes
    if held_out is not None:
        notes.append(f"{len(held_out):,} images are held out of training: their effective rank is at most that number")
    best = BestEncoder(config, out, schedule.steps, console)

    # Parallelism, optimizer, and parts of a batch that fit in memory.
    parallel, not_compiled = choose_compilation(config.parallel, model, device)
    notes += [not_compiled] * bool(not_compiled)
    network = parallelize(model, parallel, world, device, precision)
    layers, exempt = layer_ids(model.encoder), not_decayed(model.encoder)
    adam = adamw_by_layer(model, layers, config.lr, config.optim, exempt, schedule.decoder)
    optimizer = SyncFreeOptimizer(adam, config.optim.clip, scaling=precision == "fp16", device=device)

    def trial(images: int, reduces: bool = False) -> None:
        noise = torch.randn(images, config.channels, *config.image_size, device=device)
        with trial_step(network, adam, reduces):
            loss = compute_loss(network, last.loss, noise, last.masks(0, range(images)), precision)
            optimizer.backward(loss)

    reserved = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW's moments
    reserved += (decoded_bytes(data) or 0) if location == "gpu" else 0
    with step_context(parallel):
        width = int(model.encoder.num_features)  # type: ignore[arg-type]
        parts = find_accumulation_steps(config, world, device, width, trial, reserved)
        if parallel_mode(config.parallel, world) == "ddp":  # its sums depend on buckets ordered in the first such pass
            trial(-(-config.batch_size // world.size // parts), reduces=True)
    if len(stages) > 1:
        notes.append("image sizes: " + ", ".join(f"{s.size[0]}x{s.size[1]} until step {s.end:,}" for s in stages))
    notes += batch_norm_notes(model, config.batch_size, parts * world.size)

    # Files of the run: only after every setting has been validated.
    config_text = to_json(config)
    if world.is_main:
        write_text_atomically(out / "config.json", config_text)
    trust_config(config_text)
    summary = start_summary(config, len(data), schedule, device, precision, world, parts)
    for line in [*summary, *(f"images: {line}" for line in (data.description, cache_line) if line), *notes]:
        print_plain(console, line)

    def record(metrics: dict[str, Any]) -> None:
        trackers.log(metrics)
        if on_log is not None:
            on_log(metrics)

    trainer = Trainer(
        model,
        optimizer,
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
        trackers.open(out, json.loads(config_text), start)
    if start:
        complete = start >= schedule.steps
        print_plain(console, f"the run is complete at step {start:,}" if complete else f"resuming from step {start:,}")

    # Train.
    mean, std = (torch.tensor(values, device=device) for values in config.normalization)

    def batch_loss(batch: Batch, number: int) -> Tensor:
        images, flip = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.flip))
        images = flip_and_normalize(images, flip, mean, std)
        assert batch.mask is not None
        # Gradients are summed over the parts of a batch, but averaged over the ranks.
        criterion = criteria[images.shape[-2], images.shape[-1]]
        return compute_loss(network, criterion, images, batch.mask, precision) * (batch.weight * world.size)

    measures: list[tuple[float, Callable[[MaskedModel], dict[str, float]]]] = []  # and the steps between two
    if knn is not None:
        measures.append((config.knn.every / trainer.epoch, lambda model: knn(model.encoder)))
    if held_out is not None:
        held_out_loss = online_held_out(config, held_out, last.masks, last.loss, device, precision, world, console)
        measures.append((measure_every(config, schedule.steps, trainer.epoch), held_out_loss))
    interrupted = False

    def measure_at(step: int) -> None:
        nonlocal interrupted
        ends = (0, schedule.steps)
        due = [function for every, function in measures if step in ends or is_multiple_of(step, every)]
        if not due:
            return
        scores: dict[str, float] = {}
        try:
            with trainer.interrupts.waiting(world.size == 1):
                full = unsharded(model, lambda: build_model(config).to(device))
                for function in due:
                    scores |= function(full)
        except Interrupted:
            interrupted = True  # the resumed run measures it
            return
        trainer.log.write({"step": step, "epoch": round(step * trainer.epoch, 6), **scores})
        if world.is_main:
            best.offer(step, scores, full.encoder)
        trainer.log.pause()

    def after_step(step: int) -> None:
        measure_at(step)
        if on_step_end is not None:
            on_step_end(step)

    skipped = out / (f"skipped-{world.rank}.csv" if world.rank else "skipped.csv")
    bad_images = BadImageLog(skipped, len(data), config.max_bad_fraction)

    def open_loader(number: int, part: int) -> BatchLoader[Any, Batch]:
        return create_loader(
            data,
            stages[number].crop,
            BatchShard(config.batch_size, part // parts * config.batch_size, world.rank, world.size, parts),
            location,
            device=device,
            skipped=bad_images,
            flip=config.crop.flip,
            seed=config.seed,
            masks=stages[number].masks.at,
            threads=num_threads(config.threads, processes=local_ranks),
        )

    with (
        LoaderChain(open_loader, [stage.end * parts for stage in stages], start * parts) as loader,
        trainer,
        step_context(parallel),
        out_of_memory_hint(-(-config.batch_size // world.size // parts), parts),
    ):
        measured = [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" not in line]
        if world.broadcast(start not in measured):
            measure_at(start)
        step = trainer.fit(loader, batch_loss, after_step)

    # Export.
    if step < schedule.steps or interrupted:
        return step, False
    encoder = unsharded(model, lambda: build_model(config).to(device)).encoder
    world.gather(None)  # until here, other ranks may still write to their logs of bad images
    if world.is_main:
        save_encoder(encoder, out / ENCODER_FOLDER, config, step, schedule.steps)
        skipped_steps, bad = int(optimizer.state["skipped"].item()), merge_logs(out)
        lines = end_summary(config, step, skipped_steps, bad, len(data), trainer.log.data_wait)
        for line in [*lines, *gain_summary(config, out)]:
            print_plain(console, line)
    return step, True


def _reconstructions(folder: Path, config: PretrainConfig) -> Image:
    """Draw reconstructions of a run's own images."""
    data = open_dataset(config.data, image_spec(config), config.shard_cache_gib)
    drawn = reconstruct(resolve_model(str(folder), with_decoder=True), data)
    return labeled_grid(drawn.columns, drawn.names)
