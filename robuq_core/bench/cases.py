"""The cases of a benchmark: single layers, a block, a forward, whole images, each with our side and the peers'; and a
plan of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robuq_core.bench.fresh import MEMORY_SIDES, as_file, measure_loading, measure_memory
from robuq_core.bench.peers import PEERS, Inputs, prepare
from robuq_core.bench.report import BASELINE, Absent, CaseTiming, Loading, MemoryUse, Report, machine
from robuq_core.bench.source import Source, open_source, plain_network
from robuq_core.bench.timing import Side, Timer, Unavailable, time_sides
from robuq_core.config import NUM_TRAIN_TIMESTEPS, ModelConfig, rows_of
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.ops import Backend, Modulation, Prologue, fused_linear
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import LAYERS, PackedDiT
from robuq_core.models.quant_linear import is_adaln
from robuq_core.models.shapes import layer_macs
from robuq_core.pipeline import Row, RowSpec, Sampler
from robuq_core.staging import taken
from robuq_core.threads import on_one_thread

Level = Literal["op", "block", "forward", "image", "memory", "loading"]
LEVELS: tuple[Level, ...] = get_args(Level)
Result = CaseTiming | MemoryUse | Loading
OURS = "robuq"
# Of one layer: a code on the edge of its cell may fall either way when two backends round sums in another order, and
# with few bits such a flip is as large as a step. In a network every flip moves the values of the layers after it, and
# a low-rank branch in bfloat16 brings more of them. A wrong layer moves either by far more.
MAX_LAYER_ERROR, MAX_NETWORK_ERROR = 0.05, 0.1


@dataclass
class Bench:
    """What every case shares. ``peers``: names out of :data:`~robuq_core.bench.peers.PEERS`."""

    source: Source
    backend: Backend
    timer: Timer
    peers: Sequence[str] = tuple(PEERS)

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @cached_property
    def reference(self) -> Backend:
        return select_backend("reference", device=self.device)

    @cached_property
    def plain(self) -> DiT:
        """The FP32 network."""
        return plain_network(self.config, self.device)

    def ours(self, run: Callable[[PackedDiT, list[int]], Tensor], batch: int) -> Side:
        """``run`` of the packed network on all images, against the reference on the first and the last."""
        ours, reference = self.source.packed(self.backend), self.source.packed(self.reference)
        checked = sorted({0, batch - 1})
        return Side(
            OURS,
            lambda: run(ours, list(range(batch))),
            lambda: run(reference, checked),
            MAX_NETWORK_ERROR,
            own=True,
            images=tuple(checked),
        )

    @torch.inference_mode()
    def time(
        self, level: Level, case: str, batch: int, macs: int, ours: Iterable[Side], module: nn.Module, inputs: Inputs
    ) -> CaseTiming:
        """Ours against the peers' forms of ``module`` on ``inputs``."""
        torch._dynamo.reset()  # else the compiler gives up after a few networks and runs them eagerly
        expected = module(*inputs)
        sides, absent = list(ours), []
        for name in self.peers:
            try:
                call = prepare(PEERS[name], module, inputs, whole=level != "op")
                sides.append(Side(name, call, lambda: expected, PEERS[name].tolerance))
            except Unavailable as reason:
                absent.append(Absent(name=name, reason=str(reason)))
        timings, dropped = time_sides(sides, self.timer)
        return CaseTiming(
            level=level, case=case, batch=batch, macs=macs, sides=tuple(timings), absent=(*absent, *dropped)
        )


