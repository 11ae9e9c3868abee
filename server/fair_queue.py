"""Images that wait, and whose turn it is: clients share the server fairly, each client's requests go by priority.

Between clients: start-time fair queueing (Goyal, Vin, Cheng 1996). A client's service grows by steps x rows of the
model with each of its images that is sent to a worker, and the client with the least service is next. The virtual time
is the least service of the clients who wait; a client who comes back starts there, so that idleness earns no credit.
Clients with images waiting all the time are never further apart than one image of each.

The room is shared, too: when it is full, a client with fewer images waiting displaces the requests whose turn is last
of the client with most (McKenney, Stochastic Fairness Queuing, 1990: the longest queue drops). So a client may take all
the room that nobody else asks for, and is refused only when it would have as many images waiting as any other.

Within a client: by ``submitted_at - priority * ageing_s``. The key never changes, so a request is overtaken only by
those that arrive less than ``(MAX_PRIORITY - priority) * ageing_s`` after it.

Knows no clock (``submitted_at`` is the caller's), no torch and no HTTP.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Queued(Protocol):
    """What the queue reads of a :class:`server.request.Request`."""

    client: str
    priority: int
    submitted_at: float
    rows_per_image: int
    image_cost: int

    @property
    def num_images(self) -> int: ...


Entry = TypeVar("Entry", bound=Queued)


class QueueFull(Exception):
    """The queue has no room for all images of a request; ``excess``: images that must leave it first."""

    def __init__(self, excess: int) -> None:
        super().__init__(f"the queue is {excess} image(s) too full")
        self.excess = excess


@dataclass
class _Client:
    service: float = 0.0
    images: int = 0  # that wait
    requests: Heap = field(default_factory=lambda: Heap())  # type: ignore[type-arg]


class FairQueue(Generic[Entry]):
    """Every operation takes O(log n) for n requests, :meth:`push` into a full queue O(n).

    Args:
        max_images: most images that may wait, over all requests.
        ageing_s: seconds of waiting that weigh as much as one level of priority.
    """

    def __init__(self, max_images: int, ageing_s: float) -> None:
        self.max_images = max_images
        self.ageing_s = ageing_s
        self.images = 0
        self.cost = 0  # of the images that wait, in rows of the model times steps
        self.untouched = 0  # requests none of whose images has been taken
        self._next_image: dict[Entry, int] = {}  # of the requests that wait
        self._again: deque[tuple[Entry, int]] = deque()  # taken before, and put back
        self._clients: dict[str, _Client] = {}
        self._turns: Heap[str] = Heap()  # clients with images waiting, by service
        self._away: Heap[str] = Heap()  # clients without, by service
        self._highest_service = 0.0

    def push(self, request: Entry) -> list[Entry]:
        """Queue all images of a request, or raise :class:`QueueFull` and queue none.

        Returns the requests that it has displaced, none of whose images had been taken.
        """
        displaced = self._make_room(request)
        client = self._arrive(request.client)
        client.requests.push(self._turn(request), request)
        self._next_image[request] = 0
        self.untouched += 1
        self._count(request, request.num_images)
        return displaced

    def head(self) -> Entry | None:
        """The request whose image is next."""
        if self._again:
            return self._again[0][0]
        turn = self._turns.first()
        if turn is None:
            return None
        first = self._clients[turn[1]].requests.first()
        assert first is not None
        entry: Entry = first[1]
        return entry

    def pop(self) -> tuple[Entry, int]:
        """Take the next image, a request and the image's number, and charge its client. IndexError if none waits."""
        if self._again:
            self.images -= 1
            self.cost -= self._again[0][0].image_cost
            return self._again.popleft()
        request = self.head()
        if request is None:
            raise IndexError("no image waits")
        image = self._next_image[request]
        if image == 0:
            self.untouched -= 1
        self._next_image[request] = image + 1
        self._count(request, -1)
        client = self._clients[request.client]
        client.service += request.image_cost
        self._highest_service = max(self._highest_service, client.service)
        self._turns.push(client.service, request.client)
        if image + 1 == request.num_images:
            self._leave(request)
        self._forget_the_settled()
        return request, image

    def put_back(self, request: Entry, image: int) -> None:
        """An image that was taken is next again, without another charge."""
        self._again.append((request, image))
        self.images += 1
        self.cost += request.image_cost

    def discard(self, request: Entry) -> None:
        """Drop every image of a request that still waits; an unknown request is no error."""
        if self._again:
            kept = deque(each for each in self._again if each[0] is not request)
            self.images -= len(self._again) - len(kept)
            self.cost -= (len(self._again) - len(kept)) * request.image_cost
            self._again = kept
        image = self._next_image.get(request)
        if image is None:
            return
        if image == 0:
            self.untouched -= 1
        self._count(request, image - request.num_images)
        self._leave(request)
        self._forget_the_settled()

    def _make_room(self, request: Entry) -> list[Entry]:
        """Displace what is in the way of ``request``, or raise :class:`QueueFull` and displace nothing."""
        missing = excess = self.images + request.num_images - self.max_images
        if excess <= 0:
            return []
        images = {name: client.images for name, client in self._clients.items()}
        images[request.client] = wanted = images.get(request.client, 0) + request.num_images
        displaced: list[Entry] = []
        untouched: dict[str, list[Entry]] = {}  # by client, in the order of their turns
        for waiting in sorted(self._next_image, key=self._turn):
            if self._next_image[waiting] == 0:
                untouched.setdefault(waiting.client, []).append(waiting)
        while missing > 0:
            longest = max(images, key=images.__getitem__)
            if images[longest] <= wanted or not untouched.get(longest):
                raise QueueFull(excess)
            last = untouched[longest].pop()
            displaced.append(last)
            images[longest] -= last.num_images
            missing -= last.num_images
        for other in displaced:
            self.discard(other)
        return displaced

    def _turn(self, request: Entry) -> float:
        return request.submitted_at - request.priority * self.ageing_s

    def _count(self, request: Entry, images: int) -> None:
        self._clients[request.client].images += images
        self.images += images
        self.cost += images * request.image_cost

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

    def _leave(self, request: Entry) -> None:
        del self._next_image[request]
        client = self._clients[request.client]
        client.requests.discard(request)
        if not client.requests:
            self._turns.discard(request.client)
            self._away.push(client.service, request.client)

    def _forget_the_settled(self) -> None:
        """Clients who are away and would come back at the virtual time need not be remembered."""
        virtual_time = self._virtual_time()
        while (first := self._away.first()) is not None and first[0] <= virtual_time:
            self._away.discard(first[1])
            del self._clients[first[1]]


class Heap(Generic[Item]):
    """Items by ascending key, equal keys in order of insertion. Each operation takes O(log n), amortised."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Item]] = []
        self._live: dict[Item, int] = {}  # item -> number of its entry; other entries are dead
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, item: Item) -> bool:
        return item in self._live

    def push(self, key: float, item: Item) -> None:
        """Insert an item, or move it behind those with an equal key."""
        number = next(self._numbers)
        self._live[item] = number
        heapq.heappush(self._entries, (key, number, item))
        self._compact()

    def first(self) -> tuple[float, Item] | None:
        """The least key with its item."""
        while self._entries:
            key, number, item = self._entries[0]
            if self._live.get(item) == number:
                return key, item
            heapq.heappop(self._entries)
        return None

    def discard(self, item: Item) -> None:
        """Take an item out; an absent one is no error."""
        self._live.pop(item, None)
        self._compact()

    def _compact(self) -> None:
        # Dead entries are dropped when they come first, or when they outnumber the live ones.
        if len(self._entries) > 2 * len(self._live) + 16:
            self._entries = [entry for entry in self._entries if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._entries)
