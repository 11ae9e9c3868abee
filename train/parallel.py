"""Training by several processes: how they find each other, agree, and share a model.

``torchrun`` starts them and gives each its rank; with one process everything here does nothing. Knows no file and no
stage: :mod:`train.state` saves.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from robuq_core.errors import UserError
from robuq_core.models.dit import DiT
from train.logs import one_line

Parallel = Literal["ddp", "fsdp"]
T = TypeVar("T")

# How long the others wait while the first process does what one can do alone: measure, evaluate, save.
_PATIENCE = timedelta(days=30)
_patient: dist.ProcessGroup | None = None
# Of the thread that writes states while training uses the others.
_saving: dist.ProcessGroup | None = None
# The first process is at work on its own, within :func:`on_first`.
_alone = False

# Recompilations that one function is allowed: blocks that differ in their bits share their code.
_RECOMPILATIONS = 256


class LostProcess(UserError):
    """Another process of the run has ended, and this one cannot go on without it."""


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_joint() -> bool:
    """Whether several processes run this code together, and not only the first, within :func:`on_first`."""
    return world_size() > 1 and not _alone


def saving_group() -> dist.ProcessGroup | None:
    return _saving


def training_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if dist.is_initialized() else torch.device("cuda")


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that ``torchrun`` started beside this one, and part from them at the end.

    Does nothing in a lone process, and inside another such block.

    Raises LostProcess: one of the others has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    global _patient, _saving
    _patient, _saving = (dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2))
    try:
        yield
    except BaseException as error:
        # torchrun ends all processes as soon as one has ended: not before each has said why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if _is_lost_connection(error):
            raise LostProcess(
                f"process {rank()} of {world_size()} lost another one ({one_line(error, 120)}); see what ended that "
                "one, and run again: training continues from the last saved state"
            ) from error
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _is_lost_connection(error: BaseException) -> bool:
    """Gloo says so in a plain ``RuntimeError`` that names its source file; NCCL and the store in their own kinds."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def end(code: int) -> NoReturn:
    """End this process with ``code``, at once.

    Python's own end waits for nothing: a thread of gloo that lets go of a tensor meanwhile asks for the interpreter's
    lock, and the process aborts. ``destroy_process_group`` does not end those threads where anything, such as a cache
    of DTensor's, still holds their group.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(code)


def stop_all(error: UserError) -> NoReturn:
    """Raise ``error``, which every process knows of; those after the first end without repeating it."""
    if rank():
        raise SystemExit(2) from error
    raise error


def on_first(action: Callable[[], object]) -> None:
    """Run ``action`` in the first process while the others wait, for as long as it takes.

    Within such an action it just runs the inner one: the others would not know what to wait for.

    Raises UserError: the action's, in the first process; the others end.
    """
    global _alone
    if _alone:
        action()
        return
    failure: UserError | None = None
    if rank() == 0:
        _alone = True
        try:
            action()
        except UserError as error:
            failure = error
        finally:
            _alone = False
    if world_size() > 1:
        failed = torch.tensor([failure is not None])
        dist.broadcast(failed, 0, group=_patient)
        if failed and failure is None:
            failure = UserError("the first process says what went wrong")
    if failure is not None:
        stop_all(failure)


def sharing() -> tuple[int, int]:
    """Number of this process, and of how many that share the work: within :func:`on_first` one works alone."""
    return (0, 1) if _alone else (rank(), world_size())


def from_first(action: Callable[[], T]) -> T:
    """What ``action`` gives in the first process, in all of them. Raises UserError: as :func:`on_first`."""
    found: list[Any] = [None]

    def keep() -> None:
        found[0] = action()

    on_first(keep)
    if is_joint():
        dist.broadcast_object_list(found, 0, group=_patient)
    result: T = found[0]
    return result


def any_of(problem: str | None) -> str | None:
    """The problem of the first process that has one, in all of them."""
    found: list[str | None] = [problem]
    if is_joint():
        found *= world_size()
        dist.all_gather_object(found, problem, group=_patient)
    return next((each for each in found if each is not None), None)


def agree(losses: Tensor, asked_to_stop: signal.Signals | None) -> tuple[list[float], signal.Signals | None]:
    """The means over all processes of ``losses [n]``, and the signal that any of them has got.

    All of them thus stop after the same step, and none continues with a loss that is not finite in one. Waits for the
    device once.
    """
    if world_size() == 1:
        return losses.tolist(), asked_to_stop
    numbers = (signal.SIGTERM, signal.SIGINT)
    asked = torch.tensor([float(asked_to_stop == number) for number in numbers], dtype=torch.float64)
    message = torch.cat([losses.double(), asked.to(losses.device)])
    dist.all_reduce(message)
    found = message.tolist()
    votes = found[len(losses) :]
    means = [total / world_size() for total in found[: len(losses)]]
    return means, next((n for n, vote in zip(numbers, votes, strict=True) if vote), None)


def checkpoint_blocks(model: DiT) -> None:
    """Let each block of ``model`` keep its input alone and compute the rest again in the backward pass."""
    for block in model.blocks:
        # Nothing in a block is random. The names of parameters and modules stay what they are.
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again


def spread(
    model: DiT, how: Parallel, compiled: bool, device: torch.device, *, bf16_gradients: bool = False
) -> Callable[..., Tensor]:
    """Share ``model``, already on ``device``, between the processes; returns what to call in its place.

    ``ddp``: every process holds all of it, and gradients are averaged as they come. ``fsdp``: each holds a slice of
    every matrix, gathered block by block when needed; the parameters of ``model`` become DTensors.
    ``bf16_gradients``: gradients travel between the processes in bfloat16: half the traffic, rounded once.
    """
    if world_size() == 1:
        return torch.compile(model) if compiled else model
    if compiled:
        # Block by block: gathering and averaging then run beside the compiled code of other blocks.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    empty = {p for p in model.parameters() if not p.numel()}
    if how == "fsdp":
        # What each process computed to begin with may differ in its last bit between kinds of processors.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.contiguous()  # the factors that come of an SVD are not
            dist.broadcast(tensor.data, 0)
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if bf16_gradients else None)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=empty)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=empty)
        return model
    if not any(p.requires_grad for p in model.parameters()):
        return model
    for parameter in empty:  # a low-rank branch of rank 0 has no gradient to wait for
        parameter.requires_grad_(False)
    shared = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if bf16_gradients:
        shared.register_comm_hook(None, lambda _, bucket: _mean_in_bf16(bucket.buffer()))
    return shared


def _mean_in_bf16(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """As torch's ``bf16_compress_hook``, which refuses gloo."""
    rounded = (gradients / world_size()).to(torch.bfloat16)
    sums = dist.all_reduce(rounded, async_op=True).get_future()
    mean: torch.futures.Future[Tensor] = sums.then(lambda done: gradients.copy_(done.value()[0]))
    return mean


def without_averaging(forward: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    """Leave the gradients of a part of a batch in the process, to be averaged with those of the last part."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients of ``model`` to a Euclidean norm of at most ``limit``; returns the norm before, a scalar."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
