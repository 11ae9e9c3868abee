"""Data of a run: where images come from, how they are kept, and how a step draws its batch."""

from train.data.batches import (
    BatchSource,
    Dataset,
    ImageDataset,
    LatentDataset,
    Prefetcher,
    sample_noise,
    step_generator,
    to_unit,
)
from train.data.pictures import DataError
from train.data.preparation import data_folder, holds_features, image_size, load_dataset, open_dataset, prepare
from train.data.shards import Index, ShardedTensor, data_digest, fingerprint, read_index
from train.data.sources import open_source

__all__ = [
    "BatchSource",
    "DataError",
    "Dataset",
    "ImageDataset",
    "Index",
    "LatentDataset",
    "Prefetcher",
    "ShardedTensor",
    "data_digest",
    "data_folder",
    "fingerprint",
    "holds_features",
    "image_size",
    "load_dataset",
    "open_dataset",
    "open_source",
    "prepare",
    "read_index",
    "sample_noise",
    "step_generator",
    "to_unit",
]
