"""Prepare a model for training: recompute activations, compile, replicate (DDP) or shard (FSDP2), in this order."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from pixmim.config import ParallelConfig
from pixmim.training.distributed import Distributed
from pixmim.training.optim import SyncFreeOptimizer
from pixmim.training.precision import Precision
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.files import cache_path

ParallelMode = Literal["none", "ddp", "fsdp"]
Module = TypeVar("Module", bound=nn.Module)


def parallel_mode(config: ParallelConfig, world: Distributed) -> ParallelMode:
    """Resolve the parallel strategy; "none" for a single process."""
    if world.size == 1:
        return "none"
    return "ddp" if config.strategy == "auto" else config.strategy


def choose_compilation(config: ParallelConfig, model: nn.Module, device: torch.device) -> tuple[ParallelConfig, str]:
    """Resolve `compile`, and compile a sum to test the compiler.

    "auto" is "blocks" on a CUDA GPU if the model has blocks, and otherwise "none". Compiled code is kept for the next
    run in $TORCHINDUCTOR_CACHE_DIR: by default in pixmim's cache directory, since torch's own default, in /tmp, does
    not outlive a job or a reboot.

    Returns:
        The configuration for `parallelize` and `step_context`, and a line to print if there is no working compiler.

    Raises:
        UserError: If a flag about blocks does not go with the model.
    """
    kind, blocks = config.compile, list(transformer_blocks(model))
    if not blocks and (config.recompute or kind == "blocks"):
        raise UserError(
            "this model has no blocks to recompute or compile: leave out --parallel.recompute, and use "
            "--parallel.compile full or none"
        )
    if config.recompute and any(batch_norms(block) for block in blocks):
        raise UserError("--parallel.recompute would count each image twice in batch norms: leave it out")
    if config.recompute and any(_drops(module) for block in blocks for module in block.modules()):
        raise UserError(
            "--parallel.recompute would drop other values in the backward pass than in the forward pass: leave it out, "
            "or the rates of --model.options"
        )
    if kind == "auto":
        kind = "blocks" if device.type == "cuda" and blocks else "none"
    if kind != "none":
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_path("compiled", torch.__version__)))
        try:
            torch.compile(lambda x: (x + 1).sin())(torch.ones(8, device=device))
        except Exception as error:  # of Dynamo, Triton, or the operating system
            line = f"warning: torch.compile does not work on this machine, so nothing is compiled: {first_line(error)}"
            return replace(config, compile="none"), line
    return replace(config, compile=kind), ""


def transformer_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformer blocks of encoder and decoder: the children of modules named `blocks`, `blocks1` ..."""
    for name, child in model.named_modules():
        if name.rpartition(".")[2].startswith("blocks"):
            yield from child.children()


def _drops(module: nn.Module) -> bool:
    """Return True for dropout and stochastic depth that are in use."""
    return (isinstance(module, nn.Dropout) and module.p > 0) or (getattr(module, "drop_prob", None) or 0) > 0


