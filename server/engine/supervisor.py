"""What must go on whatever the replicas do: deadlines, the restart of dead ones, the end of old generations."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from server.collector import collect_released
from server.engine.generation import Generation
from server.engine.job import Job
from server.engine.ledger import Ledger
from server.engine.replica import Replica

logger = logging.getLogger(__name__)

# Between looks at what nobody tells of: replicas that stall or move again, deadlines of images in the decoders' hands.
POLL_S = 0.25
# More deaths than this within the window are no accidents.
MAX_RESTARTS, RESTART_WINDOW_S = 3, 60.0
# A request reads the sampler an instant before it is submitted; so long does a swapped one stay for it.
RELEASE_AFTER_S = 1.0


class Supervisor:
    """A thread that touches no model and so cannot be held up by one.

    Args:
        on_failure: called with what the last replica died of, when restarting is of no use.
    """

    def __init__(
        self, ledger: Ledger, replicas: Sequence[Replica], on_failure: Callable[[BaseException], None]
    ) -> None:
        self._ledger = ledger
        self._replicas = replicas
        self._on_failure = on_failure
        self._stalled: set[int] = set()
        self._deaths: deque[float] = deque()
        self.retired: list[Generation] = []  # guarded by the ledger's lock
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it came."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._ledger.closed:
            try:
                for job in self._late_jobs():
                    self._ledger.expire(job)
                self._release_retired()
                for replica in self._replicas:
                    if replica.dead and not self._ledger.closed:
                        self._revive(replica)
                self._share_work()
            except Exception:
                logger.exception("the supervisor met an error; it goes on")
                time.sleep(POLL_S)

    def _late_jobs(self) -> list[Job]:
        """Wait until something may be amiss; the jobs past their deadlines, if it is that."""
        ledger = self._ledger
        with ledger.lock:
            now = ledger.clock()
            late = ledger.late_locked(now)
            if late or ledger.closed or any(replica.dead for replica in self._replicas):
                return late
            ledger.alarm_at = min(now + POLL_S, ledger.scheduler.wake_at(now))
            ledger.alarm.wait(max(0.0, ledger.alarm_at - now))
            return ledger.late_locked(ledger.clock())

    def _release_retired(self) -> None:
        """Free the memory of models that nobody needs any more."""
        with self._ledger.lock:
            now = self._ledger.clock()
            ended = [
                generation
                for generation in self.retired
                if generation.jobs == 0 and now - (generation.retired_at or 0.0) > RELEASE_AFTER_S
            ]
            for generation in ended:
                generation.release()
                self.retired.remove(generation)
        if ended:
            collect_released()
            logger.info("released a swapped checkpoint")

    def _revive(self, replica: Replica) -> None:
        """Fail what a dead replica had in hand and start it again, unless that has happened too often."""
        error = replica.death or RuntimeError("its thread has ended")
        for job in replica.jobs_in_step:
            self._ledger.fail(job, error)
        now = self._ledger.clock()
        self._deaths.append(now)
        while now - self._deaths[0] > RESTART_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > MAX_RESTARTS:
            self._on_failure(error)
            return
        logger.warning("restarting replica %d", replica.number)
        replica.start()

    def _share_work(self) -> None:
        """Only replicas that move are reckoned with; tell when one stalls and when it moves again."""
        stalled = {replica.number for replica in self._replicas if replica.stalled}
        for number in sorted(stalled - self._stalled):
            logger.error("replica %d has stalled in a forward", number)
        for number in sorted(self._stalled - stalled):
            logger.warning("replica %d moves again", number)
        self._stalled = stalled
        for replica in self._replicas:
            replica.peers = max(1, len(self._replicas) - len(stalled - {replica.number}))
