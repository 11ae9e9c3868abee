"""A short way to the routes that draw: FastAPI documents them, Starlette alone calls them.

FastAPI's dependency injection costs as much as all else that happens between the socket and the engine; these routes
read their requests themselves and have no use for it.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route


def shorten(app: FastAPI, *routers: APIRouter) -> None:
    """Let the POST routes of ``routers``, whose only argument is the request, be found first and called directly."""
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute) and route.methods == {"POST"}:
                shortcut = Route(route.path, route.endpoint, methods=["POST"], include_in_schema=False)
                app.router.routes.insert(0, shortcut)
