"""Tiny models train fastest, and like the processes that some tests start, on one thread."""

from collections.abc import Iterator

import pytest
import torch
from synthetic_run import make_config, train

from train.config import TrainConfig


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run whose teacher is trained; tests must not change its folder."""
    config = make_config(tmp_path_factory.mktemp("trained"))
    train(config)
    return config
