"""From a validated request to its generation: a new one within the client's budget, or that of its Idempotency-Key."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Request

from server.api import idempotency
from server.api.auth import current_client, image_budget
from server.api.catalog import Catalog, Model
from server.api.errors import invalid
from server.api.generation import Generation
from server.api.order import Order
from server.api.schemas import MIN_TIMEOUT_S
from server.engine import Engine
from server.engine.model import StepSampler
from server.keys import KeyStore
from server.logs import current_request_id
from server.settings import Settings
from server.telemetry import Telemetry


class Intake:
    """What the routes that draw share."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        catalog: Catalog,
        telemetry: Telemetry | None = None,
        keys: KeyStore | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.catalog = catalog
        self._telemetry = telemetry
        self._keys = keys
        self._replays = idempotency.Replays(settings.idempotency_ttl_s)

    @property
    def model(self) -> Model:
        """Tables of the model that is served now; it may be swapped from one call to the next."""
        return self.catalog.of(self.engine.sampler)

    @property
    def status(self) -> str:
        """The engine's, or ``keys_unreadable`` while all requests are rejected for that."""
        status = self.engine.status
        return "keys_unreadable" if status == "ready" and self._keys is not None and self._keys.closed else status

    def timeout(self, asked_s: float | None) -> float:
        """Seconds for a request that asks for so many, or for none.

        Raises:
            ApiError: 422 for more than the server allows.
        """
        most = self.settings.request_timeout_s
        if asked_s is not None and asked_s > most:
            raise invalid("timeout_s", f"timeout_s must be a number from {MIN_TIMEOUT_S:g} to {most:g}")
        return most if asked_s is None else asked_s

    def take(
        self, request: Request, make_order: Callable[[Model], Order], fingerprint: Callable[[], bytes] | None = None
    ) -> Generation:
        """The generation that answers ``request``, with one model from the order to the engine.

        Args:
            make_order: resolves the body against the model; called unless the request has been there before.
            fingerprint: of what must be equal in a repeated request; None for routes without Idempotency-Key.

        Raises:
            ApiError: 409, 422, 429. NotReady, Overloaded: the engine does not take it.
        """
        client = current_client(request)
        value = request.headers.get(idempotency.HEADER)
        if value is None or fingerprint is None or not self.settings.idempotency_ttl_s:
            return self._start(request, make_order, client)
        key, mark = idempotency.checked_key(value), fingerprint()
        generation = self._replays.find(client, key, mark)
        if generation is None:
            generation = self._start(request, make_order, client)
            self._replays.begin(client, key, mark, generation)
        return generation

    def _start(self, request: Request, make_order: Callable[[Model], Order], client: str) -> Generation:
        sampler: StepSampler = self.engine.sampler  # read once
        order = make_order(self.catalog.of(sampler))
        with image_budget(request, len(order.specs)):
            generation = Generation(self.engine, order, sampler, client)
        if self._telemetry is not None:
            self._telemetry.follow(generation, current_request_id.get())
        return generation
