"""Prepared samples, and batches of them that are a pure function of the step.

Nothing here holds random state: the batch of step ``s`` depends on the seed and ``s`` alone, so a resumed run
sees what the unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from train.data.shards import ShardedTensor

Batch = TypeVar("Batch")
_AHEAD = 2


def to_unit(images: Tensor) -> Tensor:
    """Bytes 0..255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def some_rows(total: int, count: int | None) -> list[int]:
    """``count`` of ``total`` row numbers at random, always the same ones, in rising order; all if there is no count."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].tolist())


@dataclass(frozen=True)
class ImageDataset:
    """``images`` uint8 ``[N, C, S, S]``, RGB or grey; ``labels`` int64 ``[N]``."""

    images: Tensor | ShardedTensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, count: int) -> ImageDataset:
        """``count`` images at random, always the same ones, in memory."""
        rows = some_rows(len(self), count)
        return ImageDataset(self.images[rows], self.labels[rows])

    def draw(self, rows: list[int], mirrored: list[bool], noise: Tensor | None) -> Tensor:
        """Images float32 ``[n, C, S, S]`` in [-1, 1]."""
        images = (self.images[i].flip(-1) if flip else self.images[i] for i, flip in zip(rows, mirrored, strict=True))
        return to_unit(torch.stack(list(images)))

    def means(self, rows: slice) -> Tensor:
        """As :meth:`draw`, unmirrored."""
        return to_unit(self.images[rows])


@dataclass(frozen=True)
class LatentDataset:
    """``moments`` float16 ``[N, mirrors, 2 C, S, S]``, C means and then C deviations; ``labels`` int64 ``[N]``.

    The encoder's normal, of each image and of its mirror image: a step draws ``z = (mean + deviation * noise -
    shift_factor) * scaling_factor``, as encoding afresh each time would. Latents drawn before have deviation 0.
    """

    moments: Tensor | ShardedTensor
    labels: Tensor
    scaling_factor: float
    shift_factor: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.moments.shape[2] // 2, *self.moments.shape[3:])

    def draw(self, rows: list[int], mirrored: list[bool], noise: Tensor | None) -> Tensor:
        """Latents float32 ``[n, C, S, S]``, with ``noise`` of their own shape."""
        assert noise is not None
        last = self.moments.shape[1] - 1
        chosen = (self.moments[i][min(int(flip), last)] for i, flip in zip(rows, mirrored, strict=True))
        mean, deviation = torch.stack(list(chosen)).float().chunk(2, dim=1)
        return self._scaled(mean + deviation * noise)

    def means(self, rows: slice) -> Tensor:
        """The unmirrored means, scaled, float32 ``[n, C, S, S]``."""
        return self._scaled(self.moments[rows][:, 0, : self.noise_shape[0]].float())

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.shift_factor) * self.scaling_factor


Dataset = ImageDataset | LatentDataset


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step (and, by ``stream``, of one purpose within it)."""
    # Hashed, since torch's CPU generator takes the low 32 bits of a seed alone.
    mixed = np.random.SeedSequence((seed, step, stream)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


def sample_noise(seed: int, step: int, count: int, mine: slice, shape: Sequence[int], stream: int) -> Tensor:
    """Standard normal noise float32 ``[n, *shape]`` of the samples ``mine`` of a batch of ``count``.

    Each sample has a generator of its own, so that a process makes no noise for the others' samples.
    """
    seeds = np.random.SeedSequence((seed, step, stream)).generate_state(count)[mine].tolist()
    noise, generator = torch.empty(len(seeds), *shape), torch.Generator()
    for row, own in zip(noise, seeds, strict=True):
        torch.randn(row.shape, generator=generator.manual_seed(own), out=row)
    return noise


class BatchSource:
    """Batches by step: epochs are permutations, and each batch is drawn from (seed, step) alone.

    ``flip_probability``: share of mirrored samples.
    """

    def __init__(self, dataset: Dataset, flip_probability: float, batch_size: int, seed: int) -> None:
        self.dataset, self.flip_probability, self.batch_size, self.seed = dataset, flip_probability, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _sample_index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.dataset), generator=step_generator(self.seed, epoch, stream=1))
        return int(self._order[offset])

    def share(self, rank: int, world: int) -> slice:
        """The ``rank``-th of ``world`` equal slices of a batch. Raises ValueError if it does not divide evenly."""
        if self.batch_size % world:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of the {world} processes that share it")
        own = self.batch_size // world
        return slice(rank * own, (rank + 1) * own)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Samples float32 ``[B, C, S, S]`` and labels int64 ``[B]`` of ``step``: pixels in [-1, 1], or latents.

        With ``world`` above one, the :meth:`share` of the very same batch.
        """
        size, mine, noise = self.batch_size, self.share(rank, world), None
        # One number a sample is drawn for the whole batch, so that none depends on ``world``.
        mirrored = torch.rand(size, generator=step_generator(self.seed, step, stream=2)) < self.flip_probability
        rows = [self._sample_index(step * size + i) for i in range(size)[mine]]
        if isinstance(self.dataset, LatentDataset):
            noise = sample_noise(self.seed, step, size, mine, self.dataset.noise_shape, stream=4)
        return self.dataset.draw(rows, mirrored[mine].tolist(), noise), self.dataset.labels[rows]


class Prefetcher(Generic[Batch]):
    """``make(first), make(first + 1), ...`` below ``end``, made in order by one thread, at most two ahead."""

    def __init__(self, make: Callable[[int], Batch], first: int, end: int) -> None:
        self._make, self._next, self._end = make, first, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: list[Future[Batch]] = []

    def next(self) -> Batch:
        """The next batch; raises what making it raised."""
        while self._next < self._end and len(self._ahead) <= _AHEAD:
            self._ahead.append(self._pool.submit(self._make, self._next))
            self._next += 1
        return self._ahead.pop(0).result()

    def close(self) -> None:
        """Stop the thread and drop what was not asked for."""
        self._pool.shutdown(cancel_futures=True)
