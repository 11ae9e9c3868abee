"""Post-training quantisation against the teacher: no data set, minutes on a CPU.

The teacher's own samples say what its layers see. Two stages, of which the second is optional:

*Layer by layer*, in the order of the network, each linear is fitted in closed form to the teacher's output from the
student's own inputs, so that it mends what the layers before it did. With rotated inputs t of the teacher's layer, u of
the student's, and q = Q_a(u), eq. (4), R, A, B and b' minimise ``E |(W t + b) - (R q + A B u + b')|^2``. In turns, on
centred inputs:

1. ``R* = argmin E |W t - A B u - R q|^2 + ridge |R - (W - A B)|^2``, linear least squares; targets from the teacher's
   inputs, as in arXiv 2504.02692.
2. ``R = s K`` on the grid of the planes: cyclic coordinate descent on the codes K in the metric ``H = E q q^T + ridge``
   (arXiv 2309.01885), then the least-squares step s of each row.
3. ``A B``: what R leaves over, regressed on u at reduced rank (Izenman 1975).

Last, ``b'`` makes the means equal. *End to end*, steps of Adam on s, A, B and b' take the prediction to that of the
teacher; the codes stay.

One file, since both stages work on the same layers and points, and nothing else uses them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robuq_core.checkpoint import FORMAT_VERSION, Header
from robuq_core.config import DiffusionConfig, QuantConfig, SamplerConfig
from robuq_core.convert import PACKED_SUFFIX, Progress, pack_untrained, untrained_quant
from robuq_core.errors import UserError
from robuq_core.kernels.ops import TernaryLayer
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.models.adapters import Weights
from robuq_core.models.dit import DiT, DiTBlock, patchify
from robuq_core.models.quant_linear import LinearQuantizer, QuantLinear, check_bits, is_adaln
from robuq_core.models.shapes import layer_shapes
from robuq_core.params import RowSpec
from robuq_core.pipeline import Sampler
from robuq_core.quant.activation import fake_quantize_activation, straight_through
from robuq_core.quant.lowrank import truncated_svd
from robuq_core.quant.ternary import planes_of_levels, ternary_planes

METHOD = "post-training quantisation, calibrated on the teacher's own samples"

_FEWEST_STEPS, _MOST_STEPS = 8, 16  # of the trajectories that inputs are taken from
_INPUTS_PER_IMAGE = 5
_TOKENS = 32_768  # of a layer's inputs: some multiple of the widest layer's width
_FEWEST_INPUTS, _MOST_INPUTS = 128, 2048
_HELD_OUT, _OTHER_SEED = 32, 2**31
_BATCH_TOKENS = 2048
_STEP_TOKENS = 1024
_CONDITIONS = 4096
_ROUNDS, _SWEEPS = 2, 2
_RIDGE = 1.0  # of the mean squared input; with few inputs less fits them and no others
_COLUMNS = 128
_SMALLEST = 1e-12
_LR, _WARMUP = 1e-3, 10


@dataclass(frozen=True)
class Calibration:
    """``steps`` of Adam, end to end; 0 leaves that stage out, and with it memory for the whole network unpacked.
    ``inputs``: how many (x_t, t, class) of the teacher's samples; None: by the number of tokens."""

    steps: int = 200
    inputs: int | None = None
    seed: int = 0


class Points(NamedTuple):
    """Inputs of the network: ``x [N, C, H, W]``, ``timesteps [N]``, ``classes [N]``."""

    x: Tensor
    timesteps: Tensor
    classes: Tensor


