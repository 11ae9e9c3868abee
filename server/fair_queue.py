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
    """The queue has no room for all images of a request."""


@dataclass(eq=False)
class _Place(Generic[Entry]):
    """A request in the line of its client, and the next of its images."""

    request: Entry
    turn: tuple[float, int]
    next_image: int = 0

    @property
    def images(self) -> int:
        return self.request.num_images - self.next_image


@dataclass(eq=False)
class _Client(Generic[Entry]):
    service: float
    line: list[_Place[Entry]] = field(default_factory=list)  # by turn


class FairQueue(Generic[Entry]):
    """Images of requests, of which at most ``max_images`` wait.

    Args:
        ageing_s: seconds of waiting that weigh as much as one level of priority.
    """

    def __init__(self, max_images: int, ageing_s: float) -> None:
        self.max_images = max_images
        self.ageing_s = ageing_s
        self._places: dict[Entry, _Place[Entry]] = {}  # of the requests that wait
        self._again: deque[tuple[Entry, int]] = deque()  # taken before, and put back
        self._waiting: dict[str, _Client[Entry]] = {}  # clients with images that wait; last served, last
        self._away: dict[str, float] = {}  # service of the others, as far as it is above the virtual time
        self._highest_service = 0.0
        self._numbers = itertools.count()

    @property
    def images(self) -> int:
        return len(self._again) + sum(place.images for place in self._places.values())

    @property
    def cost(self) -> int:
        """Of the images that wait, in rows of the model times steps."""
        again = sum(request.image_cost for request, _ in self._again)
        return again + sum(place.images * place.request.image_cost for place in self._places.values())

    @property
    def untouched(self) -> int:
        """Requests none of whose images has been taken."""
        return sum(place.next_image == 0 for place in self._places.values())

    def push(self, request: Entry) -> list[Entry]:
        """Queue all images of a request, or raise :class:`QueueFull` and queue none.

        Returns the requests that it has displaced, none of whose images had been taken.
        """
        displaced = self._make_room(request)
        client = self._waiting.get(request.client)
        if client is None:
            service = max(self._away.pop(request.client, 0.0), self._virtual_time())
            client = self._waiting[request.client] = _Client(service)
        turn = (request.submitted_at - request.priority * self.ageing_s, next(self._numbers))
        place = self._places[request] = _Place(request, turn)
        bisect.insort(client.line, place, key=lambda place: place.turn)
        return displaced

    def head(self) -> Entry | None:
        if self._again:
            return self._again[0][0]
        if not self._waiting:
            return None
        return min(self._waiting.values(), key=_service).line[0].request

    def pop(self) -> tuple[Entry, int]:
        """Take the next image, a request and the image's number, and charge its client. IndexError if none waits."""
        if self._again:
            return self._again.popleft()
        request = self.head()
        if request is None:
            raise IndexError("no image waits")
        place = self._places[request]
        image = place.next_image
        place.next_image += 1
        client = self._waiting.pop(request.client)
        self._waiting[request.client] = client
        client.service += request.image_cost
        self._highest_service = max(self._highest_service, client.service)
        if not place.images:
            self._leave(place)
        return request, image

    def put_back(self, request: Entry, image: int) -> None:
        """An image that was taken is next again, without another charge."""
        self._again.append((request, image))

    def discard(self, request: Entry) -> None:
        """Drop every image of a request that still waits; an unknown request is no error."""
        if self._again:
            self._again = deque(each for each in self._again if each[0] is not request)
        if (place := self._places.get(request)) is not None:
            self._leave(place)

    def _make_room(self, request: Entry) -> list[Entry]:
        """Displace what is in the way of ``request``, or raise :class:`QueueFull` and displace nothing."""
        missing = self.images + request.num_images - self.max_images
        if missing <= 0:
            return []
        lines = {name: list(client.line) for name, client in self._waiting.items()}
        images = {name: sum(place.images for place in line) for name, line in lines.items()}
        images[request.client] = wanted = images.get(request.client, 0) + request.num_images
        displaced: list[Entry] = []
        while missing > 0:
            longest = max(images, key=images.__getitem__)
            untouched = [place for place in lines.get(longest, ()) if place.next_image == 0]
            if images[longest] <= wanted or not untouched:
                raise QueueFull
            lines[longest].remove(untouched[-1])
            displaced.append(untouched[-1].request)
            images[longest] -= displaced[-1].num_images
            missing -= displaced[-1].num_images
        for other in displaced:
            self.discard(other)
        return displaced

    def _virtual_time(self) -> float:
        """Never decreases: the least service of those who wait; when nobody does, the highest of all."""
        return min(map(_service, self._waiting.values()), default=self._highest_service)

    def _leave(self, place: _Place[Entry]) -> None:
        name = place.request.client
        client = self._waiting[name]
        del self._places[place.request]
        client.line.remove(place)
        if not client.line:
            del self._waiting[name]
            self._away[name] = client.service
        # Clients who are away and would come back at the virtual time need not be remembered.
        now = self._virtual_time()
        self._away = {name: service for name, service in self._away.items() if service > now}


def _service(client: _Client[Entry]) -> float:
    return client.service
