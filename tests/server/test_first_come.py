"""The scheduler against a plain model of itself, under any order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.scheduler import FirstComeScheduler, QueueFull, RowKey


class SchedulerMachine(RuleBasedStateMachine):
    """Every row is, in order of arrival, waiting, then running, then finished or cancelled; none is lost or doubled."""

    @initialize(max_rows=st.integers(1, 6), max_queue=st.integers(1, 20))
    def begin(self, max_rows: int, max_queue: int) -> None:
        self.scheduler = FirstComeScheduler(max_rows, max_queue)
        self.waiting: list[RowKey] = []
        self.running: list[RowKey] = []
        self.admitted: list[RowKey] = []
        self.requests = 0

    @rule(num_images=st.integers(1, 8))
    def submit(self, num_images: int) -> None:
        request_id, self.requests = self.requests, self.requests + 1
        excess = len(self.waiting) + num_images - self.scheduler.max_queue_images
        if excess > 0:
            with pytest.raises(QueueFull) as full:
                self.scheduler.submit(request_id, num_images)
            assert full.value.excess == excess
        else:
            self.scheduler.submit(request_id, num_images)
            self.waiting += [RowKey(request_id, i) for i in range(num_images)]

    @rule(admit=st.booleans())
    def schedule(self, admit: bool) -> None:
        free = self.scheduler.max_batch_rows - len(self.running) if admit else 0
        joined, self.waiting = self.waiting[:free], self.waiting[free:]
        self.running += joined
        self.admitted += joined
        assert list(self.scheduler.schedule(admit=admit)) == self.running

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.running))
        self.running.remove(key)
        self.scheduler.finish(key)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(0, self.requests))  # at times one that is unknown or has ended
        self.waiting = [key for key in self.waiting if key.request_id != request_id]
        self.running = [key for key in self.running if key.request_id != request_id]
        self.scheduler.cancel(request_id)

    @invariant()
    def bounded_and_counted(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert self.scheduler.running_rows == len(self.running) <= self.scheduler.max_batch_rows
        assert self.scheduler.waiting_images == len(self.waiting) <= self.scheduler.max_queue_images
        begun = {key.request_id for key in self.admitted}
        assert self.scheduler.waiting_requests == len({key.request_id for key in self.waiting} - begun)
        assert self.admitted == sorted(self.admitted), "rows were admitted out of order"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_wide_request_is_admitted_in_parts() -> None:
    scheduler = FirstComeScheduler(max_batch_rows=3, max_queue_images=10)
    scheduler.submit(0, 2)
    scheduler.submit(1, 4)
    assert scheduler.schedule() == ((0, 0), (0, 1), (1, 0))
    scheduler.finish(RowKey(0, 1))
    assert scheduler.schedule() == ((0, 0), (1, 0), (1, 1))
    assert scheduler.waiting_requests == 0
    assert scheduler.waiting_images == 2


@pytest.mark.parametrize(("rows", "queue"), [(0, 1), (1, 0)])
def test_nonsense_limits_are_refused(rows: int, queue: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FirstComeScheduler(rows, queue)


def test_misuse_is_refused() -> None:
    scheduler = FirstComeScheduler(1, 4)
    with pytest.raises(ValueError, match="num_images"):
        scheduler.submit(0, 0)
    scheduler.submit(0, 1)
    with pytest.raises(ValueError, match="already"):
        scheduler.submit(0, 1)