class GridLinear(QuantLinear):
    """A :class:`QuantLinear` with codes of its own: ``weight [out, in]`` holds them, in units of ``step [out]``."""

    step: nn.Parameter

    @classmethod
    def of(cls, linear: QuantLinear) -> GridLinear:
        """``linear``, in place, on the grid that its rule gives."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.step = nn.Parameter(torch.ones_like(linear.bias))
        linear.weight.requires_grad_(False)
        linear.weight.data, linear.step.data = linear.rounded(linear.weight)
        return linear

    @property
    def top(self) -> int:
        return int(3**self.weight_planes - 1) // 2

    def rounded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of ``weight [out, in]`` and the step of each row as :func:`robuq_core.quant.ternary.ternary_planes`
        chooses it."""
        _, alpha = ternary_planes(weight, self.weight_planes, self.weight_scale)
        step = alpha[-1].clamp(min=_SMALLEST)
        return (weight / step[:, None]).round().clamp(-self.top, self.top), step

    def planes(self) -> tuple[Tensor, Tensor]:
        return planes_of_levels(self.weight, self.step.detach(), self.weight_planes)

    def quantized(self) -> Tensor:
        codes, alpha = self.planes()
        value = codes[0] * alpha[0][:, None]
        for p in range(1, self.weight_planes):
            value += codes[p] * alpha[p][:, None]
        return straight_through(self.weight * self.step[:, None], value)

    def inputs_of(self, theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, u and q of the module's equation for inputs ``[..., K]`` of the teacher's layer and of this one."""
        rotated = self.rotation(ours)
        return self.rotation(theirs), rotated, fake_quantize_activation(rotated, self.bits, self.grid, self.activation)


class Moments:
    """Second moments of a layer's rotated inputs about their means, accumulated batch by batch."""

    def __init__(self, width: int) -> None:
        self._count, self._sums, self._products = 0, torch.zeros(3, width), torch.zeros(5, width, width)

    def add(self, t: Tensor, u: Tensor, q: Tensor) -> None:
        """Inputs ``[..., K]`` of the teacher, of the student, and the student's quantised."""
        t, u, q = (each.flatten(0, -2) for each in (t, u, q))
        self._count += len(u)
        for total, each in zip(self._sums, (t, u, q), strict=True):
            total += each.sum(0)
        for total, (a, b) in zip(self._products, ((t, q), (t, u), (u, q), (u, u), (q, q)), strict=True):
            total.addmm_(a.T, b)

    def central(self) -> tuple[Tensor, Tensor]:
        """Means of t, u and q ``[3, K]``; about them ``E t q^T``, ``t u``, ``u q``, ``u u``, ``q q``, ``[5, K, K]``."""
        t, u, q = means = self._sums / self._count
        products = self._products / self._count
        for product, (a, b) in zip(products, ((t, q), (t, u), (u, q), (u, u), (q, q)), strict=True):
            product.addr_(a, b, alpha=-1)
        return means, products


def _with_ridge(moments: Tensor) -> tuple[float, Tensor, Tensor]:
    """The ridge, the matrix with it on its diagonal, and the Cholesky factor of that."""
    ridge = max(_RIDGE * float(moments.diagonal().mean()), _SMALLEST)
    metric = moments + ridge * torch.eye(len(moments))
    return ridge, metric, torch.linalg.cholesky(metric)


@torch.no_grad()
def fit(layer: GridLinear, linear: nn.Linear, moments: Moments) -> None:
    """Give ``layer`` codes, steps, low-rank factors and bias as the module says, for the teacher's ``linear``."""
    (t, u, q), (tq, tu, uq, uu, qq) = moments.central()
    weight, rank = layer.rotation(linear.weight), layer.rank
    a, b = layer.lowrank_a.detach(), layer.lowrank_b.detach()
    ridge_q, metric, factor_q = _with_ridge(qq)
    ridge_u, _, factor_u = _with_ridge(uu)
    levels = step = torch.empty(0)
    for i in range(_ROUNDS):
        rest = weight - a @ b
        target = torch.cholesky_solve((weight @ tq - a @ (b @ uq) + ridge_q * rest).T, factor_q).T
        if i == 0:
            levels, step = layer.rounded(target)
        for _ in range(_SWEEPS):
            descend(levels, step, target, metric, layer.top)
            seen = levels @ metric
            step = ((seen * target).sum(1) / (seen * levels).sum(1).clamp(min=_SMALLEST)).clamp(min=_SMALLEST)
        if rank:
            ternary = levels * step[:, None]
            rest = weight @ tu - ternary @ uq.T + ridge_u * (weight - ternary)
            whole = torch.cholesky_solve(rest.T, factor_u).T
            left, size, right = truncated_svd(whole @ factor_u, rank)
            a = left * size.sqrt()
            b = torch.linalg.solve_triangular(factor_u, size.sqrt()[:, None] * right, upper=False, left=False)
            a, b = (each.bfloat16().float() for each in (a, b))
    layer.weight.data, layer.step.data = levels, step
    layer.lowrank_a.data, layer.lowrank_b.data = a, b
    layer.bias.data = linear.bias + weight @ t - layer.quantized() @ q - a @ (b @ u)


def descend(levels: Tensor, step: Tensor, target: Tensor, metric: Tensor, top: int) -> None:
    """One sweep over the columns of ``levels [out, in]``, in place: each becomes the best for the others as they are.

    Minimises ``(R* - s K) H (R* - s K)^T`` of each row.
    """
    gradient = (target - step[:, None] * levels) @ metric
    for first in range(0, len(metric), _COLUMNS):
        block = slice(first, min(first + _COLUMNS, len(metric)))
        # Column by column in the block; the columns after it hear of all its changes at once.
        inner, local, codes = metric[block, block], gradient[:, block].T.contiguous(), levels[:, block].T.contiguous()
        moved = torch.empty_like(codes)
        for j in range(len(codes)):
            code = (codes[j] + local[j] / (inner[j, j] * step)).round_().clamp_(-top, top)
            torch.mul(code - codes[j], step, out=moved[j])
            local[j + 1 :].addr_(inner[j, j + 1 :], moved[j], alpha=-1)
            codes[j] = code
        levels[:, block] = codes.T
        gradient[:, block.stop :] -= moved.T @ metric[block, block.stop :]


def _conditions(teacher: DiT, timesteps: Tensor, classes: Tensor) -> Tensor:
    """What adaLN sees before its SiLU, ``[N, D]``."""
    return teacher.t_embedder(timesteps) + teacher.y_embedder(classes)  # type: ignore[no-any-return]


@torch.no_grad()
def _run(blocks: Sequence[DiTBlock], tokens: Tensor, conditions: Tensor) -> Tensor:
    """What ``blocks`` make of ``tokens [N, L, D]``, batch by batch."""
    parts = []
    for part, condition in _batches(tokens, conditions):
        for block in blocks:
            part = block(part, condition)
        parts.append(part)
    return torch.cat(parts)


def _batches(tokens: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, _BATCH_TOKENS // tokens.shape[1])
    return zip(*(torch.split(each, size) for each in (tokens, *others)), strict=True)


class _SeenError(Exception):
    """Ends a forward at the layer whose input was wanted."""


def _input_of(block: DiTBlock, name: str, tokens: Tensor, conditions: Tensor) -> Tensor:
    """What the linear ``name`` of ``block`` sees of ``tokens [B, L, D]``."""
    found: list[Tensor] = []

    def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0])
        raise _SeenError

    hook = block.get_submodule(name).register_forward_pre_hook(see)
    try:
        block(tokens, conditions)
    except _SeenError:
        return found[0]
    finally:
        hook.remove()
    raise AssertionError(f"{name} was not reached")


