"""How much memory a training step takes, counted without a GPU and without the data.

The step that :class:`train.trainer.Trainer` takes is run on fake tensors, which have shapes and no contents, while
every allocation and release is counted. What stays from step to step is added up from the parameters. Not counted:
workspaces inside kernels, the allocator's rounding and the CUDA context; leave a tenth of the card for those.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robuq_core.config import QuantConfig
from robuq_core.diffusion.schedule import alphas_cumprod
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import QuantLinear, quantize_model
from train.config import ConfigError, StageConfig, TrainConfig
from train.parallel import checkpoint_blocks
from train.trainer import NoisyBatch, batch_loss, check_shares, repeats_forwards, step_flops

FP32 = 4
# Blocks whose weights FSDP holds whole at once: the one that computes and the next, which is being gathered.
_GATHERED_BLOCKS = 2


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, from ``now`` = 0 on, and their ``peak``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What an operation is given was there before, or has been counted when it was made.
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._seen:
            return
        self._seen.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


# What a process holds at the peak of a step. That is the peak of a step whose gradients are all there, as in every step
# of DDP and of accumulation; a lone process that does not accumulate stays below, because its gradients come while its
# activations go.
COMPONENTS = {
    "weights": "latent weights, embedders, head (FP32)",
    "lowrank": "low-rank factors (FP32)",
    "codes": "ternary codes, held for a step (int8)",
    "constants": "rotations, positions",
    "gradients": "gradients (FP32)",
    "moments": "AdamW's two moments (FP32)",
    "average": "moving averages (FP32)",
    "teacher": "teacher (FP32)",
    "gathered": "weights gathered by FSDP",
    "kept": "kept for the backward pass",
    "temporaries": "temporaries at the peak",
}


def step_memory(
    config: TrainConfig,
    stage: StageConfig,
    quant: QuantConfig | None,
    *,
    world: int = 1,
    bf16: bool = True,
    device: str = "cpu",
) -> dict[str, int]:
    """Bytes of each of :data:`COMPONENTS` at the peak of a step of ``stage``, in one of ``world`` processes.

    ``quant``: how the model is quantised; ``None`` for the teacher's own training. ``bf16``: whether products run in
    bf16 (autocast). ``device``: whose rules of autocast to apply, ``cpu`` or ``cuda``. Raises ConfigError if the batch
    does not divide between the processes.
    """
    check_shares(stage, "batch_size", world)
    rows = stage.batch_size // (world * stage.accumulate)
    model = _shapes(config, quant)
    teacher = _shapes(config, None) if quant is not None and stage.distill_weight else None
    sharded = world if stage.parallel == "fsdp" else 1
    parameters, block = _bytes(model), _bytes(model.blocks[0])
    lowrank = sum(p.numel() for name, p in model.named_parameters() if ".lowrank_" in name) * FP32
    root = parameters - block * len(model.blocks)
    kept, peak = _count_step(config, stage, model, teacher, rows, bf16, device)
    found = {
        "weights": (parameters - lowrank) // sharded,
        "lowrank": lowrank // sharded,
        "codes": _codes(model) if repeats_forwards(stage) and sharded == 1 else 0,
        "constants": sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        "gradients": parameters // sharded,
        "moments": 2 * parameters // sharded,
        "average": (1 + len(stage.more_ema_decays)) * parameters // sharded,
        "teacher": _bytes(teacher) // sharded if teacher is not None else 0,
        # The blocks, the gradient of one before it is shared out, and the root, which stays whole.
        "gathered": (_GATHERED_BLOCKS + 1) * block + root if sharded > 1 else 0,
        "kept": kept,
        "temporaries": peak - kept,
    }
    assert found.keys() == COMPONENTS.keys()
    return found


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters()) * FP32


def _codes(model: nn.Module) -> int:
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return sum(layer.weight.numel() * layer.weight_planes for layer in layers)


def _shapes(config: TrainConfig, quant: QuantConfig | None) -> DiT:
    """The model without its numbers: one block is made, and the others are copies of its shapes."""
    model = DiT(config.model.model_copy(update={"depth": 1}))
    if quant is not None:
        quantize_model(model, quant.model_copy(update={"bits": {}, "lowrank_init": "zero"}))
    model.to("meta")
    model.blocks = nn.ModuleList(copy.deepcopy(model.blocks[0]) for _ in range(config.model.depth))
    return model


def _count_step(
    config: TrainConfig, stage: StageConfig, model: DiT, teacher: DiT | None, rows: int, bf16: bool, device: str
) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the most at any time; without weights and gradients."""
    alphas_cumprod()  # its cache must hold numbers, not shapes
    size = (rows, config.model.in_channels, config.model.input_size, config.model.input_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for each in (model, teacher):
            if each is not None:
                _make_fake(each, device)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        if stage.activation_checkpointing:
            checkpoint_blocks(model)
        images, noise = torch.empty(size, device=device), torch.empty(size, device=device)
        timesteps, classes = (torch.empty(rows, dtype=torch.long, device=device) for _ in range(2))
        batch = NoisyBatch(images, noise, timesteps, classes)
        with LiveBytes() as live:
            context = torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)
            loss = batch_loss(model, batch, config.diffusion, context, teacher, stage.distill_weight)
            kept = live.now
            loss.backward()  # type: ignore[no-untyped-call]
    return kept, live.peak


