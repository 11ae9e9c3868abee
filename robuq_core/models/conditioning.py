"""The adaLN side of a packed DiT: a cache of the shifts, scales and gates of all blocks by (timestep, class).

An entry depends on nothing else, so rows with the same pair share it, and entries are kept between steps (guided rows
use the null class at every timestep). The least recently used entries are evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from robuq_core.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from robuq_core.kernels.ops import (
    Backend,
    Ends,
    GroupingBackend,
    LayerGroup,
    NetworkBackend,
    TernaryLayer,
    fused_linear,
)
from robuq_core.models.dit import negates_output, timestep_features
from robuq_core.staging import staged

TABLE_BYTES = 32 * 2**20
BLOCK_ENTRIES = 6
# Of a GPU's memory, at most.
_TABLE_SHARE = 32
# Beside the null class at every timestep: what rows in progress need.
_SPARE_SLOTS = 128
# Numbers of pairs beyond which a product of that many rows has another launch shape.
_PAIR_BUCKETS = (1, 17, 33, 65)

Pair = tuple[float, int]


def network_ends(config: ModelConfig, dense: dict[str, Tensor], position: Tensor) -> Ends:
    def weights(name: str) -> tuple[Tensor, Tensor]:
        return dense[f"{name}.weight"], dense[f"{name}.bias"]

    return Ends(
        embedder=weights("x_embedder"),
        last=weights("final_layer.linear"),
        modulation=weights("final_layer.adaLN_modulation.1"),
        position=position,
        patch=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        negated=negates_output(config),
    )


class ConditioningTable:
    """Modulations by (timestep, class): ``table [6 depth + 2, slots, D]``, float32 on the backend's device.

    Entries 6 i .. 6 i + 5 of the first dimension are block i's shift, scale and gate of attention, then of the MLP; the
    last two are the final layer's shift and scale. Memory pages are used as slots fill up.

    Args:
        dense: the embedders, by DiT name. adaln: the packed linear of every block. ends: the final layer is of them.
        max_bytes: of the table; it grows for a forward with more pairs. None: 32 MiB, or on a GPU room for the null
            class at every timestep, up to 1/32 of its memory.
        group: ``adaln`` stacked, for a backend that runs them in one launch.
    """

    table: Tensor

    def __init__(
        self,
        config: ModelConfig,
        dense: dict[str, Tensor],
        adaln: Sequence[TernaryLayer],
        backend: Backend,
        ends: Ends,
        max_bytes: int | None = None,
        group: LayerGroup | None = None,
    ) -> None:
        self._config, self._dense, self._adaln, self._backend = config, dense, tuple(adaln), backend
        self._group, self._grouping = group, backend if isinstance(backend, GroupingBackend) else None
        self._ends, self._network = ends, backend if isinstance(backend, NetworkBackend) else None
        self._ternary = fused_linear(backend)
        self._timestep_embeddings: dict[float, Tensor] = {}
        entry_bytes = 4 * self._height * config.hidden_size
        max_bytes = self._default_bytes(entry_bytes) if max_bytes is None else max_bytes
        self._allocate(max(1, max_bytes // entry_bytes))
        if group is None and self.table.is_cuda:
            self._compile()

    def _default_bytes(self, entry_bytes: int) -> int:
        device = self._backend.device
        if device.type != "cuda":
            return TABLE_BYTES
        share = torch.cuda.get_device_properties(device).total_memory // _TABLE_SHARE
        return max(TABLE_BYTES, min(share, (NUM_TRAIN_TIMESTEPS + _SPARE_SLOTS) * entry_bytes))

    def _compile(self) -> None:
        """Run every launch shape once, so that no request waits for compilation."""
        for layer in {(each.rank, each.bits, each.grid): each for each in self._adaln}.values():
            for pairs in _PAIR_BUCKETS:
                self._ternary(torch.zeros(pairs, layer.in_features, device=self.table.device), layer, "silu")

    @property
    def _height(self) -> int:
        return BLOCK_ENTRIES * len(self._adaln) + 2

    def _allocate(self, slots: int) -> None:
        self.table = torch.empty(self._height, slots, self._config.hidden_size, device=self._backend.device)
        self._slot_of: OrderedDict[Pair, int] = OrderedDict()
        self.clear()

    def clear(self) -> None:
        """Drop all entries (timestep embeddings stay)."""
        self._slot_of.clear()
        self._free = list(reversed(range(self.table.shape[1])))

    def slots(self, timesteps: Sequence[float], classes: Sequence[int]) -> Tensor:
        """Where each row's entry lies in :attr:`table`, int64 ``[B]`` on its device; what is missing is computed.

        Holds until the next call.
        """
        pairs = list(zip(timesteps, classes, strict=True))
        wanted = dict.fromkeys(pairs)
        if len(wanted) > self.table.shape[1]:
            self._allocate(2 * len(wanted))
        new: dict[Pair, int] = {}
        for pair in wanted:
            if pair in self._slot_of:
                self._slot_of.move_to_end(pair)
            else:
                new[pair] = -1
        # What this forward uses was moved to the end, so it is never what goes.
        for pair in new:
            new[pair] = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
        slots = torch.tensor([new[pair] if pair in new else self._slot_of[pair] for pair in pairs])
        if not new:
            return staged(self.table.device, slots)[0]
        try:
            c_UD, slots, added = self._embeddings(list(new), slots, torch.tensor(list(new.values())))
            self._fill(c_UD, added)
        except BaseException:
            self._free += new.values()
            raise
        self._slot_of.update(new)
        return slots

    def final(self, timesteps: Sequence[float], classes: Sequence[int]) -> Tensor:
        """The final layer's shift and scale alone, ``[2, B, D]``: the same values, computed and not kept."""
        (c_BD,) = self._embeddings(list(zip(timesteps, classes, strict=True)))
        if self._network is not None:
            table = c_BD.new_empty(2, *c_BD.shape)
            self._network.modulate(c_BD, (), self._ends, table, torch.arange(len(c_BD)))
            return table
        return self._final(c_BD).reshape(len(timesteps), 2, -1).transpose(0, 1)

    def _fill(self, c_UD: Tensor, slots: Tensor) -> None:
        if self._network is not None and not any(layer.extra_planes for layer in self._adaln):
            self._network.modulate(c_UD, self._adaln, self._ends, self.table, slots)
            return
        if self._grouping is not None and self._group is not None:
            every = self._grouping.ternary_each(c_UD, self._group, "silu")
            self._put(0, slots, every.transpose(0, 1).flatten(1))
        else:
            for i, layer in enumerate(self._adaln):
                self._put(BLOCK_ENTRIES * i, slots, self._ternary(c_UD, layer, "silu"))
        self._put(BLOCK_ENTRIES * len(self._adaln), slots, self._final(c_UD))

    def _embeddings(self, pairs: list[Pair], *others: Tensor) -> tuple[Tensor, ...]:
        """Timestep and class of each pair, embedded and added: ``[U, D]``. Then ``others`` on the device: all that
        comes from the host takes one copy."""
        timesteps = dict.fromkeys(timestep for timestep, _ in pairs)
        fresh = [each for each in timesteps if each not in self._timestep_embeddings]
        if len(self._timestep_embeddings) + len(fresh) > NUM_TRAIN_TIMESTEPS:  # the times of a flow are any numbers
            self._timestep_embeddings.clear()
            fresh = list(timesteps)
        classes, *rest = staged(
            self.table.device,
            torch.tensor([label for _, label in pairs]),
            *others,
            *(timestep_features(torch.tensor([timestep]), self._config.flavour) for timestep in fresh),
        )
        for timestep, features in zip(fresh, rest[len(others) :], strict=True):
            hidden = F.silu(self._linear(features, "t_embedder.mlp.0"))
            self._timestep_embeddings[timestep] = self._linear(hidden, "t_embedder.mlp.2")[0]
        embeddings = torch.stack([self._timestep_embeddings[timestep] for timestep, _ in pairs])
        c_UD = embeddings + self._dense["y_embedder.embedding_table.weight"][classes]
        return c_UD, *rest[: len(others)]

    def _final(self, c_UD: Tensor) -> Tensor:
        # SiLU row by row: torch's vector and scalar code differ in the last bit, and which of them an element meets
        # depends on the size of the whole tensor.
        activated = torch.stack([F.silu(row) for row in c_UD])
        return self._backend.linear(activated, *self._ends.modulation)

    def _put(self, first: int, slots: Tensor, modulation: Tensor) -> None:
        """Write ``modulation [U, n D]`` to entries ``first`` .. ``first + n - 1``."""
        parts = modulation.reshape(len(slots), -1, self._config.hidden_size).transpose(0, 1)
        self.table[first : first + len(parts)].index_copy_(1, slots, parts)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return self._backend.linear(x, self._dense[f"{name}.weight"], self._dense[f"{name}.bias"])