def _student_block(block: DiTBlock, prefix: str, quantize: LinearQuantizer, quantized_attention: bool) -> DiTBlock:
    student = copy.deepcopy(block)
    student.attn.quantized = quantized_attention
    for name, linear in list(student.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(student.get_submodule(parent), child, GridLinear.of(quantize(f"{prefix}{name}", linear)))
    return student


def _grid_linears(block: DiTBlock) -> dict[str, GridLinear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, GridLinear)}


def _tune(
    students: Sequence[DiTBlock],
    final: nn.Module,
    embedded: Tensor,
    conditions: Tensor,
    targets: Tensor,
    settings: Calibration,
    on_layer: Progress | None,
) -> None:
    """Adam on the squared error of ``final`` after ``students`` on ``embedded [N, L, D]``, against ``targets``."""
    linears = [linear for student in students for linear in _grid_linears(student).values()]
    groups: list[dict[str, Any]] = []
    for linear in linears:
        groups.append({"params": [linear.bias, linear.lowrank_a, linear.lowrank_b], "lr": _LR})
        groups.append({"params": [linear.step], "lr": _LR * float(linear.step.detach().mean())})
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimiser.param_groups]
    size = max(1, _STEP_TOKENS // embedded.shape[1])
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        share = min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * share
        rows = torch.randint(0, len(embedded), (size,), generator=generator)
        tokens = embedded[rows]
        for student in students:
            tokens = student(tokens, conditions[rows])
        loss = (final(tokens, conditions[rows]) - targets[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if on_layer is not None:
            on_layer(f"step {step + 1} of {settings.steps}")


@torch.no_grad()
def own_points(teacher: DiT, diffusion: DiffusionConfig, defaults: SamplerConfig, count: int, seed: int) -> Points:
    """``count`` inputs that ``teacher`` gets while it samples random classes with its default sampler and guidance.

    Trajectories have from 8 to 16 steps, so that many timesteps are seen. The more its prediction moves the sample, the
    more likely an input is taken: near t = 0 errors of a prediction are large and change nothing. Under guidance every
    second one is that of no class; else a tenth, where the network has such a row.
    """
    config = teacher.config
    header = Header(format_version=FORMAT_VERSION, model=config, quant=QuantConfig(), diffusion=diffusion,
                    sampler=defaults, tensors={})  # fmt: skip
    sampler = Sampler(teacher, header, checkpoint_name="teacher", backend_name="torch", weight_bytes=0)
    generator = torch.Generator().manual_seed(seed)
    images = -(-count // _INPUTS_PER_IMAGE)
    seeds = torch.randint(0, 2**32, (images,), generator=generator).tolist()
    classes = torch.randint(0, config.valid_classes, (images,), generator=generator).tolist()
    lengths = torch.randint(_FEWEST_STEPS, _MOST_STEPS + 1, (images,), generator=generator).tolist()
    found: list[tuple[Tensor, float, int]] = []
    moves: list[float] = []
    size = max(1, _BATCH_TOKENS // config.num_tokens)
    for first in range(0, images, size):
        rows = [
            sampler.start(RowSpec(classes[i], seeds[i], lengths[i], defaults.guidance_scale, defaults.sampler))
            for i in range(first, min(first + size, images))
        ]
        while running := [row for row in rows if not row.done]:
            for row in running:
                found.append((row.x, row.timestep, row.spec.class_id))
                coefficients = row.coefficients[row.steps_done]
                moves.append(abs(coefficients.on_x0 * coefficients.x0_on_output))
            sampler.step(running)
    chosen = torch.multinomial(torch.tensor(moves), count, generator=generator).tolist()
    x, timesteps, labels = zip(*(found[i] for i in chosen), strict=True)
    drawn = torch.tensor(labels)
    if config.can_guide:
        share = 0.5 if defaults.guidance_scale != 1 else 0.1
        drawn = torch.where(torch.rand(count, generator=generator) < share, config.null_row, drawn)
    return Points(torch.stack(x), torch.tensor(timesteps), drawn)


@torch.no_grad()
def _fit_block(
    student: DiTBlock, block: DiTBlock, pairs: Tensor, theirs: Tensor, ours: Tensor, conditions: Tensor
) -> None:
    """Fit the linears of ``student`` in order, adaLN before what it modulates, for tokens ``[N, L, D]`` of teacher
    and student."""
    linears, originals = _grid_linears(student), dict(block.named_modules())
    for name, linear in sorted(linears.items(), key=lambda item: not is_adaln(item[0])):
        inputs = (
            (_input_of(block, name, t, c), _input_of(student, name, u, c))
            for t, u, c in _batches(theirs, ours, conditions)
        )
        original, moments = originals[name], Moments(linear.rotation.width)
        assert isinstance(original, nn.Linear)
        for t, u in [(pairs, pairs)] if is_adaln(name) else inputs:
            moments.add(*linear.inputs_of(t, u))
        fit(linear, original, moments)


def calibrate(
    settings: Calibration,
    weights: Weights,
    quant: QuantConfig,
    defaults: SamplerConfig,
    on_layer: Progress | None = None,
) -> tuple[dict[str, TernaryLayer], dict[str, Any]]:
    """The packed block linears of ``weights``, calibrated, and what the provenance should say of it.

    ``relative_error_on_own_samples`` there: as :attr:`robuq_core.convert.PackedResult.relative_error`, on trajectories
    that were not calibrated on. ``defaults``: sampler and guidance of the trajectories. ``on_layer``: called with a
    layer's name when it is fitted, then with the number of each step.

    Raises WeightsError, ValueError: as :func:`robuq_core.convert.quantize_layers`. UserError: the teacher's own samples
    are not finite.
    """
    config = weights.config
    check_bits(quant, layer_shapes(config))
    teacher = weights.model(mapped=True).eval().requires_grad_(False)
    count = settings.inputs or min(max(_TOKENS // config.num_tokens, _FEWEST_INPUTS), _MOST_INPUTS)
    diffusion = weights.diffusion or DiffusionConfig()
    seen = own_points(teacher, diffusion, defaults, count, settings.seed)
    held_out = own_points(teacher, diffusion, defaults, _HELD_OUT, settings.seed + _OTHER_SEED)
    x, timesteps, classes = (torch.cat(both) for both in zip(seen, held_out, strict=True))
    if not bool(x.isfinite().all()):
        raise UserError(f"{weights.path}: samples of its network are not finite; use trained weights")
    with torch.no_grad():
        embedded = teacher.x_embedder(patchify(x, config.patch_size)) + teacher.pos_embed
        conditions = _conditions(teacher, timesteps, classes)
        # adaLN sees one row an input, so it gets more of them: they cost no trajectory.
        drawn = torch.randint(0, count, (2, _CONDITIONS), generator=torch.Generator().manual_seed(settings.seed))
        pairs = F.silu(_conditions(teacher, timesteps[drawn[0]], classes[drawn[1]]))
    theirs = ours = embedded
    students: list[DiTBlock] = []
    layers: dict[str, TernaryLayer] = {}
    quantize = LinearQuantizer(quant)
    for i, block in enumerate(teacher.blocks):
        assert isinstance(block, DiTBlock)
        student = _student_block(block, f"blocks.{i}.", quantize, quant.attention_bits is not None)
        _fit_block(student, block, pairs, theirs[:count], ours[:count], conditions[:count])
        theirs, ours = _run([block], theirs, conditions), _run([student], ours, conditions)
        if settings.steps:
            students.append(student)
        else:
            layers |= _packed(student, i)
        if on_layer is not None:
            on_layer(f"block {i}")
    targets = teacher.final_layer(theirs, conditions)
    if settings.steps:
        seen_of = (embedded[:count], conditions[:count], targets[:count])
        _tune(students, teacher.final_layer, *seen_of, settings, on_layer)
        for i, student in enumerate(students):
            layers |= _packed(student, i)
        ours = _run(students, embedded, conditions)
    found = teacher.final_layer(ours[count:], conditions[count:])
    size = float(targets[count:].norm())
    error = float((found - targets[count:]).norm()) / size if size else None
    said = {
        "method": METHOD,
        "relative_error_on_own_samples": error,
        "calibration": {**asdict(settings), "inputs": count},
    }
    return layers, said


def pack_calibrated(
    source: Path,
    target: Path,
    settings: Calibration,
    quant: Mapping[str, Any],
    defaults: Mapping[str, Any],
    **options: Any,
) -> Header:
    """Calibrate the full-precision weights of ``source`` and pack them into ``target``.

    ``quant``: arguments of :func:`robuq_core.convert.untrained_quant`. ``defaults``: fields of ``SamplerConfig``.
    ``options``: as :func:`robuq_core.convert.pack_untrained`.

    Raises UserError: ``target`` is not called as a packed file, or as :func:`calibrate`. WeightsError, CheckpointError,
    ValueError: as :func:`robuq_core.convert.pack_untrained`.
    """
    if target.suffix.lower() != PACKED_SUFFIX:
        raise UserError(f"{target}: a packed file ends in {PACKED_SUFFIX}")
    sampler, quantize = SamplerConfig.model_validate(dict(defaults)), partial(calibrate, settings)
    return pack_untrained(
        source, target, untrained_quant(**quant), sampler=sampler, quantize=quantize, **options
    ).header


def _packed(student: DiTBlock, block: int) -> dict[str, TernaryLayer]:
    return {f"blocks.{block}.{name}": pack_layer(linear) for name, linear in _grid_linears(student).items()}
