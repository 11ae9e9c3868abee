"""Data of a run: where images come from, how they are kept, and how a step draws its batch."""

from train.data.batches import BatchSource, sample_noise, step_generator
from train.data.digest import data_digest, looked_at_once
from train.data.errors import DataError
from train.data.images import ImageDataset, centre_images, load_dataset
from train.data.latents import LatentDataset
from train.data.pictures import IMAGE_SUFFIXES
from train.data.preparation import Dataset, data_folder, open_dataset, prepare, read_images
from train.data.shards import Index, ShardedTensor
from train.data.sources import Source, open_source

__all__ = [
    "IMAGE_SUFFIXES",
    "BatchSource",
    "DataError",
    "Dataset",
    "ImageDataset",
    "Index",
    "LatentDataset",
    "ShardedTensor",
    "Source",
    "centre_images",
    "data_digest",
    "data_folder",
    "load_dataset",
    "looked_at_once",
    "open_dataset",
    "open_source",
    "prepare",
    "read_images",
    "sample_noise",
    "step_generator",
]
