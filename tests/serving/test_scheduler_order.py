"""Who is next: fair shares between clients, priorities with ageing within one, and nobody starves."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduler import MAX_PRIORITY, ContinuousScheduler, Demand, QueueFull, RowKey

QUEUE = 10_000
COSTS = st.tuples(st.integers(1, 20), st.integers(1, 2))  # steps, rows per image


def admit_one(scheduler: ContinuousScheduler, now: float = 0.0) -> RowKey:
    """Admit the image whose turn it is, and finish it."""
    (key,) = scheduler.schedule(0, 1, now)
    scheduler.finish(key)
    return key


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 60), st.integers(0, MAX_PRIORITY)), min_size=1, max_size=30),
    ageing_s=st.floats(0.1, 20),
)
def test_within_a_client_a_level_of_priority_is_worth_so_much_waiting(
    arrivals: list[tuple[float, int]], ageing_s: float
) -> None:
    scheduler = ContinuousScheduler(QUEUE, ageing_s)
    arrivals.sort(key=lambda arrival: arrival[0])
    for number, (at, priority) in enumerate(arrivals):
        scheduler.submit(Demand(number, 1, 5, at, priority=priority))
    order = [admit_one(scheduler).request_id for _ in arrivals]
    assert order == sorted(order, key=lambda i: (arrivals[i][0] - arrivals[i][1] * ageing_s, i))


@given(
    floods=st.tuples(st.lists(COSTS, min_size=1, max_size=40), st.lists(COSTS, min_size=1, max_size=40)),
    images=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_clients_with_unequal_floods_are_served_equally(
    floods: tuple[list[tuple[int, int]], list[tuple[int, int]]], images: tuple[int, int]
) -> None:
    scheduler = ContinuousScheduler(QUEUE)
    demands: dict[int, Demand] = {}
    for client, flood in enumerate(floods):
        for steps, rows in flood:
            demand = Demand(len(demands), images[client], steps, float(len(demands)), rows, client=str(client))
            demands[demand.request_id] = demand
            scheduler.submit(demand)
    left = Counter({str(client): len(flood) * images[client] for client, flood in enumerate(floods)})
    dearest = max(demand.steps * demand.rows_per_image for demand in demands.values())
    service: Counter[str] = Counter()
    while left["0"] and left["1"]:
        demand = demands[scheduler.schedule(0, 1, 0.0)[0].request_id]
        scheduler.finish(scheduler.schedule(0, 1, 0.0)[0])
        service[demand.client] += demand.steps * demand.rows_per_image
        left[demand.client] -= 1
        assert abs(service["0"] - service["1"]) <= dearest


@given(busy=st.integers(1, 200), costs=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_who_was_away_comes_back_without_credit(busy: int, costs: tuple[int, int]) -> None:
    """However long ``a`` was served alone, ``b`` gets its share from now on, not what it did not ask for."""
    scheduler = ContinuousScheduler(QUEUE)
    scheduler.submit(Demand(0, 1, costs[1], 0.0, client="b"))
    scheduler.submit(Demand(1, busy + 200, costs[0], 0.0, client="a"))
    for _ in range(busy + 1):
        admit_one(scheduler)
    scheduler.submit(Demand(2, 200, costs[1], 1.0, client="b"))
    service = Counter({1: 0, 2: 0})
    for _ in range(100):
        request_id = admit_one(scheduler).request_id
        service[request_id] += costs[request_id - 1]
        assert abs(service[1] - service[2]) <= sum(costs)


def test_a_client_that_comes_and_goes_gains_nothing_over_one_that_stays() -> None:
    scheduler = ContinuousScheduler(QUEUE)
    scheduler.submit(Demand(0, 1000, 10, 0.0, client="stays"))
    served: Counter[str] = Counter()
    for number in range(1, 201):  # one request at a time, each as soon as the one before was admitted
        scheduler.submit(Demand(number, 1, 10, float(number), client="comes"))
        while (request_id := admit_one(scheduler).request_id) == 0:
            served["stays"] += 1
        assert request_id == number
        served["comes"] += 1
    assert abs(served["stays"] - served["comes"]) <= 1


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
    scheduler = ContinuousScheduler(QUEUE, ageing_s)
    for number in range(ahead):
        scheduler.submit(Demand(number, 1, 5, 0.0, priority=MAX_PRIORITY))
    patient = ahead
    scheduler.submit(Demand(patient, 1, 5, 0.0, priority=priority))
    bound = ahead + math.ceil((MAX_PRIORITY - priority) * ageing_s / between) + 1
    for served in range(bound + 1):
        now = (served + 1) * between
        scheduler.submit(Demand(patient + 1 + served, 1, 5, now, priority=MAX_PRIORITY))
        if admit_one(scheduler, now).request_id == patient:
            return
    raise AssertionError(f"not admitted after {bound} others")


@given(
    others=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    steps=st.integers(1, 20),
)
def test_a_newcomer_waits_for_a_computable_number_of_images_of_others(others: list[int], steps: int) -> None:
    """``n`` clients flood without end; whoever joins gets its first image within a computable number of others'."""
    scheduler = ContinuousScheduler(QUEUE)
    for number, cost in enumerate(others):
        scheduler.submit(Demand(number, 500, cost, 0.0, client=f"flood {number}"))
    for _ in range(37):
        admit_one(scheduler)
    newcomer = len(others)
    scheduler.submit(Demand(newcomer, 3, steps, 1.0, client="newcomer"))
    # Its nth image starts (n - 1) steps above the virtual time, and so does every flood, within its own cost.
    for image in range(3):
        passed = 0
        while admit_one(scheduler).request_id != newcomer:
            passed += 1
        assert passed <= sum(math.ceil(steps / cost) + 1 for cost in others), f"image {image}"


