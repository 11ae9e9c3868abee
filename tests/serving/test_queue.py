"""Who is next: fair shares between clients, priorities with ageing within one, and nobody starves."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.fair_queue import FairQueue, QueueFull
from server.request import MAX_PRIORITY

QUEUE = 10_000
COSTS = st.tuples(st.integers(1, 20), st.integers(1, 2))  # steps, rows per image


@dataclass(eq=False)
class Demand:
    """What the queue reads of a request."""

    request_id: int
    num_images: int
    steps: int
    submitted_at: float
    rows_per_image: int = 1
    priority: int = 0
    client: str = ""

    @property
    def image_cost(self) -> int:
        return self.steps * self.rows_per_image


Queue = FairQueue[Demand]


def take(queue: Queue) -> int:
    """Take the image whose turn it is; the id of its request."""
    return queue.pop()[0].request_id


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 60), st.integers(0, MAX_PRIORITY)), min_size=1, max_size=30),
    ageing_s=st.floats(0.1, 20),
)
def test_within_a_client_a_level_of_priority_is_worth_so_much_waiting(
    arrivals: list[tuple[float, int]], ageing_s: float
) -> None:
    queue = Queue(QUEUE, ageing_s)
    arrivals.sort(key=lambda arrival: arrival[0])
    for number, (at, priority) in enumerate(arrivals):
        queue.push(Demand(number, 1, 5, at, priority=priority))
    order = [take(queue) for _ in arrivals]
    assert order == sorted(order, key=lambda i: (arrivals[i][0] - arrivals[i][1] * ageing_s, i))


@given(
    floods=st.tuples(st.lists(COSTS, min_size=1, max_size=40), st.lists(COSTS, min_size=1, max_size=40)),
    images=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_clients_with_unequal_floods_are_served_equally(
    floods: tuple[list[tuple[int, int]], list[tuple[int, int]]], images: tuple[int, int]
) -> None:
    queue = Queue(QUEUE, 5.0)
    demands: list[Demand] = []
    for client, flood in enumerate(floods):
        for steps, rows in flood:
            demands.append(Demand(len(demands), images[client], steps, float(len(demands)), rows, client=str(client)))
            queue.push(demands[-1])
    left = Counter({str(client): len(flood) * images[client] for client, flood in enumerate(floods)})
    dearest = max(demand.image_cost for demand in demands)
    service: Counter[str] = Counter()
    while left["0"] and left["1"]:
        demand = demands[take(queue)]
        service[demand.client] += demand.image_cost
        left[demand.client] -= 1
        assert abs(service["0"] - service["1"]) <= dearest


@given(busy=st.integers(1, 200), costs=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_who_was_away_comes_back_without_credit(busy: int, costs: tuple[int, int]) -> None:
    """However long ``a`` was served alone, ``b`` gets its share from now on, not what it did not ask for."""
    queue = Queue(QUEUE, 5.0)
    queue.push(Demand(0, 1, costs[1], 0.0, client="b"))
    queue.push(Demand(1, busy + 200, costs[0], 0.0, client="a"))
    for _ in range(busy + 1):
        take(queue)
    queue.push(Demand(2, 200, costs[1], 1.0, client="b"))
    service = Counter({1: 0, 2: 0})
    for _ in range(100):
        request_id = take(queue)
        service[request_id] += costs[request_id - 1]
        assert abs(service[1] - service[2]) <= sum(costs)


@given(
    priority=st.integers(0, MAX_PRIORITY),
    ageing_s=st.floats(0.5, 5),
    ahead=st.integers(0, 20),
    between=st.floats(0.25, 2),
)
def test_nobody_starves_while_higher_priorities_keep_arriving(
    priority: int, ageing_s: float, ahead: int, between: float
) -> None:
    """One image is served every ``between`` seconds and as many of the highest priority arrive. The patient request is
    passed only by those ahead of it and by those that arrive within ``(MAX_PRIORITY - priority) ageing_s``."""
    queue = Queue(QUEUE, ageing_s)
    for number in range(ahead):
        queue.push(Demand(number, 1, 5, 0.0, priority=MAX_PRIORITY))
    queue.push(Demand(ahead, 1, 5, 0.0, priority=priority))
    bound = ahead + math.ceil((MAX_PRIORITY - priority) * ageing_s / between) + 1
    for served in range(bound + 1):
        queue.push(Demand(ahead + 1 + served, 1, 5, (served + 1) * between, priority=MAX_PRIORITY))
        if take(queue) == ahead:
            return
    raise AssertionError(f"not admitted after {bound} others")


def test_what_was_never_admitted_costs_nothing() -> None:
    queue = Queue(QUEUE, 5.0)
    dropped = Demand(0, 100, 1000, 0.0, client="a")
    queue.push(dropped)
    queue.discard(dropped)
    queue.push(Demand(1, 1, 10, 0.0, client="b"))
    queue.push(Demand(2, 1, 10, 0.0, client="a"))
    assert [take(queue) for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("one_waits", [False, True])
def test_clients_who_have_gone_are_forgotten(one_waits: bool) -> None:
    queue = Queue(QUEUE, 5.0)
    if one_waits:
        queue.push(Demand(-1, 5000, 10, 0.0, client="stays"))
    for number in range(2000):
        queue.push(Demand(number, 1, 10, float(number), client=f"key {number}"))
        while take(queue) == -1:
            pass
    assert len(queue._waiting) + len(queue._away) <= 3


def test_a_client_with_less_displaces_the_last_turns_of_the_one_with_most() -> None:
    queue = Queue(256, 5.0)
    for number in range(16):
        assert queue.push(Demand(number, 16, 1000, float(number), rows_per_image=2, client="greedy")) == []
    with pytest.raises(QueueFull):
        queue.push(Demand(16, 16, 1000, 16.0, rows_per_image=2, client="greedy"))
    assert queue.cost == 256 * 2000
    displaced = []
    for number in range(15):  # as many clients as there is room for whole requests, with the one that has it all
        displaced += queue.push(Demand(100 + number, 16, 20, 20.0, client=f"other{number}"))
    assert [request.request_id for request in displaced] == list(range(15, 0, -1))
    assert queue.images == 256
    for late in (Demand(200, 16, 20, 30.0, client="late"), Demand(201, 1, 1, 30.0, client="other1")):
        with pytest.raises(QueueFull):
            queue.push(late)


@given(asked=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 16)), max_size=60))
def test_only_those_who_have_their_share_are_refused_or_displaced(asked: list[tuple[str, int]]) -> None:
    queue = Queue(64, 5.0)
    requests: dict[int, tuple[str, int]] = {}

    def images_of(client: str) -> int:
        return sum(images for name, images in requests.values() if name == client)

    for number, (client, images) in enumerate(asked):
        wanted = images_of(client) + images
        try:
            displaced = queue.push(Demand(number, images, 5, float(number), client=client))
        except QueueFull:
            clients = {name for name, _ in requests.values()} | {client}
            assert wanted * len(clients) > 64
            continue
        for other in displaced:
            assert images_of(other.client) > wanted
            del requests[other.request_id]
        requests[number] = client, images
        assert queue.images == sum(images for _, images in requests.values()) <= 64


def test_an_image_that_is_put_back_is_next_and_is_not_charged_again() -> None:
    queue = Queue(10, 5.0)
    first, second = Demand(0, 2, 5, 0.0, client="a"), Demand(1, 2, 5, 1.0, client="b")
    queue.push(first)
    queue.push(second)
    taken = queue.pop()
    assert [taken, queue.pop()] == [(first, 0), (second, 0)]
    queue.put_back(*taken)
    assert (queue.images, queue.cost, queue.untouched, queue.head()) == (3, 15, 0, first)
    assert [queue.pop() for _ in range(3)] == [(first, 0), (first, 1), (second, 1)]
    assert (queue.images, queue.cost, queue.head()) == (0, 0, None)
    queue.put_back(first, 1)
    queue.put_back(second, 0)
    queue.discard(first)
    assert (queue.images, queue.cost, queue.head()) == (1, 5, second)
