"""The straight path of one image, top to bottom: budgets, admission, decode, batcher, answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from service.admission import check_deadline
from service.batcher import Order, Outcome
from service.errors import BadRequestError, DeadlineExceededError, InfeasibleBudgetError, OverloadError, SlicewiseError
from service.hosting import HostedModel
from service.images import ImageDecoder
from service.request import Budget, Prediction, Timings, Window
from service.routing import window
from service.telemetry import Telemetry

DEFAULT_TOP_K = 5


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image as it came off the wire. arrived_s: monotonic, when its last byte was there."""

    data: bytes
    budget: Budget
    top_k: int
    arrived_s: float


class Pipeline:
    """Everything between the wire and a model's batcher. Used on the event loop only."""

    def __init__(self, decoder: ImageDecoder, telemetry: Telemetry, default_slo_s: float) -> None:
        self._decoder, self._telemetry, self._default_slo_s = decoder, telemetry, default_slo_s

    async def classify(self, model: HostedModel, request: ImageRequest) -> Prediction:
        """Answer one image; raises any SlicewiseError. Takes a place in the queue while it runs."""
        with self._account(model, request):
            allowed = window(request.budget, model.slices)
            with self.admitted(model, images=1) as ahead:
                return await self._classify(model, request, allowed, ahead)

    async def classify_many(
        self, model: HostedModel, requests: list[ImageRequest]
    ) -> list[Prediction | SlicewiseError]:
        """Answer several images under one budget, each routed on its own; errors take the place of answers.

        Raises for all what concerns all: budgets that no slice satisfies, and QueueFullError when they do
        not fit into the queue together.
        """

        async def one(request: ImageRequest, allowed: Window, ahead: int) -> Prediction | SlicewiseError:
            try:
                with self._account(model, request):
                    return await self._classify(model, request, allowed, ahead)
            except SlicewiseError as error:
                return error

        with ExitStack() as together:
            with self._account_refusal(model, requests):
                allowed = window(requests[0].budget, model.slices)
                ahead = together.enter_context(self.admitted(model, len(requests)))
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request, allowed, ahead + i)) for i, request in enumerate(requests)]
        return [task.result() for task in tasks]

    @contextmanager
    def admitted(self, model: HostedModel, images: int) -> Iterator[int]:
        """Hold places in the model's bounded queue; gives the number of images that were there before."""
        ahead = model.admitted
        model.take_places(images)
        try:
            yield ahead
        finally:
            model.give_back_places(images)

    async def _classify(self, model: HostedModel, request: ImageRequest, allowed: Window, ahead: int) -> Prediction:
        budget, arrived_s = request.budget, request.arrived_s
        deadline_s = math.inf if budget.latency_s is None else arrived_s + budget.latency_s
        least_width = allowed.lo if allowed.forced is None else allowed.forced
        check_deadline(
            now_s=time.monotonic(), deadline_s=deadline_s, queued=ahead, table=model.table,
            width=least_width, workers=model.workers,
        )  # fmt: skip
        image_CHW, decode_s = await self._decode(model, request.data, deadline_s)
        order = Order(
            image_CHW, allowed, arrived_s, due_s=min(deadline_s, arrived_s + self._default_slo_s),
            deadline_s=deadline_s, urgency=budget.urgency,
        )  # fmt: skip
        outcome = await model.batcher.submit(order)
        prediction = render(model, outcome, request, decode_s)
        model.telemetry.answered(prediction.route, prediction.timings)
        return prediction

    async def _decode(self, model: HostedModel, data: bytes, deadline_s: float) -> tuple[np.ndarray, float]:
        limit_s = None if deadline_s == math.inf else deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                return await self._decoder.decode(data, model.manifest.input)
        except TimeoutError as error:
            raise DeadlineExceededError("the deadline passed while the image was decoded", "expired") from error

    @contextmanager
    def _account(self, model: HostedModel, request: ImageRequest) -> Iterator[None]:
        """Count the image's outcome and duration once, however it ends."""
        outcome, result = "error", None
        try:
            yield
            outcome, result = "ok", "met"
        except SlicewiseError as error:
            outcome, result = outcome_of(error)
            raise
        finally:
            total_s = time.monotonic() - request.arrived_s
            self._telemetry.request_duration.labels(model.manifest.name, outcome).observe(total_s)
            if result is not None:
                self._telemetry.count_budgets(request.budget, result)

    @contextmanager
    def _account_refusal(self, model: HostedModel, requests: list[ImageRequest]) -> Iterator[None]:
        """Count every image of a call that is refused as a whole."""
        try:
            yield
        except SlicewiseError:
            with ExitStack() as each:
                for request in requests:
                    each.enter_context(self._account(model, request))
                raise


def outcome_of(error: SlicewiseError) -> tuple[str, str | None]:
    """(outcome of the request, result of its budgets); no result where the budgets were not at fault."""
    if isinstance(error, DeadlineExceededError):
        return "expired", error.outcome
    if isinstance(error, InfeasibleBudgetError):
        return "rejected", "infeasible"
    if isinstance(error, OverloadError):
        return "rejected", "refused"
    return "error", None


def check_top_k(top_k: int | None, classes: int) -> int:
    """The number of classes to answer with; raises BadRequestError outside 1..classes."""
    if top_k is None:
        return min(DEFAULT_TOP_K, classes)
    if not 1 <= top_k <= classes:
        raise BadRequestError(f"top_k is {top_k}; allowed: 1..{classes} classes")
    return top_k


def render(model: HostedModel, outcome: Outcome, request: ImageRequest, decode_s: float) -> Prediction:
    """Logits -> probabilities, highest first, with the cost that was really spent."""
    logits_K = outcome.logits_K.astype(np.float64)
    exponentials_K = np.exp(logits_K - logits_K.max())
    probabilities_K = exponentials_K / exponentials_K.sum()
    best = np.argsort(-probabilities_K, kind="stable")[: request.top_k]
    facts = model.slices[outcome.route.width]
    return Prediction(
        indices=tuple(map(int, best)),
        probabilities=tuple(float(p) for p in probabilities_K[best]),
        route=outcome.route,
        madds=facts.madds_published if outcome.route.gate_width is None else facts.madds_served,
        timings=Timings(
            decode_s, outcome.queue_s, outcome.trunk_s, outcome.body_s, time.monotonic() - request.arrived_s
        ),
    )
