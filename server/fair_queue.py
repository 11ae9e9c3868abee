"""Images that wait, and which is next: clients share the server fairly, each client's requests go by priority.

Between clients: start-time fair queueing (Goyal, Vin, Cheng 1996). A client's service grows by steps x rows of the
model with each of its images that is sent to a worker, and the client with the least service is next. The virtual time
is the least service of the clients who wait; a client who comes back starts there, so that idleness earns no credit.
Clients with images waiting all the time are never further apart than one image of each.

The room is shared, too: when it is full, a client with fewer images waiting displaces the requests whose turn is last
of the client with most (McKenney, Stochastic Fairness Queuing, 1990: the longest queue drops). So a client may take all
the room that no other client asks for, and is rejected only when it would have as many images waiting as any other.

Within a client: by ``submitted_at - priority * ageing_s``. The key never changes, so a request is overtaken only by
those that arrive less than ``(MAX_PRIORITY - priority) * ageing_s`` after it.

Knows no clock (``submitted_at`` is the caller's), no torch and no HTTP.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


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
class _Place:
    """A request's place in its client's line, and the next of its images."""

    turn: tuple[float, int]
    next_image: int = 0


@dataclass
class _Client(Generic[Entry]):
    service: float = 0.0
    images: int = 0  # that wait
    line: list[tuple[tuple[float, int], Entry]] = field(default_factory=list)  # by turn


class FairQueue(Generic[Entry]):
    """Images of requests, of which at most ``max_images`` wait.

    Args:
        ageing_s: seconds of waiting that weigh as much as one level of priority.
    """

    def __init__(self, max_images: int, ageing_s: float) -> None:
        self.max_images = max_images
        self.ageing_s = ageing_s
        self.images = 0
        self.cost = 0  # of the images that wait, in rows of the model times steps
        self.untouched = 0  # requests none of whose images has been taken
        self._places: dict[Entry, _Place] = {}  # of the requests that wait
        self._again: deque[tuple[Entry, int]] = deque()  # taken before, and put back
        self._waiting: dict[str, _Client[Entry]] = {}  # clients with images that wait; last served, last
        self._away: dict[str, float] = {}  # service of the others, as far as it is above the virtual time
        self._highest_service = 0.0
        self._numbers = itertools.count()

    def push(self, request: Entry) -> list[Entry]:
        """Queue all images of a request, or raise :class:`QueueFull` and queue none.

        Returns the requests that it has displaced, none of whose images had been taken.
        """
        displaced = self._make_room(request)
        client = self._waiting.get(request.client)
        if client is None:
            service = max(self._away.pop(request.client, 0.0), self._virtual_time())
            client = self._waiting[request.client] = _Client(service)
        place = _Place((request.submitted_at - request.priority * self.ageing_s, next(self._numbers)))
        bisect.insort(client.line, (place.turn, request), key=_turn)
        self._places[request] = place
        self.untouched += 1
        self._count(request, request.num_images)
        return displaced

    def head(self) -> Entry | None:
        if self._again:
            return self._again[0][0]
        if not self._waiting:
            return None
        return min(self._waiting.values(), key=_service).line[0][1]

    def pop(self) -> tuple[Entry, int]:
        """Take the next image, a request and the image's number, and charge its client. IndexError if none waits."""
        if self._again:
            self.images -= 1
            self.cost -= self._again[0][0].image_cost
            return self._again.popleft()
        request = self.head()
        if request is None:
            raise IndexError("no image waits")
        place = self._places[request]
        image = place.next_image
        place.next_image += 1
        self.untouched -= image == 0
        self._count(request, -1)
        client = self._waiting.pop(request.client)
        self._waiting[request.client] = client
        client.service += request.image_cost
        self._highest_service = max(self._highest_service, client.service)
        if place.next_image == request.num_images:
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
        place = self._places.get(request)
        if place is None:
            return
        self.untouched -= place.next_image == 0
        self._count(request, place.next_image - request.num_images)
        self._leave(request)
        self._forget_the_settled()

    def _make_room(self, request: Entry) -> list[Entry]:
        """Displace what is in the way of ``request``, or raise :class:`QueueFull` and displace nothing."""
        missing = excess = self.images + request.num_images - self.max_images
        if excess <= 0:
            return []
        images = {name: client.images for name, client in self._waiting.items()}
        images[request.client] = wanted = images.get(request.client, 0) + request.num_images
        displaced: list[Entry] = []
        untouched = {  # by client, in the order of their turns
            name: [waiting for _, waiting in client.line if self._places[waiting].next_image == 0]
            for name, client in self._waiting.items()
        }
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

    def _count(self, request: Entry, images: int) -> None:
        self._waiting[request.client].images += images
        self.images += images
        self.cost += images * request.image_cost

    def _virtual_time(self) -> float:
        """Never decreases: the least service of those who wait; when nobody does, the highest of all."""
        return min(map(_service, self._waiting.values()), default=self._highest_service)

    def _leave(self, request: Entry) -> None:
        client = self._waiting[request.client]
        del client.line[bisect.bisect_left(client.line, self._places.pop(request).turn, key=_turn)]
        if not client.line:
            del self._waiting[request.client]
            self._away[request.client] = client.service

    def _forget_the_settled(self) -> None:
        """Clients who are away and would come back at the virtual time need not be remembered."""
        if self._away:
            now = self._virtual_time()
            self._away = {name: service for name, service in self._away.items() if service > now}


def _turn(waiting: tuple[tuple[float, int], Entry]) -> tuple[float, int]:
    return waiting[0]


def _service(client: _Client[Entry]) -> float:
    return client.service
