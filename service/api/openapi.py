"""The generated OpenAPI document, without what FastAPI assumes and this service never sends."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from service.api.problems import REQUEST_ID_HEADER

_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_ASSUMED = ("HTTPValidationError", "ValidationError")


def install(app: FastAPI, asks_for_keys: bool) -> None:
    """Replace ``app.openapi``: FastAPI adds its own 422 to every route with a parameter; ours is a 400.

    Every answer is declared with the header that every answer has.

    asks_for_keys  routes that can answer 401 say how a key is shown.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                declared = operation["responses"].get("422", {})
                if _ASSUMED[0] in str(declared.get("content", "")):
                    del operation["responses"]["422"]
                for response in operation["responses"].values():
                    response["headers"] = response.get("headers", {}) | REQUEST_ID_HEADER
                if asks_for_keys and "401" in operation["responses"]:
                    operation["security"] = [{name: []} for name in _SCHEMES]
        for name in _ASSUMED:
            document["components"]["schemas"].pop(name, None)
        if asks_for_keys:
            document["components"]["securitySchemes"] = _SCHEMES
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to change the document
