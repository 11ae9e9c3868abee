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
import torch.nn.functional as F
from torch import Tensor

from train.config import DataConfig
from train.data.shards import ShardedTensor

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ImageDataset:
    """``images`` uint8 ``[N, C, S, S]``, RGB or grey, short side resized and centre-cropped to S; ``labels`` int64
    ``[N]``.

    Crops are taken at ``supersample`` times the wanted size and averaged down.
    """

    images: Tensor | ShardedTensor
    labels: Tensor
    supersample: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, count: int | None) -> ImageDataset:
        """``count`` images at random, always the same ones, in memory; all of them, as they are, with none given."""
        if count is None:
            return self
        rows = some_rows(len(self), count)
        return ImageDataset(self.images[rows], self.labels[rows], self.supersample)


def some_rows(total: int, count: int | None) -> list[int]:
    """``count`` of ``total`` row numbers at random, always the same ones, in rising order; all if there is no count."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].tolist())


def centre_images(dataset: ImageDataset, size: int, rows: slice = slice(None)) -> Tensor:
    """Centre crops, float32 in [-1, 1], ``[N, C, size, size]`` of ``rows``; mind the memory that all of them need."""
    side = size * dataset.supersample
    margin = (dataset.images.shape[-1] - side) // 2
    crops = dataset.images[rows][..., margin : margin + side, margin : margin + side]
    return shrink(to_unit(crops), dataset.supersample)


def shrink(images: Tensor, factor: int) -> Tensor:
    """Means of ``factor x factor`` pixels."""
    return F.avg_pool2d(images, factor) if factor > 1 else images


def to_unit(images: Tensor) -> Tensor:
    """Bytes 0..255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


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
    def channels(self) -> int:
        return self.moments.shape[2] // 2

    def draw(self, index: Tensor, mirrored: Tensor, noise: Tensor) -> Tensor:
        """Latents float32 ``[n, C, S, S]`` of ``index`` int64 ``[n]``, with ``noise`` of their own shape."""
        last = self.moments.shape[1] - 1
        rows = [
            self.moments[i][min(int(flip), last)] for i, flip in zip(index.tolist(), mirrored.tolist(), strict=True)
        ]
        mean, deviation = torch.stack(rows).float().chunk(2, dim=1)
        latents: Tensor = (mean + deviation * noise - self.shift_factor) * self.scaling_factor
        return latents

    def means(self, rows: slice) -> Tensor:
        """The unmirrored means, scaled, float32 ``[n, C, S, S]``."""
        return (self.moments[rows][:, 0, : self.channels].float() - self.shift_factor) * self.scaling_factor


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
    """Augmented batches by step: epochs are permutations, and each batch is drawn from (seed, step) alone."""

    def __init__(
        self, dataset: ImageDataset | LatentDataset, config: DataConfig, crop: int, batch_size: int, seed: int
    ) -> None:
        self.dataset, self.config, self.crop = dataset, config, crop
        self.batch_size, self.seed = batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _sample_index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.dataset), generator=step_generator(self.seed, epoch, stream=1))
        return int(self._order[offset])

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Samples float32 ``[B, C, crop, crop]`` and labels int64 ``[B]`` of ``step``: pixels in [-1, 1], or latents.

        With ``world`` above one, ``B`` is the ``rank``-th of ``world`` equal slices of the very same batch.

        Raises:
            ValueError: the batch size is no multiple of ``world``.
        """
        size, first = self.batch_size, step * self.batch_size
        if size % world:
            raise ValueError(f"batch_size {size} is no multiple of the {world} processes that share it")
        mine = slice(rank * size // world, (rank + 1) * size // world)
        # One number a sample is drawn for the whole batch, so that none depends on ``world``.
        generator = step_generator(self.seed, step, stream=2)
        index = torch.tensor([self._sample_index(first + i) for i in range(size)])
        if isinstance(self.dataset, LatentDataset):
            mirrored = torch.rand(size, generator=generator) < self.config.flip_probability
            shape = (self.dataset.channels, self.crop, self.crop)
            noise = sample_noise(self.seed, step, size, mine, shape, stream=4)
            samples = self.dataset.draw(index[mine], mirrored[mine], noise)
        else:
            samples = self._crops(self.dataset, index, generator, mine)
        return samples, self.dataset.labels[index[mine]]

    def _crops(self, dataset: ImageDataset, index: Tensor, generator: torch.Generator, mine: slice) -> Tensor:
        side = self.crop * dataset.supersample
        margin = dataset.images.shape[-1] - side
        offsets = torch.randint(0, margin + 1, (len(index), 2), generator=generator)
        flips = torch.rand(len(index), generator=generator) < self.config.flip_probability
        chosen = (each[mine].tolist() for each in (index, offsets, flips))
        crops = []
        for i, (top, left), flip in zip(*chosen, strict=True):
            crop = dataset.images[i][:, top : top + side, left : left + side]
            crops.append(crop.flip(-1) if flip else crop)
        images = shrink(to_unit(torch.stack(crops)), dataset.supersample)
        return self._jitter(images, generator, mine)

    def _jitter(self, images: Tensor, generator: torch.Generator, mine: slice) -> Tensor:
        amount = self.config.colour_jitter
        if not amount:
            return images
        factors = 1 + amount * (2 * torch.rand(2, self.batch_size, 1, 1, 1, generator=generator) - 1)
        brightness, contrast = factors[:, mine]
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * contrast + mean
        jittered: Tensor = (images + 1) * brightness - 1
        return jittered.clamp(-1, 1)


_AHEAD = 2


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
