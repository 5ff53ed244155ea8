"""Plain routes, reached without the router. ASGI middleware, the innermost."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.access import GuardedRoute
from service.api.problems import Problems


class Shortcut:
    """Takes POST requests for these routes, which have no path parameters, straight to their handlers.

    Routers, dependency scopes and exception wrappers of the general way took a quarter of what the event loop
    spends on a classification, and the loop is what a small network waits for (docs/adr/0012). The answers are
    the same; every other request, and all of them behind a root path, go the general way.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[GuardedRoute], problems: Problems) -> None:
        self.app, self._problems = app, problems
        self._routes = {route.path: (route, route.get_route_handler()) for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if found is None or scope["method"] != "POST" or scope.get("root_path"):
            await self.app(scope, receive, send)
            return
        route, handle = found
        scope.update(route=route, endpoint=route.endpoint, path_params={})
        request = Request(scope, receive, send)
        try:
            response = await handle(request)
        except Exception as error:  # noqa: BLE001  # what it does not know it raises again
            response = await self._problems.answer(request, error)
        await response(scope, receive, send)
