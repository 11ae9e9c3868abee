"""Data of a run: where images come from, how they are kept, and how a step draws its batch."""

from train.data.batches import (
    BatchSource,
    ImageDataset,
    LatentDataset,
    Prefetcher,
    centre_images,
    sample_noise,
    step_generator,
)
from train.data.pictures import IMAGE_SUFFIXES, DataError
from train.data.preparation import (
    Dataset,
    data_folder,
    holds_features,
    image_size,
    load_dataset,
    open_dataset,
    prepare,
    vae_downscale,
)
from train.data.shards import Index, ShardedTensor, data_digest, fingerprint, read_index
from train.data.sources import Source, open_source

__all__ = [
    "IMAGE_SUFFIXES",
    "BatchSource",
    "DataError",
    "Dataset",
    "ImageDataset",
    "Index",
    "LatentDataset",
    "Prefetcher",
    "ShardedTensor",
    "Source",
    "centre_images",
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
    "vae_downscale",
]
