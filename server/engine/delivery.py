"""From finished rows to encoded images, and from rows under way to previews, on a small pool of threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.engine.events import Event, Preview
from server.engine.images import encode_image
from server.engine.job import Job
from server.engine.ledger import Ledger
from server.engine.model import StepSampler

logger = logging.getLogger(__name__)


class Delivery:
    """Decodes, encodes and tells whoever waits.

    Args:
        max_pending: finished rows may pile up behind slow decoders; beyond this no new row should be admitted.
    """

    def __init__(self, ledger: Ledger, *, threads: int, max_pending: int) -> None:
        self._ledger = ledger
        self._metrics = ledger.metrics
        self._max_pending = max_pending
        self.pending = 0  # guarded by the ledger's lock, like all of a job
        self._busy = 0  # threads at work, likewise
        self._rest = threading.Condition(ledger.lock)  # none is
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    @property
    def has_room(self) -> bool:
        return self.pending < self._max_pending

    def deliver(self, job: Job, image: int, row: Any, sampler: StepSampler) -> None:
        """Decode a finished row. The caller has counted it in ``pending``."""
        self._submit(self._deliver, job, image, row, sampler)

    def preview(self, job: Job, image: int, steps_done: int, estimate: Any, sampler: StepSampler) -> None:
        """Decode an estimate for ``job.on_event``. The caller has counted it in ``pending``."""
        self._submit(self._preview, job, image, steps_done, estimate, sampler)

    def tell(self, job: Job, event: Event) -> None:
        """Call ``job.on_event``, once and for all if it raises."""
        sink = job.on_event
        if sink is None:
            return
        try:
            sink(event)
        except Exception:
            job.on_event = None
            logger.warning("a listener failed; it hears no more", exc_info=True, extra={"request_id": job.request_id})

    def stop(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def join(self, timeout_s: float) -> bool:
        """Wait until no thread is at work; whether that came."""
        with self._rest:
            return self._rest.wait_for(lambda: self._busy == 0, timeout_s)

    def _submit(self, task: Callable[..., None], *arguments: Any) -> None:
        try:
            self._pool.submit(self._work, task, arguments)
        except RuntimeError:  # shut down: whoever waited has been told
            if not self._ledger.closed:
                raise

    def _work(self, task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        lock = self._ledger.lock
        with lock:
            self._busy += 1
        try:
            task(*arguments)
        finally:
            with lock:
                had_room = self.has_room
                self._busy -= 1
                self._rest.notify_all()
                self.pending -= 1
                if self.has_room and not had_room:
                    self._ledger.work.notify_all()

    def _deliver(self, job: Job, image: int, row: Any, sampler: StepSampler) -> None:
        ledger = self._ledger
        try:
            if job.id not in ledger.jobs:
                return  # nobody waits for it any more
            began = ledger.clock()
            encoded = encode_image(sampler.decode(row), job.image_format)
            self._metrics.decode_duration.observe(ledger.clock() - began)
            with ledger.lock:
                job.images[image] = encoded
                complete = len(job.images) == len(job.specs)
            if complete:
                ledger.complete(job)
        except BaseException as error:  # the pool would keep it to itself, and the client would wait for ever
            ledger.fail(job, error)

    def _preview(self, job: Job, image: int, steps_done: int, estimate: Any, sampler: StepSampler) -> None:
        try:
            if job.on_event is not None:
                encoded = encode_image(sampler.decode_estimate(estimate), job.image_format)
                self.tell(job, Preview(image, steps_done, job.specs[image].steps, encoded))
        except Exception:
            logger.warning("a preview failed", exc_info=True, extra={"request_id": job.request_id})
        finally:
            job.previews_under_way.discard(image)
