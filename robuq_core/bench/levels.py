"""The cases of a benchmark: single layers, a block, a forward, whole images; each with our side and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robuq_core.bench.peers import PEERS, Inputs, Peer, prepare
from robuq_core.bench.report import Absent, CaseTiming
from robuq_core.bench.source import Source, plain_network
from robuq_core.bench.timing import BASELINE, Side, Timer, Unavailable, time_sides
from robuq_core.config import NUM_TRAIN_TIMESTEPS, ModelConfig, rows_of
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.ops import Backend, Modulation, Prologue, TernaryLayer, fused_linear
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.quant_linear import is_adaln
from robuq_core.models.shapes import layer_macs
from robuq_core.pipeline import Row, RowSpec, Sampler

OURS = "robuq"
# A code on the edge of its cell may fall either way when two backends round sums in another order; with few bits
# such a flip is as large as a step. The outputs then differ a little, never by this much.
MAX_RELATIVE_ERROR = 0.05


@dataclass
class Bench:
    """What every case shares. ``peers``: names out of :data:`~robuq_core.bench.peers.PEERS`."""

    source: Source
    backend: Backend
    timer: Timer
    peers: Sequence[str]
    _plain: list[DiT] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @property
    def device(self) -> torch.device:
        return self.backend.device

    def law(self) -> Backend:
        return select_backend("reference", device=self.device)

    def plain(self) -> DiT:
        """The FP32 network, made once."""
        if not self._plain:
            self._plain.append(plain_network(self.config, self.device))
        return self._plain[0]

    @torch.inference_mode()
    def time(
        self, level: str, case: str, batch: int, macs: int, ours: Iterable[Side], module: nn.Module, inputs: Inputs
    ) -> CaseTiming:
        """Ours against the peers' forms of ``module`` on ``inputs``."""
        torch._dynamo.reset()  # else the compiler gives up after a few networks and runs them eagerly
        expected = module(*inputs)
        sides, absent = list(ours), []
        for name in self.peers:
            try:
                call = prepare(PEERS[name], module, inputs, whole=level != "op")
                sides.append(_peer_side(PEERS[name], call, expected))
            except Unavailable as reason:
                absent.append(Absent(name=name, reason=str(reason)))
        timings, dropped = time_sides(sides, self.timer)
        return CaseTiming(
            level=level, case=case, batch=batch, macs=macs, sides=tuple(timings), absent=(*absent, *dropped)
        )


def _peer_side(peer: Peer, call: Callable[[], Tensor], expected: Tensor) -> Side:
    return Side(peer.name, call, lambda: expected, peer.tolerance)


def op_case(bench: Bench, layer_name: str, batch: int) -> CaseTiming:
    """One packed linear of block 0: rotation, quantisation, product and low rank against a bare FP32 linear; and its
    two halves alone, the first with the elementwise prologue that it has in the network."""
    layer = bench.source.checkpoint.layers[f"blocks.0.{layer_name}"].to(bench.device)
    rows = batch * (1 if is_adaln(layer_name) else bench.config.num_tokens)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(rows, layer.in_features, generator=generator).to(bench.device)
    module = nn.Linear(layer.in_features, layer.out_features, device=bench.device)
    macs = rows * layer.in_features * layer.out_features
    case = f"{layer_name} {layer.in_features}x{layer.out_features}"
    prologue = _prologue(layer_name, batch, layer.in_features, generator, bench.device)
    return bench.time("op", case, batch, macs, _op_sides(bench, layer, x, prologue), module, (x,))


def _prologue(layer_name: str, batch: int, width: int, generator: torch.Generator, device: torch.device) -> Prologue:
    if layer_name in ("attn.qkv", "mlp.fc1"):
        shift, scale = (torch.randn(batch, width, generator=generator).to(device) for _ in range(2))
        return Modulation(shift, scale, 1e-6)
    return "gelu" if layer_name == "mlp.fc2" else "silu" if is_adaln(layer_name) else None


def _op_sides(bench: Bench, layer: TernaryLayer, x: Tensor, prologue: Prologue) -> list[Side]:
    ops, law = bench.backend, bench.law()
    quantized = ops.rotate_quantize(x, layer)

    def product(backend: Backend) -> Tensor:
        return backend.ternary_linear(quantized, layer)

    run, run_law = fused_linear(ops), fused_linear(law)

    def dequantized(backend: Backend) -> Tensor:
        q = backend.rotate_quantize(x, layer, prologue)
        return torch.cat([q.codes * q.scales[:, None], q.lowrank], dim=1)

    return [
        Side(OURS, lambda: run(x, layer), lambda: run_law(x, layer), MAX_RELATIVE_ERROR, own=True),
        Side(
            f"{OURS} prologue",
            lambda: ops.rotate_quantize(x, layer, prologue),
            lambda: dequantized(law),
            MAX_RELATIVE_ERROR,
            own=True,
            part=True,
            result=lambda: dequantized(ops),
        ),
        # The integer product is exact: only scales and the low-rank sum are rounded.
        Side(f"{OURS} product", lambda: product(ops), lambda: product(law), 1e-4, own=True, part=True),
    ]


