"""What the routes share: the hosted models and whether they may take requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from service.errors import DrainingError, LoadingError, NotFoundError
from service.hosting import HostedModel
from service.pipeline import Pipeline
from service.settings import Settings
from service.telemetry import Telemetry

LOADING_RETRY_S = 5.0
"""Retry-After while a model warms up: the order of a warm-up."""
DRAINING_RETRY_S = 1.0
"""Retry-After while draining: another replica can answer at once."""


@dataclass(slots=True)
class ServiceState:
    """One per application. Mutated by the lifespan only, on the event loop."""

    settings: Settings
    telemetry: Telemetry
    pipeline: Pipeline
    models: dict[str, HostedModel] = field(default_factory=dict)
    draining: bool = False
    failed: bool = False

    def check_ready(self) -> None:
        """Raise DrainingError or LoadingError unless every model is warm and requests are welcome."""
        if self.draining:
            raise DrainingError("the service is draining and takes no new requests", DRAINING_RETRY_S)
        loading = [name for name in self.settings.model if name not in self.models]
        if loading:
            raise LoadingError(f"models are warming up: {', '.join(loading)}", LOADING_RETRY_S)

    def find(self, name: str | None, version: str | None) -> HostedModel:
        """The hosted model; NotFoundError lists what is served."""
        wanted = name if name is not None else self.settings.model[0]
        if wanted not in self.settings.model:
            raise NotFoundError(f"no model {wanted!r:.100}; served: {', '.join(self.settings.model)}")
        self.check_ready()
        model = self.models[wanted]
        if version is not None and version != str(model.manifest.version):
            raise NotFoundError(f"model {wanted} has no version {version!r:.100}; served: {model.manifest.version}")
        return model


def state_of(request: Request) -> ServiceState:
    """The state that the composition root put on the application."""
    return cast(ServiceState, request.app.state.service)