def test_what_was_never_admitted_costs_nothing() -> None:
    scheduler = ContinuousScheduler(QUEUE)
    scheduler.submit(Demand(0, 100, 1000, 0.0, client="a"))
    scheduler.cancel(0)
    scheduler.submit(Demand(1, 1, 10, 0.0, client="b"))
    scheduler.submit(Demand(2, 1, 10, 0.0, client="a"))
    assert [admit_one(scheduler).request_id for _ in range(2)] == [1, 2]
    scheduler.submit(Demand(3, 1, 10, 0.0, client="a"))
    scheduler.submit(Demand(4, 1, 10, 0.0, client="b"))
    assert {admit_one(scheduler).request_id for _ in range(2)} == {3, 4}


@pytest.mark.parametrize("one_waits", [False, True])
def test_clients_who_have_gone_are_forgotten(one_waits: bool) -> None:
    scheduler = ContinuousScheduler(QUEUE)
    if one_waits:
        scheduler.submit(Demand(-1, 5000, 10, 0.0, client="stays"))
    for number in range(2000):
        scheduler.submit(Demand(number, 1, 10, float(number), client=f"key {number}"))
        while one_waits and admit_one(scheduler).request_id == -1:
            pass
        if not one_waits:
            admit_one(scheduler)
    assert len(scheduler._queue._clients) <= 3


def test_a_client_with_less_displaces_the_last_turns_of_the_one_with_most() -> None:
    scheduler = ContinuousScheduler(256)
    for number in range(16):
        assert scheduler.submit(Demand(number, 16, 1000, float(number), rows_per_image=2, client="greedy")) == []
    with pytest.raises(QueueFull) as full:
        scheduler.submit(Demand(16, 16, 1000, 16.0, rows_per_image=2, client="greedy"))
    assert (full.value.excess, full.value.cost) == (16, 16 * 2000)
    displaced = []
    for number in range(15):  # as many clients as there is room for whole requests, with the one that has it all
        displaced += scheduler.submit(Demand(100 + number, 16, 20, 20.0, client=f"other{number}"))
    assert displaced == list(range(15, 0, -1))
    assert scheduler.waiting_images == 256
    with pytest.raises(QueueFull):
        scheduler.submit(Demand(200, 16, 20, 30.0, client="late"))
    with pytest.raises(QueueFull):
        scheduler.submit(Demand(201, 1, 1, 30.0, client="other1"))


@given(asked=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 16)), max_size=60))
def test_only_those_who_have_their_share_are_refused_or_displaced(asked: list[tuple[str, int]]) -> None:
    scheduler = ContinuousScheduler(64)
    requests: dict[int, tuple[str, int]] = {}

    def images_of(client: str) -> int:
        return sum(images for name, images in requests.values() if name == client)

    for number, (client, images) in enumerate(asked):
        wanted = images_of(client) + images
        try:
            displaced = scheduler.submit(Demand(number, images, 5, float(number), client=client))
        except QueueFull:
            clients = {name for name, _ in requests.values()} | {client}
            assert wanted * len(clients) > 64
            continue
        for other in displaced:
            assert images_of(requests[other][0]) > wanted
            del requests[other]
        requests[number] = client, images
        assert scheduler.waiting_images == sum(images for _, images in requests.values()) <= 64


def test_clients_without_a_name_are_one_and_displace_nothing() -> None:
    scheduler = ContinuousScheduler(100)
    scheduler.submit(Demand(0, 100, 5, 0.0))
    with pytest.raises(QueueFull) as full:
        scheduler.submit(Demand(1, 4, 9, 0.0))
    assert (full.value.excess, full.value.cost) == (4, 20)
    scheduler.schedule(0, 10, 0.0)
    with pytest.raises(QueueFull) as full:
        scheduler.submit(Demand(1, 12, 9, 0.0))
    assert (full.value.excess, full.value.cost) == (2, 10 + 50)  # ten run, each of five steps