def op_case(bench: Bench, layer_name: str, batch: int) -> CaseTiming:
    """One packed linear of block 0: rotation, quantisation, product and low rank against a bare FP32 linear; and its
    two halves alone, the first with the elementwise prologue that it has in the network."""
    layer = bench.source.checkpoint.layers[f"blocks.0.{layer_name}"].to(bench.device)
    rows, width = batch * (1 if is_adaln(layer_name) else bench.config.num_tokens), layer.in_features
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(rows, width, generator=generator).to(bench.device)
    prologue: Prologue = "gelu" if layer_name == "mlp.fc2" else "silu" if is_adaln(layer_name) else None
    if layer_name in ("attn.qkv", "mlp.fc1"):
        shift, scale = (torch.randn(batch, width, generator=generator).to(bench.device) for _ in range(2))
        prologue = Modulation(shift, scale, 1e-6)
    ops, reference = bench.backend, bench.reference
    quantized = ops.rotate_quantize(x, layer)

    def dequantized(backend: Backend) -> Tensor:
        q = backend.rotate_quantize(x, layer, prologue)
        return torch.cat([q.codes * q.scales[:, None], q.lowrank], dim=1)

    def whole(backend: Backend) -> Tensor:
        return fused_linear(backend)(x, layer)

    def product(backend: Backend) -> Tensor:
        return backend.ternary_linear(quantized, layer)

    prepared = Side(
        f"{OURS} prologue",
        lambda: ops.rotate_quantize(x, layer, prologue),
        lambda: dequantized(reference),
        MAX_LAYER_ERROR,
        own=True,
        part=True,
        result=lambda: dequantized(ops),
    )
    sides = [
        Side(OURS, lambda: whole(ops), lambda: whole(reference), MAX_LAYER_ERROR, own=True),
        prepared,
        # The integer product is exact: only scales and the low-rank sum are rounded, in places to bfloat16.
        Side(f"{OURS} product", lambda: product(ops), lambda: product(reference), 2**-8, own=True, part=True),
    ]
    module = nn.Linear(width, layer.out_features, device=bench.device)
    case = f"{layer_name} {width}x{layer.out_features}"
    return bench.time("op", case, batch, rows * width * layer.out_features, sides, module, (x,))


def block_case(bench: Bench, batch: int) -> CaseTiming:
    """Block 0, its adaLN linear included: ``x [B, L, D]``, ``c [B, D]``."""
    config = bench.config
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, config.num_tokens, config.hidden_size, generator=generator).to(bench.device)
    c = torch.randn(batch, config.hidden_size, generator=generator).to(bench.device)

    def run(network: PackedDiT, images: list[int]) -> Tensor:
        block = network.blocks[0]
        modulation = fused_linear(network.backend)(c[images], block.adaln, "silu")
        parts = modulation.reshape(len(images), 6, -1).transpose(0, 1).contiguous()
        # A block changes its tokens in place. They are copied by one thread on a CPU: torch's others would keep
        # spinning on the cores of ours, and in a network nothing is copied there.
        copy = torch.from_numpy(x.numpy()[images]) if x.is_cpu else x[images]
        return network.run_block(copy, parts, block)

    module = plain_network(config.model_copy(update={"depth": 1}), bench.device).blocks[0]
    return bench.time("block", "block 0", batch, batch * _macs(config, 1), [bench.ours(run, batch)], module, (x, c))


def forward_case(bench: Bench, batch: int) -> CaseTiming:
    """The whole network on rows of different timesteps and classes; no modulation is kept from call to call."""
    config = bench.config
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    timesteps = torch.randint(0, NUM_TRAIN_TIMESTEPS, (batch,), generator=generator)
    x, classes = x.to(bench.device), torch.arange(batch) % config.valid_classes

    def run(network: PackedDiT, images: list[int]) -> Tensor:
        network.conditioning.clear()
        with on_one_thread(network.has_own_threads):
            return network.forward(taken(x, images), timesteps[images].tolist(), classes[images].tolist())

    on_device = x, timesteps.to(bench.device), classes.to(bench.device)
    macs = batch * _macs(config, config.depth)
    return bench.time("forward", "forward", batch, macs, [bench.ours(run, batch)], bench.plain, on_device)


def image_case(bench: Bench, batch: int) -> CaseTiming:
    """``batch`` pictures from noise to the last step by the checkpoint's defaults, not decoded, against FP32."""
    config, source = bench.config, bench.source
    defaults = source.checkpoint.header.sampler
    ours = source.sampler(source.packed(bench.backend), bench.backend.name, bench.device)
    reference = source.sampler(source.packed(bench.reference), "reference", bench.device)
    plain = source.sampler(bench.plain, BASELINE, bench.device)
    every, checked = range(batch), tuple(sorted({0, batch - 1}))

    def start(sampler: Sampler, images: Iterable[int]) -> list[Row]:
        settings = defaults.steps, defaults.guidance_scale, defaults.sampler
        return [sampler.start(RowSpec(i % config.valid_classes, i, *settings)) for i in images]

    def draw(sampler: Sampler, images: Iterable[int]) -> Tensor:
        rows = start(sampler, images)
        while not rows[0].done:
            sampler.step(rows)
        return torch.stack([row.x for row in rows])

    def steps_of(sampler: Sampler) -> Tensor:
        """Every step of ``sampler``, each from where ours arrived: errors of one step do not feed the next."""
        rows, states = start(ours, checked), []
        while not rows[0].done:
            twins = [row.twin() for row in rows]
            sampler.step(twins)
            states += [twin.x for twin in twins]
            ours.step(rows)
        return torch.stack(states)

    own = Side(
        OURS,
        lambda: draw(ours, every),
        lambda: steps_of(reference),
        MAX_NETWORK_ERROR,
        own=True,
        result=lambda: steps_of(ours),
    )
    other = Side(BASELINE, lambda: draw(plain, every), lambda: draw(plain, checked), 1e-3, images=checked)
    timings, absent = time_sides([own, other], bench.timer)
    return CaseTiming(
        level="image",
        case=f"{defaults.steps} steps of {defaults.sampler}, guidance {defaults.guidance_scale:g}",
        batch=batch,
        macs=batch * defaults.steps * rows_of(defaults.guidance_scale) * _macs(config, config.depth),
        sides=tuple(timings),
        absent=tuple(absent),
    )


