"""A sampler's first forwards, before its first request, so that no client pays for allocation and compilation."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from server.engine.generation import Generation
from server.engine.images import encode_image
from server.engine.model import RowSpec
from server.engine.stepping import Stepper

# The first forward of a size pays for what is set up once; a quick one is run again, to learn its time.
QUICK_S = 1.0
# Any guidance will do; with one row a size is odd, with two it is even.
_GUIDED, _UNGUIDED = 1.5, 1.0


class WarmUp:
    """Runs every size on one replica, a size at a time, between the steps of the requests in flight.

    ``limit_s``: a forward that takes longer fails the warm-up with ``TooSlowError``; None for no limit.
    """

    def __init__(self, generation: Generation, replica: int, max_rows: int, limit_s: float | None = None) -> None:
        self.generation = generation
        self.sampler = generation.samplers[replica]
        self.curve = generation.curves[replica]
        self._limit_s = limit_s
        self._sizes = deque(self.sampler.warm_up_rows(max_rows))
        self._ended = threading.Event()
        self.failure: BaseException | None = None

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
        return self._ended.wait(timeout_s)

    def fail(self, error: BaseException) -> None:
        """Give up because of ``error``."""
        if not self.ended:
            self.failure = error
            self._ended.set()

    def advance(self, stepper: Stepper) -> None:
        """Run the next size; raises what the sampler raises. Sizes beyond the memory are left out."""
        while self._sizes and self._sizes[0] > stepper.budget.rows:
            self._sizes.popleft()
        if self._sizes:
            self._run(self._sizes.popleft(), stepper)
        if not self._sizes:
            self._ended.set()

    def _run(self, size: int, stepper: Stepper) -> None:
        rows = self._rows(size)
        self.sampler.forward_limit_s = self._limit_s
        try:
            for _ in range(2):
                faulty = stepper.step(self.sampler, rows)
                if faulty:
                    raise faulty[0]
                measured = stepper.take_measured()
                if sum(seconds for _, seconds in measured) > QUICK_S:
                    break
        finally:
            self.sampler.forward_limit_s = None
        for forward_rows, seconds in measured:
            self.curve.observe(forward_rows, seconds)
        if not self._sizes:
            # An estimate takes the same way; a latent decoder may take seconds for a picture.
            encode_image(self.sampler.decode(rows[0]), "png")

    def _rows(self, size: int) -> list[Any]:
        """Images that take ``size`` rows of the model."""
        sampler_name = self.sampler.defaults.sampler
        pairs = size // 2 if self.sampler.can_guide else 0
        guidance = [_GUIDED] * pairs + [_UNGUIDED] * (size - 2 * pairs)
        return [
            self.sampler.start(RowSpec(i % self.sampler.drawn_classes, i, 2, scale, sampler_name))
            for i, scale in enumerate(guidance)
        ]
