"""RobuQ's runtime: diffusion transformers with ternary weights and low-bit activations (W1.58Ax).

Independent of HTTP (``server``) and training (``train``).

    from robuq_core import Sampler
    Sampler.from_checkpoint().generate(class_ids=[207], seed=0)[0].save("golden_retriever.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from robuq_core.threads import limit_threads

if TYPE_CHECKING:
    from robuq_core.diffusers_pipeline import RobuQPipeline
    from robuq_core.pipeline import RowSpec, Sampler

__version__ = "0.2.0"
__all__ = ["RobuQPipeline", "RowSpec", "Sampler", "__version__"]

limit_threads()

_HOMES = {"RobuQPipeline": "diffusers_pipeline", "RowSpec": "pipeline", "Sampler": "pipeline"}


def __getattr__(name: str) -> Any:
    # Imported on first use: --help of a console script does not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"robuq_core.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