def parallelize(
    model: nn.Module, config: ParallelConfig, world: Distributed, device: torch.device, precision: Precision
) -> nn.Module:
    """Return the module to call in place of `model`, whose own parameters are trained and saved.

    `config` is from `choose_compilation`. Call it before the optimizer is created, which must see the shards.
    Compilation is in place, so that names in checkpoints stay. FSDP2 shards block by block, so that one is gathered
    while another computes; weights are gathered in the precision of the run, and gradients are reduced in float32.

    Raises:
        UserError: If the precision does not go with the strategy.
    """
    blocks = list(transformer_blocks(model))
    if config.recompute:
        for block in blocks:
            block.forward = recomputed(block.forward)
    parts = {"blocks": blocks, "full": [model]}
    for part in parts.get(config.compile, []):
        part.compile(fullgraph=True, dynamic=False)

    mode = parallel_mode(config, world)
    if mode == "ddp":
        with warnings.catch_warnings():
            # Its successor does not exist in all supported releases.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            # Buffers are constants (masks of windows, indices), or averaged by `settle_statistics`.
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if mode == "fsdp":
        if precision == "fp16":
            raise UserError("--parallel.strategy fsdp needs --precision bf16 or fp32; for fp16 use ddp")
        mesh = init_device_mesh(device.type, (world.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # autocast decides the precision of each operation
        )
        for module in [*blocks, model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a forward pass that keeps its inputs only. A Python function: torch.compile does not trace a `partial`."""

    def recompute(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return result

    return recompute


@contextmanager
def step_context(config: ParallelConfig) -> Iterator[None]:
    """Run the steps of a model that `parallelize` has prepared. Raises UserError if it cannot be compiled."""
    with warnings.catch_warnings():
        # Predictions are a slice of the decoder's output, and nothing writes to them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        if config.compile not in ("blocks", "full"):
            yield
            return
        from torch._dynamo.exc import TorchDynamoException  # takes seconds

        try:
            # Each stage of a Swin, in training and in evaluation, is a graph of its own: more than torch's limit of 8.
            with torch._dynamo.config.patch(recompile_limit=64):
                yield
        except TorchDynamoException as error:
            raise UserError(f"torch.compile failed ({first_line(error)}): pass --parallel.compile none") from error


def sync_last_microbatch(network: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Return the context of a forward and backward pass that reduces gradients over ranks only in the last part."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    elif isinstance(network, DistributedDataParallel) and not last:
        return cast(AbstractContextManager[object], network.no_sync())
    return nullcontext()


def unsharded(model: Module, build: Callable[[], Module]) -> Module:
    """Return the unsharded model: itself, or under FSDP a full copy, made with `build`. Collective."""
    if not isinstance(model, FSDPModule):
        return model
    copy = build()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    copy.load_state_dict(cast(dict[str, Tensor], state))
    return copy


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model. They use the statistics of the images of one forward pass on one rank."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def batch_norm_notes(model: nn.Module, batch_size: int, parts: int) -> list[str]:
    """Return a line about the statistics of batch norms, if a batch is computed in several parts, over all ranks."""
    if parts == 1 or not batch_norms(model):
        return []
    return [f"batch norms: statistics of {batch_size // parts:,} images at a time, of each part on each process"]


@contextmanager
def trial_step(network: nn.Module, optimizer: Optimizer, reduces: bool = False) -> Iterator[None]:
    """Run a forward and backward pass that leaves no trace in gradients and batch norms.

    Gradients are reduced over the ranks only with `reduces`. DDP sums them in one bucket in its first such pass, and
    from then on in buckets in the order in which gradients arrived. Three or more floats have another sum in another
    order, so a run that resumes would differ from one that continues, unless such a pass comes first in both.
    """
    norms = [norm for norm in batch_norms(network) if norm.training]
    for norm in norms:
        norm.eval()
    try:
        with sync_last_microbatch(network, last=reduces):
            yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        for norm in norms:
            norm.train()


@torch.no_grad()
def settle_statistics(
    norms: list[_BatchNorm],
    buffers: list[Tensor],
    before: list[Tensor],
    optimizer: SyncFreeOptimizer,
    step: int,
    world: Distributed,
) -> None:
    """Set buffers to their values before a bad step, and the statistics of norms to their mean over the ranks.

    A step without a finite gradient, after which the optimizer's streak is above 0, may leave statistics that are not
    finite. Norms whose weights are frozen in the step keep their statistics. Collective.
    """
    if not norms:
        return
    frozen, streak = optimizer.frozen(step), optimizer.state["streak"]
    held = {id(buffer) for norm in norms if id(norm.weight) in frozen for buffer in norm.buffers()}
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value if id(buffer) in held else torch.where(streak > 0, value, buffer))
    statistics = [value for norm in norms for value in norm.buffers() if value.is_floating_point()]
    if world.size > 1 and statistics:
        mean = torch.cat([value.flatten() for value in statistics]) / world.size
        dist.all_reduce(mean)
        for value, part in zip(statistics, mean.split([value.numel() for value in statistics]), strict=True):
            value.copy_(part.view_as(value))
