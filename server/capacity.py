"""How many replicas a rate of images needs, and the memory of each. See docs/deployment.md."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

from robuq_core.checkpoint import Header, dense_shapes, layer_shapes
from robuq_core.errors import UserError
from robuq_core.images import encode_image
from robuq_core.models.conditioning import TABLE_BYTES
from robuq_core.models.quant_linear import is_adaln
from robuq_core.params import RowSpec
from robuq_core.quant.packing import planar_width
from server.request import rows_of
from server.settings import TARGET_UTILISATION
from server.stepping import Stepper

_FLOAT = 4
_MIN_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """``replicas`` share ``rate`` images per second, of which each draws ``per_replica`` at most; ``spare`` of them may
    be lost without ``utilisation`` being exceeded."""

    rate: float
    per_replica: float
    utilisation: float
    replicas: int
    spare: int

    @property
    def busy(self) -> float:
        """Share of its capacity that every replica uses, all of them there."""
        return self.rate / (self.replicas * self.per_replica)

    @property
    def busy_without_spare(self) -> float:
        """The same with the spare ones lost."""
        return self.rate / ((self.replicas - self.spare) * self.per_replica)

    @property
    def slowdown(self) -> float:
        """Mean time of an image over its time on an idle server, 1 / (1 - rho): processor sharing under Poisson
        arrivals, whatever the distribution of the requests' sizes."""
        return 1 / (1 - self.busy)


def plan_replicas(rate: float, per_replica: float, *, utilisation: float = TARGET_UTILISATION, spare: int = 0) -> Plan:
    """``ceil(rate / (utilisation * per_replica)) + spare`` replicas.

    Args:
        rate: images per second to come, at the busiest time that is to be served well.
        per_replica: images per second of one saturated replica.

    Raises:
        UserError: a number out of range.
    """
    for name, value in (("--rate", rate), ("--images-per-second", per_replica)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} must be a positive number of images per second, not {value:g}")
    if not 0 < utilisation < 1:
        raise UserError(f"--utilisation must be between 0 and 1, such as {TARGET_UTILISATION}, not {utilisation:g}")
    if spare < 0:
        raise UserError(f"--spare must be 0 or more replicas, not {spare}")
    needed = rate / (utilisation * per_replica)
    # A rate that fits exactly must not get one more for a rounding error.
    replicas = max(1, math.ceil(needed - 1e-9 * needed))
    return Plan(rate, per_replica, utilisation, replicas + spare, spare)


@dataclass(frozen=True)
class Memory:
    """Bytes of one replica: its weights, a full batch's activations, the table of modulations, and all else."""

    weights: int
    activations: int
    conditioning: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.conditioning + self.process


def replica_memory(header: Header, rows: int, process_bytes: int) -> Memory:
    """An estimate from a checkpoint's header, for batches of ``rows`` rows of the model.

    Of the activations the widest moment of a block counts, in float32: the residual ``[L, D]``, q, k and v
    ``[L, 3 D]``, the heads ``[L, D]`` and the MLP's hidden layer ``[L, m D]``. A latent model's decoder is not in it.

    Args:
        process_bytes: of a process without a model.
    """
    model = header.model
    token = _FLOAT * model.hidden_size * (5 + model.mlp_ratio)
    conditioning = _FLOAT * (6 * model.depth + 2) * model.hidden_size * 2 * rows
    return Memory(
        weights=weight_bytes(header),
        activations=rows * model.num_tokens * token,
        conditioning=max(TABLE_BYTES, conditioning),
        process=process_bytes,
    )


def weight_bytes(header: Header) -> int:
    """Bytes of the weights as they lie in memory: ternary codes at 2 bits, everything else in float32."""
    quant, total = header.quant, 0
    for name, (outputs, inputs) in layer_shapes(header.model).items():
        rank = quant.adaln_rank if is_adaln(name) else quant.rank
        total += quant.weight_planes * outputs * (planar_width(inputs) + _FLOAT)  # codes and their scales
        total += _FLOAT * (outputs + inputs + rank * (outputs + inputs))  # bias, signs, low rank
    return total + sum(_FLOAT * math.prod(shape) for shape in dense_shapes(header.model).values())


def rows_per_image(guidance_scale: float) -> int:
    """Rows of the model that an image takes in every step."""
    return rows_of(RowSpec(0, 0, 1, guidance_scale, "ddim"))


def measure_rows_per_s(
    sampler: Any, max_batch_rows: int, *, steps: int, guidance_scale: float, seconds: float = 5.0
) -> float:
    """Rows of the model per second that ``sampler`` advances in this process when it always has a full batch.

    Decoding and encoding are included; HTTP, the network and the way to a worker are not. At least three steps are
    measured, however long they take.
    """
    images = max(1, max_batch_rows // rows_per_image(guidance_scale))
    stepper, seeds = Stepper(max_batch_rows), itertools.count()
    batch: list[Any] = []

    def step() -> None:
        for row in [row for row in batch if row.done]:
            encode_image(sampler.decode(row), "png")
            batch.remove(row)
        while len(batch) < images:
            spec = RowSpec(0, next(seeds), steps, guidance_scale, sampler.defaults.sampler)
            batch.append(sampler.start(spec))
        if faulty := stepper.step(sampler, batch):
            raise next(iter(faulty.values()))

    step()  # pays for what is set up once
    stepper.take_measured()
    began = now = time.perf_counter()
    rows = taken = 0
    while now - began < seconds or taken < _MIN_STEPS:
        step()
        rows += sum(forward_rows for forward_rows, _ in stepper.take_measured())
        now, taken = time.perf_counter(), taken + 1
    return rows / (now - began)