def block_case(bench: Bench, batch: int) -> CaseTiming:
    """Block 0, its adaLN linear included: ``x [B, L, D]``, ``c [B, D]``."""
    config, source = bench.config, bench.source
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, config.num_tokens, config.hidden_size, generator=generator).to(bench.device)
    c = torch.randn(batch, config.hidden_size, generator=generator).to(bench.device)
    checked = tuple(sorted({0, batch - 1}))

    def run_on(network: PackedDiT, x: Tensor, c: Tensor) -> Tensor:
        block = network.blocks[0]
        modulation = fused_linear(network.backend)(c, block.adaln, "silu")
        parts = modulation.reshape(len(c), 6, -1).transpose(0, 1).contiguous()
        return network.run_block(_copy(x), parts, block)

    ours, law = source.packed(bench.backend), source.packed(bench.law())
    side = Side(
        OURS,
        lambda: run_on(ours, x, c),
        lambda: run_on(law, x[list(checked)], c[list(checked)]),
        MAX_RELATIVE_ERROR,
        own=True,
        images=checked,
    )
    return bench.time(
        "block", "block 0", batch, batch * _macs(config, depth=1), [side], _plain_block(config, bench.device), (x, c)
    )


def _copy(x: Tensor) -> Tensor:
    """A copy, as a block changes its tokens in place. On a CPU by one thread: torch's others would go on spinning on
    the cores of ours, and in a network nothing is copied there."""
    return torch.from_numpy(x.numpy().copy()) if x.is_cpu else x.clone()


def _plain_block(config: ModelConfig, device: torch.device) -> nn.Module:
    network = plain_network(config.model_copy(update={"depth": 1}), device)
    return network.blocks[0]


def forward_case(bench: Bench, batch: int) -> CaseTiming:
    """The whole network on rows of different timesteps and classes; no modulation is kept from call to call."""
    config, source = bench.config, bench.source
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    timesteps = torch.randint(0, NUM_TRAIN_TIMESTEPS, (batch,), generator=generator)
    inputs = (x.to(bench.device), timesteps, torch.arange(batch) % config.valid_classes)
    checked = tuple(sorted({0, batch - 1}))
    ours, law = source.packed(bench.backend), source.packed(bench.law())

    def run() -> Tensor:
        ours.conditioning.clear()
        return ours.forward(*inputs)

    side = Side(
        OURS,
        run,
        lambda: law.forward(*(part[list(checked)] for part in inputs)),
        MAX_RELATIVE_ERROR,
        own=True,
        images=checked,
    )
    on_device = tuple(part.to(bench.device) for part in inputs)
    macs = batch * _macs(config, config.depth)
    return bench.time("forward", "forward", batch, macs, [side], bench.plain(), on_device)


def image_case(bench: Bench, batch: int) -> CaseTiming:
    """``batch`` pictures from noise to the last step by the checkpoint's defaults, not decoded, against FP32."""
    config, source = bench.config, bench.source
    defaults = source.checkpoint.header.sampler
    ours = source.sampler(source.packed(bench.backend), bench.backend.name, bench.device)
    law = source.sampler(source.packed(bench.law()), "reference", bench.device)
    plain = source.sampler(bench.plain(), BASELINE, bench.device)
    checked = tuple(sorted({0, batch - 1}))

    def start(sampler: Sampler, images: Iterable[int]) -> list[Row]:
        return [
            sampler.start(
                RowSpec(i % config.valid_classes, i, defaults.steps, defaults.guidance_scale, defaults.sampler)
            )
            for i in images
        ]

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

    every = range(batch)
    sides = [
        Side(
            OURS,
            lambda: draw(ours, every),
            lambda: steps_of(law),
            MAX_RELATIVE_ERROR,
            own=True,
            result=lambda: steps_of(ours),
        ),
        Side(BASELINE, lambda: draw(plain, every), lambda: draw(plain, checked), 1e-3, images=checked),
    ]
    forwards = defaults.steps * rows_of(defaults.guidance_scale)
    timings, absent = time_sides(sides, bench.timer)
    return CaseTiming(
        level="image",
        case=f"{defaults.steps} steps of {defaults.sampler}, guidance {defaults.guidance_scale:g}",
        batch=batch,
        macs=batch * forwards * _macs(config, config.depth),
        sides=tuple(timings),
        absent=tuple(absent),
    )


def _macs(config: ModelConfig, depth: int) -> int:
    """Of one image: linears of ``depth`` blocks and their attention products; without embedders and final layer."""
    linears = sum(macs for name, macs in layer_macs(config.model_copy(update={"depth": depth})).items())
    return linears + depth * 2 * config.num_tokens**2 * config.hidden_size
