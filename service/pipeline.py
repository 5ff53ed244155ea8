"""The straight path of one image, top to bottom: budgets, admission, decode, batcher, answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.batcher import Order, Outcome
from service.engine.base import Image
from service.errors import (
    BackendError,
    BadRequestError,
    DeadlineExceededError,
    InfeasibleBudgetError,
    OverloadError,
    SlicewiseError,
)
from service.hosting import HostedModel
from service.images import Decoded, ImageDecoder
from service.request import Budget, Prediction, Timings, Window
from service.routing import window
from service.telemetry import Telemetry, child

DEFAULT_TOP_K = 5


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image as it came off the wire. arrived_s: monotonic, when its last byte was there.

    data  the encoded image, or normalised float32 [3, H, W] of the model's input size.
    """

    data: bytes | NDArray[np.float32]
    budget: Budget
    allowed: Window
    top_k: int
    arrived_s: float


class Pipeline:
    """Everything between the wire and a model's batcher. Used on the event loop only."""

    def __init__(self, decoder: ImageDecoder, telemetry: Telemetry) -> None:
        self._decoder, self._telemetry = decoder, telemetry

    def precheck(self, model: HostedModel, budget: Budget) -> Window:
        """The slices that the budgets allow; refuses before the body is read what no body could mend.

        Raises BadRequestError, InfeasibleBudgetError and QueueFullError, and counts them.
        """
        try:
            allowed = window(budget, model.slices)
            model.check_room(budget.urgency)
        except SlicewiseError as error:
            self._count(budget, outcome_of(error)[1])
            raise
        return allowed

    async def classify(self, model: HostedModel, request: ImageRequest) -> Prediction:
        """Answer one image; raises any SlicewiseError. Takes a place in the queue while it runs."""
        with self._account(model, request):
            model.take_places(1, request.budget.urgency)
            try:
                return await self._classify(model, request)
            finally:
                model.give_back_places(1)

    async def classify_many(
        self, model: HostedModel, requests: list[ImageRequest]
    ) -> list[Prediction | SlicewiseError]:
        """Answer several images, each routed on its own; errors take the place of answers, in order.

        Raises QueueFullError for all when they do not fit into the queue together.
        """

        async def one(request: ImageRequest) -> Prediction | SlicewiseError:
            try:
                with self._account(model, request):
                    return await self._classify(model, request)
            except SlicewiseError as error:
                return error

        try:
            model.take_places(len(requests), min(request.budget.urgency for request in requests))
        except SlicewiseError as error:
            for request in requests:
                self._count(request.budget, outcome_of(error)[1])
            raise
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in requests]
        finally:
            model.give_back_places(len(requests))
        return [task.result() for task in tasks]

    async def classify_all(self, model: HostedModel, requests: list[ImageRequest]) -> list[Prediction]:
        """Answer several images, each routed on its own, or none: the first error cancels the others.

        Raises that error, its message with the image's index when there are several; QueueFullError for all
        when they do not fit into the queue together.
        """

        async def one(index: int, request: ImageRequest) -> Prediction:
            try:
                with self._account(model, request):
                    return await self._classify(model, request)
            except SlicewiseError as error:
                if len(requests) > 1:
                    error.args = (f"image {index}: {error}",)
                raise

        try:
            model.take_places(len(requests), min(request.budget.urgency for request in requests))
        except SlicewiseError as error:
            for request in requests:
                self._count(request.budget, outcome_of(error)[1])
            raise
        tasks = [asyncio.create_task(one(index, request)) for index, request in enumerate(requests)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            model.give_back_places(len(requests))

    async def _classify(self, model: HostedModel, request: ImageRequest) -> Prediction:
        agreed = model.expect(request.budget, request.allowed, request.arrived_s, time.monotonic())
        try:
            image, decoded = await self._image(model, request.data, agreed.deadline_s)
        except BaseException:
            model.forget(agreed)
            raise
        order = Order(
            image, request.allowed, request.arrived_s, agreed.due_s, agreed.deadline_s,
            request.budget.urgency, agreed.place,
        )  # fmt: skip
        outcome = await model.batcher.submit(order)
        prediction = render(model, outcome, request, decoded)
        model.telemetry.answered(prediction.route, prediction.timings)
        return prediction

    async def _image(
        self, model: HostedModel, data: bytes | NDArray[np.float32], deadline_s: float
    ) -> tuple[Image, Decoded | None]:
        """What the engine takes, and how it was decoded; None for pixels that came as the engine takes them."""
        if isinstance(data, np.ndarray):
            return data, None
        decoded = await self._decode(model, data, deadline_s)
        return decoded.pixels_HWC, decoded

    async def _decode(self, model: HostedModel, data: bytes, deadline_s: float) -> Decoded:
        if deadline_s == math.inf:
            return await self._decoder.decode(data, model.manifest.input)
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                return await self._decoder.decode(data, model.manifest.input)
        except TimeoutError as error:
            raise DeadlineExceededError("the deadline passed while the image was decoded", "expired") from error

    @contextmanager
    def _account(self, model: HostedModel, request: ImageRequest) -> Iterator[None]:
        """Count the image's outcome and duration once, however it ends; a caller who left is not counted."""
        outcome, result = "error", "refused"  # what a bug does to the caller
        try:
            yield
            outcome, result = "ok", "met"
        except asyncio.CancelledError:
            outcome = ""
            raise
        except SlicewiseError as error:
            outcome, result = outcome_of(error)
            raise
        finally:
            if outcome:
                total_s = time.monotonic() - request.arrived_s
                child(self._telemetry.request_duration, model.manifest.name, outcome).observe(total_s)
                self._count(request.budget, result)
                if outcome != "ok":
                    model.telemetry.tally.fail.add(total_s)

    def _count(self, budget: Budget, result: str) -> None:
        if result:
            self._telemetry.count_budgets(budget, result)


def outcome_of(error: SlicewiseError) -> tuple[str, str]:
    """(outcome of the request, result of its budgets); an empty result where the client's data was at fault.

    A failing model counts as ``refused``, so that it cannot look like attainment.
    """
    if isinstance(error, DeadlineExceededError):
        return "expired", error.outcome
    if isinstance(error, InfeasibleBudgetError):
        return "rejected", "infeasible"
    if isinstance(error, OverloadError):
        return "rejected", "refused"
    if isinstance(error, BackendError):
        return "error", "refused"
    return "error", ""


def check_top_k(top_k: int | None, classes: int) -> int:
    """The number of classes to answer with; raises BadRequestError outside 1..classes."""
    if top_k is None:
        return min(DEFAULT_TOP_K, classes)
    if not 1 <= top_k <= classes:
        raise BadRequestError(f"top_k is {top_k}; allowed: 1..{classes} classes")
    return top_k


def render(model: HostedModel, outcome: Outcome, request: ImageRequest, decoded: Decoded | None) -> Prediction:
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
            decode_s=0.0 if decoded is None else decoded.decode_s,
            queue_s=outcome.queue_s + (0.0 if decoded is None else decoded.waited_s),
            trunk_s=outcome.trunk_s,
            body_s=outcome.body_s,
            total_s=time.monotonic() - request.arrived_s,
        ),
        logits_K=outcome.logits_K,
        probabilities_K=probabilities_K,
        gate_logits_G=outcome.gate_logits_G,
    )
