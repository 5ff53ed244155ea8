"""What can go wrong, without a word of HTTP.

SlicewiseError
├── BadRequestError             malformed header, query, JSON; unknown slice index
├── BadImageError               the image does not decode
├── UnauthorizedError           no key, or not one of this service
├── ForbiddenError              not for this caller, or switched off
├── NotFoundError               unknown model, version or path
├── RequestTimeoutError         the request's bytes did not arrive in time
├── TooLargeError               body, pixels or number of images over the limit
├── UnsupportedMediaTypeError   not an image
├── InfeasibleBudgetError       no slice satisfies the budgets; carries the nearest feasible point
├── NotBuiltError               an extension of the protocol that this service does not have
├── BackendError                the model failed on this batch
├── OverloadError               try again later; carries retry_after_s
│   ├── QuotaError              the client's own compute is spent
│   ├── QueueFullError
│   ├── DrainingError
│   └── LoadingError
└── DeadlineExceededError       deadline unreachable or passed

StoreError                      no client is told: the shared store is away, and the service goes on without it

Every message says what was given and what is allowed, with units.
"""

from __future__ import annotations


class SlicewiseError(Exception):
    """Base of everything that a client is told about."""


class BadRequestError(SlicewiseError):
    """Malformed header, query, JSON or tensor; unknown slice index."""


class BadImageError(SlicewiseError):
    """The bytes do not decode to an image."""


class UnauthorizedError(SlicewiseError):
    """No key where one is required, or one that is not known."""


class ForbiddenError(SlicewiseError):
    """Not for this caller, or switched off."""


class NotFoundError(SlicewiseError):
    """Unknown model, version or path."""


class RequestTimeoutError(SlicewiseError):
    """The request's bytes did not arrive within the limit."""


class TooLargeError(SlicewiseError):
    """Body, pixels or number of images over the limit; checked before decoding."""


class UnsupportedMediaTypeError(SlicewiseError):
    """The media type is not an image."""


class InfeasibleBudgetError(SlicewiseError):
    """No slice satisfies all budgets.

    feasible  the nearest point that could be granted: ``compute_budget`` in MAdds and
              ``accuracy_floor`` as a ratio, None where no value would do.
    """

    def __init__(self, message: str, feasible: dict[str, float | int | None]) -> None:
        super().__init__(message)
        self.feasible = feasible


class NotBuiltError(SlicewiseError):
    """An extension of the protocol that this service does not have."""


class BackendError(SlicewiseError):
    """The model failed on the batch that this image was in."""


class OverloadError(SlicewiseError):
    """The service cannot take this request now. retry_after_s: seconds after which it is worth trying."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaError(OverloadError):
    """The client has spent the compute that is granted to it."""


class QueueFullError(OverloadError):
    """The bounded queue is full."""


class DrainingError(OverloadError):
    """The service finishes what it has and takes nothing new."""


class LoadingError(OverloadError):
    """The model is not warm yet."""


class DeadlineExceededError(SlicewiseError):
    """The deadline cannot be met, or has passed.

    outcome  ``refused`` before anything was queued, ``expired`` while it waited, ``late`` while it was
             being computed (the result is discarded).
    """

    def __init__(self, message: str, outcome: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class StoreError(Exception):
    """The shared store did not answer in time, answered with an error, or is not asked because it is away."""
