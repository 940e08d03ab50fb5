"""How a model is made to compute: recomputed, compiled, replicated or sharded; composed here, in this order."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pixmim.config import ParallelConfig
from pixmim.training.distributed import Distributed
from pixmim.training.precision import Precision
from pixmim.utils.errors import UserError, first_line

ParallelMode = Literal["none", "ddp", "fsdp"]


def parallel_mode(config: ParallelConfig, world: Distributed) -> ParallelMode:
    """How a model is spread over the processes of a run; one process keeps it whole whatever `config` says."""
    if world.size == 1:
        return "none"
    return "ddp" if config.strategy == "auto" else config.strategy


def transformer_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Return the transformer blocks of encoder and decoder: the children of modules named `blocks`, `blocks1` ..."""
    for name, child in model.named_modules():
        if name.rpartition(".")[2].startswith("blocks"):
            yield from child.children()


def parallelize(
    model: nn.Module, config: ParallelConfig, world: Distributed, device: torch.device, precision: Precision
) -> nn.Module:
    """The module that a step calls in place of `model`, which stays the one whose weights are trained and saved.

    1. recompute  each block forgets its activations
    2. compile    each block, or the whole model: in place, so that names in checkpoints stay
    3. shard or replicate  FSDP2 shards block by block, so that one is gathered while another computes; weights travel
       in the run's precision and gradients in float32. DDP sums gradients while others are still computed

    To be called before the optimizer is made, which must see the shards. Raises UserError.
    """
    if config.recompute:
        for block in transformer_blocks(model):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if config.compile != "none":
        for part in transformer_blocks(model) if config.compile == "blocks" else [model]:
            part.compile(fullgraph=True, dynamic=False)

    how = parallel_mode(config, world)
    if how == "ddp":
        # Buffers are constants (masks of windows, indices): they need not be sent about in each step.
        with warnings.catch_warnings():
            # Its successor does not exist in all releases that are supported.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if how == "fsdp":
        if precision == "fp16":
            raise UserError("--config.strategy fsdp computes in bf16 or fp32: choose a --precision, or ddp")
        mesh = init_device_mesh(device.type, (world.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # autocast decides what is computed in which precision
        )
        for block in transformer_blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


@contextmanager
def step_context(config: ParallelConfig) -> Iterator[None]:
    """Run the steps of a model that `parallelize` has prepared. Raises UserError if it cannot be compiled."""
    with warnings.catch_warnings():
        # Predictions are a slice of what the decoder returns, and nothing writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        if config.compile == "none":
            yield
            return
        from torch._dynamo.exc import TorchDynamoException  # takes seconds

        try:
            # Each stage of a Swin, in training and in evaluation, is a graph of its own: more than torch's limit of 8.
            with torch._dynamo.config.patch(recompile_limit=64):
                yield
        except TorchDynamoException as error:
            raise UserError(
                f"torch.compile fails here ({first_line(error)}): leave out --config.compile {config.compile}"
            ) from error


def sync_last_microbatch(network: nn.Module, last: bool) -> AbstractContextManager[object]:
    """What a part of a batch is computed in: gradients are summed over the processes with the last part only."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    elif isinstance(network, DistributedDataParallel) and not last:
        return cast(AbstractContextManager[object], network.no_sync())
    return nullcontext()


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model, in full on every process, whether or not it is sharded; all of them must ask."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return cast(dict[str, torch.Tensor], state)
