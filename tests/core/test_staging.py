"""What a step sends to the device: one copy in front of the forward, one in front of the update, and no wait.

Torch's device ``meta`` stands in for a GPU: its tensors hold no values, so that an attempt to read one is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robuq_core import staging
from robuq_core.kernels.ops import Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.pipeline import RowSpec, Sampler, load_model

META = torch.device("meta")
MIXED = [  # guided and not, multistep and not, with noise and without
    RowSpec(class_id=0, seed=0, steps=5, guidance_scale=1.0, sampler="ddpm"),
    RowSpec(class_id=1, seed=1, steps=5, guidance_scale=4.0, sampler="dpmsolver++"),
    RowSpec(class_id=2, seed=2, steps=5, guidance_scale=2.0, sampler="ddim"),
]


class Transfers(TorchDispatchMode):
    """Counts copies from the host: queued from pinned memory, and others, for which a GPU is waited."""

    def __init__(self) -> None:
        super().__init__()
        self.queued = 0
        self.waited: list[str] = []
        self.pinned: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(each) if isinstance(x, Tensor)] for each in ((args, kwargs), result))
        from_host = [x for x in inputs if x.device.type == "cpu" and x.ndim]
        if from_host and any(x.device == META for x in (*inputs, *outputs)):
            if all(id(x) in self.pinned for x in from_host) and (kwargs or {}).get("non_blocking"):
                self.queued += 1
            else:
                self.waited.append(str(function))
        return result


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    counter, kept = Transfers(), []

    def pinned(size: int) -> Tensor:
        kept.append(torch.empty(size, dtype=torch.uint8))
        counter.pinned.add(id(kept[-1]))
        return kept[-1]

    monkeypatch.setattr(staging, "_pinned", pinned)
    return counter


class OnMeta(ReferenceBackend):
    """Without the rotation and attention: they switch off torch's autocast, which the stand-in does not know."""

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        return Quantized(x.to(torch.int8), x[:, 0], x[:, : layer.rank])

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        return qkv[..., : qkv.shape[-1] // 3].contiguous()


@pytest.fixture
def sampler(tmp_path: Path) -> Sampler:
    write_tiny(tmp_path / "tiny.safetensors")
    return Sampler._on(load_model(tmp_path / "tiny.safetensors"), OnMeta(META))


# One more where only some rows are guided, and one where the network's own variance draws noise.
@pytest.mark.parametrize(
    ("specs", "copies"),
    [(MIXED, 4), (MIXED[:1], 3), (3 * MIXED[1:2], 2), (2 * MIXED[2:], 2)],
    ids=["mixed", "noise", "multistep", "guided"],
)
def test_a_step_queues_few_copies_and_waits_for_nothing(
    sampler: Sampler, transfers: Transfers, specs: list[RowSpec], copies: int
) -> None:
    rows = [sampler.start(spec) for spec in specs]
    for _ in range(2):  # with rows that were never together, then with those of the step before
        with transfers:
            sampler.step(rows)
        assert transfers.queued == copies
        assert not transfers.waited
        transfers.queued = 0
    assert all(row.batch is rows[0].batch for row in rows)


def test_tensors_staged_together_keep_their_values_shapes_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    tensors = (torch.tensor([1.5, 2.5, -3.0]), torch.tensor([2**40]), torch.randn(2, 3, 5), torch.zeros(0))
    for before, after in zip(tensors, staging.staged(META, *tensors), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
