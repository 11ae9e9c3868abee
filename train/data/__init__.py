"""Data of a run: where images come from, how they are kept, and how a step draws its batch."""

from train.data.batches import BatchSource, step_generator
from train.data.errors import DataError
from train.data.images import ImageDataset, centre_images, load_dataset
from train.data.sources import IMAGE_SUFFIXES, Source, open_source

__all__ = [
    "IMAGE_SUFFIXES",
    "BatchSource",
    "DataError",
    "ImageDataset",
    "Source",
    "centre_images",
    "load_dataset",
    "open_source",
    "step_generator",
]