def _macs(config: ModelConfig, depth: int) -> int:
    """Of one image: linears of ``depth`` blocks and their attention products; without embedders and final layer."""
    linears = sum(layer_macs(config.model_copy(update={"depth": depth})).values())
    return linears + depth * 2 * config.num_tokens**2 * config.hidden_size


@dataclass(frozen=True)
class Plan:
    """Cases of one source. ``layers``: of level op, by their names in a block."""

    levels: Sequence[str] = LEVELS
    batches: Sequence[int] = (1, 2, 8, 32)
    preset: str | None = None
    checkpoint: Path | None = None
    layers: Sequence[str] = LAYERS
    peers: Sequence[str] = tuple(PEERS)


@dataclass(frozen=True)
class Settings:
    """``rounds`` at most per side and about ``budget_s`` seconds per case."""

    backend: str = "auto"
    threads: int | None = None
    device: str | None = None
    rounds: int = 11
    budget_s: float = 60.0
    loading_runs: int = 3


# DiT-XL/2 where its work is (the widest and the deepest layer, one block), the bundled checkpoint as a whole.
QUICK_PLANS: tuple[Plan, ...] = (
    Plan(("op",), (2,), preset="DiT-XL/2", layers=("attn.qkv", "mlp.fc2")),
    Plan(("block",), (2,), preset="DiT-XL/2"),
    Plan(("forward",), (8,), peers=("fp32", "fp32-compiled", "int8-onednn")),
    Plan(("image", "memory", "loading"), (1,)),
)


def run_plans(
    plans: Sequence[Plan], settings: Settings, on_result: Callable[[Result], None] = lambda _: None
) -> Report:
    """Run ``plans``; ``on_result`` hears of each result as it comes.

    Raises:
        BenchError: one of our results is wrong. ValueError, UserError: a plan names what does not exist.
    """
    for plan in plans:
        for kind, names, choices in (
            ("level", plan.levels, LEVELS),
            ("peer", plan.peers, tuple(PEERS)),
            ("layer", plan.layers, LAYERS),
        ):
            for name in set(names) - set(choices):
                raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(choices)}")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    described = machine()
    backend = select_backend(settings.backend, settings.threads, settings.device)
    results: list[Result] = []
    for plan in plans:
        for result in _run(plan, settings, backend):
            on_result(result)
            results.append(result)
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=described,
        settings=asdict(settings) | {"kernels": backend.name},
        cases=tuple(r for r in results if isinstance(r, CaseTiming)),
        memory=tuple(r for r in results if isinstance(r, MemoryUse)),
        loading=tuple(r for r in results if isinstance(r, Loading)),
    )


def _run(plan: Plan, settings: Settings, backend: Backend) -> Iterator[Result]:
    source = open_source(plan.preset, plan.checkpoint)
    bench = Bench(source, backend, Timer.of(backend.device, settings.rounds, settings.budget_s), plan.peers)
    for batch in plan.batches:
        if "op" in plan.levels:
            for layer in plan.layers:
                yield op_case(bench, layer, batch)
        if "block" in plan.levels:
            yield block_case(bench, batch)
        if "forward" in plan.levels:
            yield forward_case(bench, batch)
        if "image" in plan.levels and source.draws_pixels:
            yield image_case(bench, batch)
    if not {"memory", "loading"} & set(plan.levels):
        return
    where = {"backend": settings.backend, "threads": settings.threads, "device": settings.device}
    with as_file(source) as path:
        if "memory" in plan.levels:
            sides = (OURS, *(name for name in plan.peers if name in MEMORY_SIDES))
            for batch in plan.batches:
                yield from measure_memory(source.name, path, batch, where, sides)
        if "loading" in plan.levels:
            yield measure_loading(source.name, path, where, settings.loading_runs)
