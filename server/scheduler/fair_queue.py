"""Images that wait, and whose turn it is: clients share the server fairly, each client's requests go by priority.

Between clients: start-time fair queueing (Goyal, Vin, Cheng 1996). A client's service grows by steps x rows_per_image
with each of its images that is admitted, and the client with the least service is next. The virtual time is the least
service of the clients who wait; whoever was away starts there, so that idleness earns no credit. Clients with images
waiting all the time are never further apart than one image of each.

The room is shared, too: when it is full, a client with fewer images waiting displaces the requests whose turn is last
of the client with most (McKenney, Stochastic Fairness Queuing, 1990: the longest queue drops). So a client may take all
the room that nobody else asks for, and is refused only when it would have as many images waiting as any other.

Within a client: by ``arrived_at - priority * ageing_s``. The key never changes, so a request is overtaken only by those
that arrive less than ``(MAX_PRIORITY - priority) * ageing_s`` after it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from server.scheduler.heap import Heap
from server.scheduler.interface import Demand, QueueFull, RowKey


@dataclass
class _Client:
    service: float = 0.0
    images: int = 0  # that wait
    requests: Heap[int] = field(default_factory=Heap)


@dataclass
class _Waiting:
    demand: Demand
    next_image: int = 0  # images before it are admitted

    @property
    def images(self) -> int:
        return self.demand.num_images - self.next_image


class FairQueue:
    """Not thread-safe. Every operation takes O(log n) for n requests, :meth:`push` into a full queue O(n).

    Args:
        max_images: most images that may wait, over all requests.
        ageing_s: seconds of waiting that weigh as much as one level of priority.
    """

    def __init__(self, max_images: int, ageing_s: float) -> None:
        self.max_images = max_images
        self.ageing_s = ageing_s
        self.images = 0
        self.rows = 0
        self.cost = 0  # of the images that wait, in rows of the model times steps
        self.untouched_requests = 0  # none of whose images has been admitted
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()  # by arrival
        self._clients: dict[str, _Client] = {}
        self._turns: Heap[str] = Heap()  # clients with images waiting, by service
        self._away: Heap[str] = Heap()  # clients without, by service
        self._highest_service = 0.0

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    @property
    def oldest_arrival(self) -> float:
        """When the request that waits longest arrived; inf if none waits."""
        return next(iter(self._waiting.values())).demand.arrived_at if self._waiting else float("inf")

    def push(self, demand: Demand) -> list[int]:
        """Queue all images of a request, or raise :class:`QueueFull` and queue none.

        Returns the requests that it has displaced, none of whose images had been admitted.
        """
        displaced = self._make_room(demand)
        client = self._arrive(demand.client)
        client.requests.push(self._turn(demand), demand.request_id)
        self._waiting[demand.request_id] = _Waiting(demand)
        self.untouched_requests += 1
        self._count(demand, demand.num_images)
        return displaced

    def head(self) -> Demand | None:
        """The request whose image is next."""
        turn = self._turns.first()
        if turn is None:
            return None
        first = self._clients[turn[1]].requests.first()
        assert first is not None
        return self._waiting[first[1]].demand

    def pop(self) -> RowKey:
        """Admit the next image and charge its client. IndexError if none waits."""
        demand = self.head()
        if demand is None:
            raise IndexError("no image waits")
        waiting = self._waiting[demand.request_id]
        key = RowKey(demand.request_id, waiting.next_image)
        if waiting.next_image == 0:
            self.untouched_requests -= 1
        waiting.next_image += 1
        self._count(demand, -1)
        client = self._clients[demand.client]
        client.service += demand.image_cost
        self._highest_service = max(self._highest_service, client.service)
        self._turns.push(client.service, demand.client)
        if not waiting.images:
            self._leave(demand)
        self._forget_the_settled()
        return key

    def discard(self, request_id: int) -> None:
        """Drop the images of a request that still wait; they have cost nothing."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return
        if waiting.next_image == 0:
            self.untouched_requests -= 1
        self._count(waiting.demand, -waiting.images)
        self._leave(waiting.demand)
        self._forget_the_settled()

    def _make_room(self, demand: Demand) -> list[int]:
        """Displace what is in the way of ``demand``, or raise :class:`QueueFull` and displace nothing."""
        missing = excess = self.images + demand.num_images - self.max_images
        if excess <= 0:
            return []
        images = {name: client.images for name, client in self._clients.items()}
        images[demand.client] = wanted = images.get(demand.client, 0) + demand.num_images
        displaced: list[int] = []
        untouched: dict[str, list[Demand]] = {}  # by client, in the order of their turns
        for waiting in sorted(self._waiting.values(), key=lambda waiting: self._turn(waiting.demand)):
            if waiting.next_image == 0:
                untouched.setdefault(waiting.demand.client, []).append(waiting.demand)
        while missing > 0:
            longest = max(images, key=images.__getitem__)
            if images[longest] <= wanted or not untouched.get(longest):
                raise QueueFull(excess, excess * self.cost / max(1, self.images))
            last = untouched[longest].pop()
            displaced.append(last.request_id)
            images[longest] -= last.num_images
            missing -= last.num_images
        for request_id in displaced:
            self.discard(request_id)
        return displaced

    def _turn(self, demand: Demand) -> float:
        return demand.arrived_at - demand.priority * self.ageing_s

    def _count(self, demand: Demand, images: int) -> None:
        self._clients[demand.client].images += images
        self.images += images
        self.cost += images * demand.image_cost
        self.rows += images * demand.rows_per_image

    def _virtual_time(self) -> float:
        """Never decreases: the least service of those who wait; when nobody does, the highest of all."""
        turn = self._turns.first()
        return self._highest_service if turn is None else turn[0]

    def _arrive(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client()
        if name not in self._turns:
            self._away.discard(name)
            client.service = max(client.service, self._virtual_time())
            self._turns.push(client.service, name)
        return client

    def _leave(self, demand: Demand) -> None:
        del self._waiting[demand.request_id]
        client = self._clients[demand.client]
        client.requests.discard(demand.request_id)
        if not client.requests:
            self._turns.discard(demand.client)
            self._away.push(client.service, demand.client)

    def _forget_the_settled(self) -> None:
        """Clients who are away and would come back at the virtual time need not be remembered."""
        virtual_time = self._virtual_time()
        while (first := self._away.first()) is not None and first[0] <= virtual_time:
            self._away.discard(first[1])
            del self._clients[first[1]]