def _make_fake(model: nn.Module, device: str) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=device))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _stage(config: TrainConfig, name: str) -> StageConfig:
    if name not in ("teacher", "warmup", "qat"):
        raise ConfigError(f"stage {name!r}: not one of teacher, warmup, qat")
    stage: StageConfig = getattr(config, name)
    return stage


def time_line(config: TrainConfig, name: str, world: int, teraflops: float) -> str:
    """How long the stage takes ``world`` processes that each sustain ``teraflops``, as text."""
    stage = _stage(config, name)
    flops = step_flops(config, stage) * stage.steps
    hours = flops / (teraflops * 1e12 * world) / 3600
    return (
        f"Time of {stage.steps} steps: {flops:.3g} operations, {hours:.3g} hours at {teraflops:g} TFLOP/s sustained in "
        f"each of {world} process(es). The log's model_teraflops says what a machine sustains."
    )


def memory_table(config: TrainConfig, name: str, world: int) -> str:
    """The memory of one of ``world`` processes in GB (1e9 bytes), with and without activation checkpointing, as text.

    Products are in bf16 unless ``config.precision`` is ``fp32``. Raises ConfigError if no stage ``name`` trains, or the
    batch does not divide between the processes.
    """
    stage, quant, bf16 = _stage(config, name), None if name == "teacher" else config.quant, config.precision != "fp32"
    columns = []
    for again in (False, True):
        variant = stage.model_copy(update={"activation_checkpointing": again})
        found = step_memory(config, variant, quant, world=world, bf16=bf16)
        columns.append([*found.values(), sum(found.values())])
    lines = [f"{'GB of one process at the peak of a step':<42}{'kept':>12}{'recomputed':>12}"]
    for label, kept, again_kept in zip((*COMPONENTS.values(), "total"), *columns, strict=True):
        lines.append(f"{label:<42}{kept / 1e9:>12.2f}{again_kept / 1e9:>12.2f}")
    configured = "recomputed" if stage.activation_checkpointing else "kept"
    lines += [
        f"{name}: batch_size {stage.batch_size} over {world} process(es) in {stage.accumulate} part(s), "
        f"{'bf16' if bf16 else 'fp32'}, {stage.parallel}; activations are {configured} as configured.",
        "Counted, not measured on a GPU: leave a tenth of the card for its context, workspaces and fragmentation.",
    ]
    return "\n".join(lines)
