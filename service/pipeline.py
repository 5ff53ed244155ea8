"""The straight path of one image, top to bottom: budgets, admission, cache, decode, batcher, answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from service import caching
from service.caching import Answer
from service.engine.base import Image
from service.errors import (
    BackendError,
    BadRequestError,
    DeadlineExceededError,
    InfeasibleBudgetError,
    OverloadError,
    SlicewiseError,
    StoreError,
)
from service.hosting import HostedModel
from service.images import Decoded, ImageDecoder
from service.request import Budget, Prediction, Route, Timings, Window
from service.routing import window
from service.store import Cache
from service.telemetry import Telemetry, child
from service.tickets import Order, Outcome

DEFAULT_TOP_K = 5
SORTED_WHOLE = 200
"""Up to so many classes, sorting all of them costs less than looking for the likeliest first."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image as it came off the wire. arrived_s: monotonic, when its last byte was there.

    data            the encoded image, or normalised float32 [3, H, W] of the model's input size.
    bypasses_cache  to be computed whatever is kept, and not kept.
    spend           is told what was computed for the image, in MAdds; None when nobody pays.
    """

    data: bytes | NDArray[np.float32]
    budget: Budget
    allowed: Window
    top_k: int
    arrived_s: float
    bypasses_cache: bool = False
    spend: Callable[[int], None] | None = None


async def before(deadline_s: float, done: str, work: Awaitable[T]) -> T:
    """``work``; at the deadline it is cancelled, and DeadlineExceededError says what was to be done: "decoded"."""
    if deadline_s == math.inf:
        return await work
    try:
        async with asyncio.timeout(deadline_s - time.monotonic()):
            return await work
    except TimeoutError as error:
        raise DeadlineExceededError(f"the deadline passed while the image was {done}", "expired") from error


class Pipeline:
    """Everything between the wire and a model's batcher. Used on the event loop only."""

    def __init__(self, decoder: ImageDecoder, telemetry: Telemetry, cache: Cache | None = None) -> None:
        self._decoder, self._telemetry, self._cache = decoder, telemetry, cache

    def precheck(self, model: HostedModel, budget: Budget, counted: Budget | None = None) -> Window:
        """The slices that the budgets allow; refuses before the body is read what no body could mend.

        counted  what metrics take for the budget, where that is more than what binds yet.
        Raises BadRequestError, InfeasibleBudgetError and QueueFullError, and counts them.
        """
        try:
            allowed = window(budget, model.slices)
            model.check_room(budget.urgency)
        except SlicewiseError as error:
            model.turned_away()
            self._count(counted or budget, outcome_of(error)[1])
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

        with self._places(model, requests):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in requests]
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

        with self._places(model, requests):
            if len(requests) == 1:  # without turns of the loop for a task
                return [await one(0, requests[0])]
            tasks = [asyncio.create_task(one(index, request)) for index, request in enumerate(requests)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def _places(self, model: HostedModel, requests: list[ImageRequest]) -> Iterator[None]:
        """Places in the queue for all of them or, counted for each, for none."""
        try:
            model.take_places(len(requests), min(request.budget.urgency for request in requests))
        except SlicewiseError as error:
            for request in requests:
                self._count(request.budget, outcome_of(error)[1])
            raise
        try:
            yield
        finally:
            model.give_back_places(len(requests))

    async def _classify(self, model: HostedModel, request: ImageRequest) -> Prediction:
        if self._cache is None:
            return (await self._compute(model, request))[0]
        deadline_s = request.budget.deadline_s(request.arrived_s)
        key = await before(deadline_s, "hashed", self._cache_key(model, request))
        if key is None:
            child(self._telemetry.cache_requests, "bypass").inc()
            return (await self._compute(model, request))[0]
        kept = await self._kept(self._cache, model, request, key)
        if kept is not None:
            return kept
        prediction, outcome = await self._compute(model, request)
        if caching.storable(outcome.route) and outcome.gate_logits_G is not None:
            self._cache.keep(key, Answer(outcome.route, outcome.logits_K, outcome.gate_logits_G))
        return prediction

    async def _cache_key(self, model: HostedModel, request: ImageRequest) -> str | None:
        """Under which answers for the image are kept; None for one that has to be computed."""
        if request.bypasses_cache or request.allowed.forced is not None or isinstance(request.data, np.ndarray):
            return None
        return caching.key(model.cache_scope, await self._decoder.digest(request.data))

    async def _kept(self, cache: Cache, model: HostedModel, request: ImageRequest, key: str) -> Prediction | None:
        """The image's answer from the cache; None when there is none, the cache is away, or the deadline has passed."""
        began_s = time.monotonic()
        limit_s = None
        if request.budget.latency_s is not None:  # at most half of what is left: the rest is for computing
            limit_s = (request.budget.deadline_s(request.arrived_s) - began_s) / 2
            if limit_s <= 0:  # computing refuses an image that is late
                return None
        try:
            found = await cache.find(key, request.allowed, len(model.manifest.classes), limit_s)
        except StoreError:
            child(self._telemetry.cache_requests, "error").inc()
            return None
        lookup_s = time.monotonic() - began_s
        child(self._telemetry.cache_requests, "miss" if found is None else "hit").inc()
        if found is None:
            model.telemetry.tally.cache_miss.add(lookup_s)
            return None
        timings = Timings(total_s=time.monotonic() - request.arrived_s)
        model.telemetry.tally.remembered(timings.total_s, lookup_s)
        logits = Logits(found.route, found.logits_K, found.gate_logits_G)
        return render(model, logits, request.top_k, timings, cached=True)

    async def _compute(self, model: HostedModel, request: ImageRequest) -> tuple[Prediction, Outcome]:
        agreed = model.expect(request.budget, request.allowed, request.arrived_s, time.monotonic())
        try:
            image, decoded = await self._image(model, request.data, agreed.deadline_s)
        except BaseException:
            model.forget(agreed)
            raise
        order = Order(
            image, request.allowed, request.arrived_s, agreed.due_s, agreed.done_by_s, agreed.deadline_s,
            request.budget.urgency, agreed.place, request.spend,
        )  # fmt: skip
        outcome = await model.batcher.submit(order)
        now_s = time.monotonic()
        timings = Timings(
            decode_s=0.0 if decoded is None else decoded.decode_s,
            queue_s=outcome.queue_s + (0.0 if decoded is None else decoded.waited_s),
            trunk_s=outcome.trunk_s,
            body_s=outcome.body_s,
            total_s=now_s - request.arrived_s,
        )
        logits = Logits(outcome.route, outcome.logits_K, outcome.gate_logits_G)
        prediction = render(model, logits, request.top_k, timings)
        model.answered(prediction.route, prediction.timings, outcome.done_s, now_s)
        return prediction, outcome

    async def _image(
        self, model: HostedModel, data: bytes | NDArray[np.float32], deadline_s: float
    ) -> tuple[Image, Decoded | None]:
        """What the engine takes, and how it was decoded; None for pixels that came as the engine takes them."""
        if isinstance(data, np.ndarray):
            return data, None
        decoded = self._decoder.decode_tiny(data, model.manifest.input)
        if decoded is None:
            decoded = await before(deadline_s, "decoded", self._decoder.decode(data, model.manifest.input))
        return decoded.pixels_HWC, decoded

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
                    if result != "late":  # whose batch counts it
                        model.turned_away()
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


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """What a slice said of an image, now or for an earlier request; gate_logits_G: None when the gate did not run."""

    route: Route
    logits_K: NDArray[np.float32]
    gate_logits_G: NDArray[np.float32] | None


def likeliest(probabilities_K: NDArray[np.float64], top_k: int) -> NDArray[np.intp]:
    """The ``top_k`` highest, of 1..K, highest first; of equal ones the lower index first. None may be NaN."""
    if probabilities_K.size <= SORTED_WHOLE:
        return (-probabilities_K).argsort(kind="stable")[:top_k]
    least = np.partition(probabilities_K, -top_k)[-top_k]
    candidates = (probabilities_K >= least).nonzero()[0]
    best: NDArray[np.intp] = candidates[(-probabilities_K[candidates]).argsort(kind="stable")[:top_k]]
    return best


def render(model: HostedModel, logits: Logits, top_k: int, timings: Timings, cached: bool = False) -> Prediction:
    """Logits -> probabilities, highest first, with the cost of the slice that gave them."""
    logits_K = logits.logits_K.astype(np.float64)
    exponentials_K = np.exp(logits_K - np.maximum.reduce(logits_K))
    probabilities_K = exponentials_K / np.add.reduce(exponentials_K)
    best = likeliest(probabilities_K, top_k)
    facts = model.slices[logits.route.width]
    return Prediction(
        indices=tuple(best.tolist()),
        probabilities=tuple(probabilities_K[best].tolist()),
        route=logits.route,
        madds=facts.madds_published if logits.route.gate_width is None else facts.madds_served,
        timings=timings,
        logits_K=logits.logits_K,
        probabilities_K=probabilities_K,
        gate_logits_G=logits.gate_logits_G,
        cached=cached,
    )
