"""The error tree: who is to blame, and whether a retry helps.

ServingError                500
├── ConfigError             start-up only: the process prints one line and exits
├── RequestError            4xx, the caller's fault, never retried
│   ├── PromptTooLong       400
│   └── UnknownModel        404
├── Overloaded              503 with Retry-After
│   └── TooManyRequests     429 with Retry-After
├── DeadlineExceeded        504
├── TransferError           retried on another pair
│   ├── TransferTimeout
│   ├── LeaseRevoked
│   └── LayoutMismatch      the pair can never work: refused at registration, not retried
├── WorkerLost              retried: the request is prefilled again elsewhere
└── ProtocolError           a peer sent something that is not in the protocol; its connection is dropped
"""

from __future__ import annotations

from typing import ClassVar


class ServingError(Exception):
    """Base of every error Baton raises on purpose. `status` is the HTTP status the edge answers with."""

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class ConfigError(ServingError):
    """A setting is missing, unknown or impossible. The message names the key, the value and what was expected."""


class RequestError(ServingError):
    """The request can't be served as written. `param` names the offending field where there is one."""

    status: ClassVar[int] = 400

    def __init__(self, message: str, *, param: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.param = param


class PromptTooLong(RequestError):
    """Prompt plus requested output exceed the served context."""


class UnknownModel(RequestError):
    """The request names a model that is not served here."""

    status: ClassVar[int] = 404


class Overloaded(ServingError):
    """No capacity now; the client should come back after `retry_after_s` seconds."""

    status: ClassVar[int] = 503

    def __init__(self, message: str, *, retry_after_s: float = 1.0, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s


class TooManyRequests(Overloaded):
    """The queue in front of the workers is full: the callers send faster than the cluster serves."""

    status: ClassVar[int] = 429


class DeadlineExceeded(ServingError):
    """The request's own deadline passed before it could be finished."""

    status: ClassVar[int] = 504


class TransferError(ServingError):
    """A hand-off did not complete. Nothing of it was used."""

    status: ClassVar[int] = 503
    retryable: ClassVar[bool] = True


class TransferTimeout(TransferError):
    """The peer or the link did not answer in time."""


class LeaseRevoked(TransferError):
    """The receiving side took its blocks back."""


class LayoutMismatch(TransferError):
    """Both ends hold different models, formats or weights; the message names both."""

    retryable: ClassVar[bool] = False


class WorkerLost(ServingError):
    """The worker serving the request died or went silent."""

    status: ClassVar[int] = 503
    retryable: ClassVar[bool] = True


class ProtocolError(ServingError):
    """A message could not be authenticated, decoded or placed in the protocol."""
