"""Shared by all tests: hypothesis without deadlines (CI machines stall), and one torch thread, as tests
share their cores."""

import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=50)
settings.load_profile("default")
torch.set_num_threads(1)
