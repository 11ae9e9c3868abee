"""One copy of the model: a thread that takes the next rows, steps them, and hands finished ones on."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

from server.engine.delivery import Delivery
from server.engine.events import StepDone
from server.engine.job import Job
from server.engine.ledger import Ledger
from server.engine.model import StepSampler
from server.engine.stepping import Stepper
from server.engine.warm_up import WarmUp
from server.scheduler import StepTimeCurve

logger = logging.getLogger(__name__)


class _Entry(NamedTuple):
    job: Job
    image: int
    row: Any


@dataclass(eq=False)
class _Part:
    """What of a step one sampler runs; during a hot swap there are two."""

    sampler: StepSampler
    curve: StepTimeCurve
    images: list[tuple[Job, int]]
    batch: list[_Entry] | None = None  # once its rows have been started


class Replica:
    """Runs on the sampler number ``number`` of each generation.

    Args:
        max_batch_rows: most rows of the model in one forward.
        target_step_s: keep batches so small that a step takes at most this; None for no limit.
        stall_timeout_s: a forward that takes longer makes the replica stalled until it returns.
    """

    def __init__(
        self,
        number: int,
        ledger: Ledger,
        delivery: Delivery,
        *,
        peers: int,
        max_batch_rows: int,
        target_step_s: float | None,
        stall_timeout_s: float,
    ) -> None:
        self.number = number
        self.stepper = Stepper(max_batch_rows, ledger.clock)
        self.warm_up: WarmUp | None = None
        self.curve: StepTimeCurve | None = None  # of the generation that takes new requests
        self.peers = peers  # replicas that share the work, this one among them
        self.death: BaseException | None = None  # what its thread died of
        self._parts: list[_Part] = []  # of the latest step
        self._parts_of = -1  # the state of the ledger that they were made from
        self._stepping = False
        self._ledger = ledger
        self._delivery = delivery
        self._target_step_s = target_step_s
        self._stall_timeout_s = stall_timeout_s
        self._thread: threading.Thread | None = None

    # Asked and told by other threads.

    @property
    def stalled(self) -> bool:
        return self.stepper.running_s() > self._stall_timeout_s

    @property
    def dead(self) -> bool:
        """Its thread has ended though the engine has not."""
        return self._thread is not None and not self._thread.is_alive()

    @property
    def jobs_in_step(self) -> list[Job]:
        """Those with a row in the step under way."""
        return [job for part in self._parts for job, _ in part.images] if self._stepping else []

    @property
    def rows_per_s_locked(self) -> float:
        """Rows of the model a second in full batches, as measured; 0 when it does not move."""
        rows = self._affordable_rows_locked()
        seconds = 0.0 if self.curve is None or self.stalled else self.curve.seconds(rows)
        return rows / seconds if seconds else 0.0

    def start(self) -> None:
        """Begin, or begin again after a death."""
        self.death = None
        self._stepping = False
        self._parts = []
        self.stepper.step_began = None
        thread = threading.Thread(target=self._live, name=f"replica-{self.number}", daemon=True)
        thread.start()
        self._thread = thread  # not before it lives, or it would count as dead

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it came."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    # The loop.

    def _live(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.death = error
            logger.critical("replica %d has died", self.number, exc_info=True)
            self._end_warm_up(error)
        finally:
            with self._ledger.lock:
                self._ledger.alarm.notify()

    def _turn(self) -> bool:
        """Wait for work and do it; false when the engine has been closed."""
        parts = self._next_parts()
        if parts is None:
            return False
        self._stepping = True
        for part in parts:
            self._run_part(part)
        self._stepping = False
        if self.warm_up is not None:
            self._warm_up(self.warm_up)
        return True

    def _next_parts(self) -> list[_Part] | None:
        """Wait for work; the next step, or None when the engine has been closed."""
        ledger = self._ledger
        with ledger.lock:
            while not ledger.closed:
                if self._parts and self._parts_of == ledger.changes and not ledger.scheduler.waiting_images:
                    return self._parts  # nobody came, nobody left
                self._parts = []
                now = ledger.clock()
                keys = ledger.scheduler.schedule(
                    self.number, self._max_rows_locked(), now, admit=self._delivery.has_room
                )
                if keys or self.warm_up is not None:
                    self._parts = self._divide([(ledger.jobs[key.request_id], key.image) for key in keys])
                    self._parts_of = ledger.changes
                    return self._parts
                wake_at = ledger.scheduler.wake_at(now)
                # An expired request is the supervisor's; until it is gone wake_at lies in the past.
                ledger.work.wait(max(0.001, wake_at - now) if wake_at < math.inf else None)
        return None

    def _max_rows_locked(self) -> int:
        """Rows of the model that this replica's batch may have."""
        ledger = self._ledger
        rows = self._affordable_rows_locked() if ledger.scheduler.waiting_images else self.stepper.budget.rows
        if self.peers > 1:
            # An image that waits is better off on a replica that has less to do. Where images take two rows, a share
            # that is odd would leave one out.
            share = math.ceil(ledger.rows_to_step / self.peers)
            rows = min(rows, share + (ledger.rows_to_step > ledger.images_to_step))
        return rows

    def _affordable_rows_locked(self) -> int:
        rows = self.stepper.budget.rows
        if self._target_step_s is None or self.curve is None:
            return rows
        return self.curve.rows_within(self._target_step_s, rows)

    def _divide(self, images: list[tuple[Job, int]]) -> list[_Part]:
        parts: dict[int, _Part] = {}
        for job, image in images:
            part = parts.get(id(job.generation))
            if part is None:
                generation = job.generation
                part = parts[id(generation)] = _Part(
                    generation.samplers[self.number], generation.curves[self.number], []
                )
            part.images.append((job, image))
        return list(parts.values())

    def _run_part(self, part: _Part) -> None:
        try:
            self._step(part)
        except Exception as error:
            # Not a fault of a row (those are caught beneath), so it is ours: the rows go, the loop stays.
            for job, _ in part.images:
                self._ledger.fail(job, error)

    def _step(self, part: _Part) -> None:
        """One step: start the rows that are new, run the forward, hand the finished ones to the decoders."""
        ledger = self._ledger
        if part.batch is None:
            part.batch = self._started(part)
        if not (batch := part.batch):
            return
        began = ledger.clock()
        faulty = self.stepper.step(part.sampler, [entry.row for entry in batch])
        ended = ledger.clock()
        forwards = self.stepper.take_measured()
        for position, error in faulty.items():
            ledger.fail(batch[position].job, error)
        finished: list[_Entry] = []
        watched: list[_Entry] = []
        first_steps: list[Job] = []
        with ledger.lock:
            for rows, seconds in forwards:
                if rows:  # steps that reuse all of their blocks say nothing of those that run them
                    part.curve.observe(rows, seconds)
            for entry in batch:
                job = entry.job
                if job.id not in ledger.jobs:
                    continue  # cancelled or failed during the step
                if job.first_step_at is None:
                    first_steps.append(job)
                # Images of one request may be on several replicas, and who steps first need not come here first.
                job.first_step_at = min(began, job.first_step_at or began)
                if job.on_event is not None:
                    watched.append(entry)
                if entry.row.done:
                    del job.rows[entry.image]
                    job.last_step_at = max(ended, job.last_step_at)
                    ledger.stepped_locked(job, entry.image)
                    finished.append(entry)
            self._delivery.pending += len(finished)
        for rows, seconds in forwards:
            ledger.metrics.observe_step(rows, seconds)
        for job in first_steps:
            ledger.metrics.queue_time.observe(began - job.submitted_at)
            ledger.metrics.time_to_first_step.observe(ended - job.submitted_at)
        for entry in watched:
            self._tell(entry, part.sampler)
        for entry in finished:
            self._delivery.deliver(entry.job, entry.image, entry.row, part.sampler)

    def _started(self, part: _Part) -> list[_Entry]:
        batch: list[_Entry] = []
        for job, image in part.images:
            row = job.rows.get(image)
            if row is None:
                try:
                    row = job.rows[image] = part.sampler.start(job.specs[image])
                except Exception as error:
                    self._ledger.fail(job, error)
                    continue
            batch.append(_Entry(job, image, row))
        return batch

    def _tell(self, entry: _Entry, sampler: StepSampler) -> None:
        """The events of a step; a preview is left out while the one before is under way or decoders are behind."""
        job, image, row = entry
        self._delivery.tell(job, StepDone(image, row.steps_done, job.specs[image].steps))
        if not job.preview_every or row.done or row.steps_done % job.preview_every:
            return
        if image in job.previews_under_way or not self._delivery.has_room:
            return
        try:
            estimate = sampler.estimate(row)
        except Exception:
            logger.warning("a preview failed", exc_info=True, extra={"request_id": job.request_id})
            return
        job.previews_under_way.add(image)
        with self._ledger.lock:
            self._delivery.pending += 1
        self._delivery.preview(job, image, row.steps_done, estimate, sampler)

    def _warm_up(self, warm_up: WarmUp) -> None:
        try:
            if not warm_up.ended:  # not given up meanwhile
                warm_up.advance(self.stepper)
        except Exception as error:
            warm_up.fail(error)
        with self._ledger.lock:
            if warm_up.ended and self.warm_up is warm_up:  # the next one may be there already
                self.warm_up = None

    def _end_warm_up(self, error: BaseException) -> None:
        with self._ledger.lock:
            if self.warm_up is not None:
                self.warm_up.fail(error)
                self.warm_up = None
