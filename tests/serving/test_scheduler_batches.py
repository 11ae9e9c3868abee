"""Both schedulers against a plain model of themselves, under any order of calls, with several replicas."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.scheduler import (
    MAX_PRIORITY,
    ContinuousScheduler,
    Demand,
    QueueFull,
    RowKey,
    WindowScheduler,
)

INF = float("inf")
REPLICAS = st.integers(0, 2)


@dataclass
class Known:
    """What the test knows of a request."""

    demand: Demand
    waiting: set[int] = field(default_factory=set)
    running: dict[int, int] = field(default_factory=dict)  # image -> replica
    finished: set[int] = field(default_factory=set)


class SchedulerMachine(RuleBasedStateMachine):
    """Every image waits, then runs on one replica, then is finished or cancelled; none is lost or run twice."""

    def make(self, max_queue: int) -> ContinuousScheduler | WindowScheduler:
        return ContinuousScheduler(max_queue, ageing_s=2.0)

    @initialize(max_queue=st.integers(1, 20))
    def begin(self, max_queue: int) -> None:
        self.scheduler = self.make(max_queue)
        self.known: dict[int, Known] = {}  # by request, those that the scheduler should know
        self.ended: set[int] = set()
        self.batches: dict[int, list[RowKey]] = {0: [], 1: [], 2: []}
        self.now = 0.0

    def rows(self, replica: int) -> int:
        return sum(self.known[key.request_id].demand.rows_per_image for key in self.batches[replica])

    @property
    def waiting_images(self) -> int:
        return sum(len(known.waiting) for known in self.known.values())

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        num_images=st.integers(1, 8),
        steps=st.integers(1, 9),
        rows_per_image=st.integers(1, 2),
        priority=st.integers(0, MAX_PRIORITY),
        client=st.sampled_from(["", *"abc"]),
        patience=st.one_of(st.just(INF), st.floats(0, 20)),
    )
    def submit(
        self, num_images: int, steps: int, rows_per_image: int, priority: int, client: str, patience: float
    ) -> None:
        number = len(self.known) + len(self.ended)
        demand = Demand(number, num_images, steps, self.now, rows_per_image, priority, client, self.now + patience)
        excess = self.waiting_images + num_images - self.scheduler.max_queue_images
        mine = self.images_of(client) + num_images
        running = sum(len(known.running) * known.demand.image_cost for known in self.known.values())
        assert self.scheduler.cost >= running
        refused = None
        try:
            displaced = self.scheduler.submit(demand)
        except QueueFull as full:
            refused = full
        if refused is not None:
            assert refused.excess == excess > 0
            assert running <= refused.cost
            # The client would have more than its share, or others have requests that are partly admitted.
            clients = [other for other in ("", *"abc") if other == client or self.images_of(other)]
            touched = any(self.untouched_of(other) < self.images_of(other) for other in clients)
            assert mine * len(clients) > self.scheduler.max_queue_images or touched
            return
        assert (displaced != []) == (excess > 0)
        for number_displaced in displaced:
            other = self.known[number_displaced]
            assert self.images_of(other.demand.client) > mine
            assert len(other.waiting) == other.demand.num_images
            self.end(number_displaced)
        self.known[number] = Known(demand, set(range(num_images)))
        with pytest.raises(ValueError, match="already"):
            self.scheduler.submit(demand)

    def images_of(self, client: str) -> int:
        return sum(len(known.waiting) for known in self.known.values() if known.demand.client == client)

    def untouched_of(self, client: str) -> int:
        return sum(
            known.demand.num_images
            for known in self.known.values()
            if known.demand.client == client and len(known.waiting) == known.demand.num_images
        )

    @rule(replica=REPLICAS, max_rows=st.integers(1, 6), admit=st.booleans())
    def schedule(self, replica: int, max_rows: int, admit: bool) -> None:
        before, rows_before = self.batches[replica], self.rows(replica)
        waiting_before = self.waiting_images
        after = list(self.scheduler.schedule(replica, max_rows, self.now, admit=admit))
        assert after[: len(before)] == before, "images lost their place"
        joined = after[len(before) :]
        for request_id, image in joined:
            self.known[request_id].waiting.remove(image)  # KeyError: never submitted, cancelled, or admitted before
            self.known[request_id].running[image] = replica
        self.batches[replica] = after
        rows = self.rows(replica)
        assert not joined or rows <= max_rows or len(after) == 1
        if not admit:
            assert not joined
        self.check_joined(bool(before), len(joined), rows_before, waiting_before, max_rows)

    def check_joined(self, ran: bool, joined: int, rows_before: int, waiting_before: int, max_rows: int) -> None:
        """Which images join is checked for the continuous scheduler in test_scheduler_order.py."""

    @precondition(lambda self: any(self.batches.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for batch in self.batches.values() for key in batch]))
        self.scheduler.finish(key)
        known = self.known[key.request_id]
        self.batches[known.running.pop(key.image)].remove(key)
        known.finished.add(key.image)
        if len(known.finished) == known.demand.num_images:
            self.end(key.request_id)
        with pytest.raises(KeyError):
            self.scheduler.finish(key)

    @precondition(lambda self: self.known or self.ended)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(0, len(self.known) + len(self.ended)))  # at times unknown or ended
        self.scheduler.cancel(request_id)
        if request_id in self.known:
            self.end(request_id)

    def end(self, request_id: int) -> None:
        for replica, batch in self.batches.items():
            self.batches[replica] = [key for key in batch if key.request_id != request_id]
        del self.known[request_id]
        self.ended.add(request_id)

    @rule()
    def expire(self) -> None:
        late = {number for number, known in self.known.items() if known.demand.deadline <= self.now}
        expired = self.scheduler.expire(self.now)
        assert set(expired) == late
        assert len(expired) == len(late)

    @invariant()
    def counted(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert self.scheduler.waiting_images == self.waiting_images <= self.scheduler.max_queue_images
        untouched = [known for known in self.known.values() if not known.running and not known.finished]
        assert self.scheduler.waiting_requests == len(untouched)
        for replica in self.batches:
            assert self.scheduler.running_rows(replica) == self.rows(replica)
        self.check_wake_at(self.scheduler.wake_at(self.now))

    def check_wake_at(self, wake_at: float) -> None:
        deadline = min((known.demand.deadline for known in self.known.values()), default=INF)
        assert wake_at == deadline or (wake_at == self.now and deadline <= self.now)

    def teardown(self) -> None:
        """Whatever happened, all that is left can be served to its end, and nothing remains."""
        if not hasattr(self, "scheduler"):
            return
        self.now += 1000
        for _round in range(200):
            for replica in self.batches:
                self.schedule(replica, 4, True)
                for key in list(self.batches[replica]):
                    self.scheduler.finish(key)
                    known = self.known[key.request_id]
                    del known.running[key.image]
                    known.finished.add(key.image)
                    self.batches[replica].remove(key)
                    if len(known.finished) == known.demand.num_images:
                        self.end(key.request_id)
        assert not self.known
        assert self.scheduler.waiting_images == self.scheduler.waiting_requests == 0
        assert self.scheduler.wake_at(self.now) == INF
        assert self.scheduler.expire(self.now) == ()


class WindowMachine(SchedulerMachine):
    """The same, and a batch begins on an idle replica only, full or when its window has ended."""

    WINDOW_S = 3.0

    def make(self, max_queue: int) -> WindowScheduler:
        return WindowScheduler(max_queue, self.WINDOW_S, ageing_s=2.0)

    def check_joined(self, ran: bool, joined: int, rows_before: int, waiting_before: int, max_rows: int) -> None:
        if ran:
            assert joined == 0, "joined a batch that had begun"

    @precondition(lambda self: not self.batches[0])
    @rule(max_rows=st.integers(1, 6))
    def collect(self, max_rows: int) -> None:
        waiting = [known.demand for known in self.known.values() if known.waiting]
        rows = sum(known.demand.rows_per_image * len(known.waiting) for known in self.known.values())
        over = any(demand.arrived_at + self.WINDOW_S <= self.now for demand in waiting)
        self.schedule(0, max_rows, True)
        assert bool(self.batches[0]) == (rows >= max_rows or over)

    def check_wake_at(self, wake_at: float) -> None:
        deadline = min((known.demand.deadline for known in self.known.values()), default=INF)
        ends = [known.demand.arrived_at + self.WINDOW_S for known in self.known.values() if known.waiting]
        # Submitted in order of arrival, so the first end is that of the oldest; one that has passed needs no waking.
        first = min(ends, default=INF)
        expected = min(max(deadline, self.now), first if first > self.now else INF)
        assert max(wake_at, self.now) == expected


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestContinuous = SchedulerMachine.TestCase
TestContinuous.settings = SETTINGS
TestWindow = WindowMachine.TestCase
TestWindow.settings = SETTINGS


def test_a_wide_request_is_admitted_in_parts_on_several_replicas() -> None:
    scheduler = ContinuousScheduler(max_queue_images=10)
    scheduler.submit(Demand(0, 2, 5, 0.0))
    scheduler.submit(Demand(1, 6, 5, 0.0))
    assert scheduler.schedule(0, 3, 0.0) == ((0, 0), (0, 1), (1, 0))
    assert scheduler.schedule(1, 3, 0.0) == ((1, 1), (1, 2), (1, 3))
    scheduler.finish(RowKey(0, 1))
    assert scheduler.schedule(0, 3, 0.0) == ((0, 0), (1, 0), (1, 4))
    assert (scheduler.waiting_requests, scheduler.waiting_images) == (0, 1)
    scheduler.cancel(1)
    assert scheduler.schedule(0, 3, 0.0) == ((0, 0),)
    assert scheduler.schedule(1, 3, 0.0) == ()


def test_a_guided_image_takes_two_rows_and_is_not_passed_by_smaller_ones() -> None:
    scheduler = ContinuousScheduler(max_queue_images=10)
    scheduler.submit(Demand(0, 1, 5, 0.0, rows_per_image=2))
    scheduler.submit(Demand(1, 1, 5, 0.0, rows_per_image=2))
    scheduler.submit(Demand(2, 1, 5, 0.0, rows_per_image=1))
    assert scheduler.schedule(0, 3, 0.0) == ((0, 0),)
    scheduler.finish(RowKey(0, 0))
    assert scheduler.schedule(0, 3, 0.0) == ((1, 0), (2, 0))


def test_a_smaller_budget_sends_nobody_away() -> None:
    scheduler = ContinuousScheduler(max_queue_images=10)
    scheduler.submit(Demand(0, 5, 5, 0.0))
    assert len(scheduler.schedule(0, 4, 0.0)) == 4
    assert len(scheduler.schedule(0, 2, 0.0)) == 4
    for image in range(3):
        scheduler.finish(RowKey(0, image))
    assert scheduler.schedule(0, 2, 0.0) == ((0, 3), (0, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_images": 0}, "num_images"),
        ({"steps": 0}, "steps"),
        ({"rows_per_image": 0}, "rows_per_image"),
        ({"priority": -1}, "priority"),
        ({"priority": MAX_PRIORITY + 1}, "priority"),
    ],
)
def test_demands_of_nonsense_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Demand(**{"request_id": 0, "num_images": 1, "steps": 1, "arrived_at": 0.0, **fields})  # type: ignore[arg-type]


def test_limits_of_nonsense_are_refused() -> None:
    with pytest.raises(ValueError, match="max_queue_images"):
        ContinuousScheduler(0)
    with pytest.raises(ValueError, match="ageing_s"):
        ContinuousScheduler(1, ageing_s=0.0)
    with pytest.raises(ValueError, match="window_s"):
        WindowScheduler(1, -1.0)


def test_a_window_ends_at_the_time_that_wake_at_names() -> None:
    scheduler = WindowScheduler(max_queue_images=10, window_s=0.1)
    scheduler.submit(Demand(0, 1, 5, arrived_at=0.7))
    assert scheduler.schedule(0, 4, 0.75) == ()
    assert scheduler.schedule(0, 4, scheduler.wake_at(0.75)) == ((0, 0),)
