"""The control channel's messages: what routers, the command line and Kubernetes hooks ask of the controller.

One request, one reply; a reply always carries the cluster's status after the request. Frames are signed with the
cluster's key like every other message of Baton.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from llm_engine.api.errors import ServingError
from llm_engine.api.messages import Message, Role


class LinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One live data link of a worker to a peer: what it runs over, why, and what its canary says."""

    peer: str
    transport: str  # "" until connected
    reason: str  # why this transport
    healthy: bool = True
    detail: str = ""  # why not healthy
    call_s: float = 0.0  # what a call of the link costs beside its bytes, as the sending end measured it
    bytes_per_s: float = 0.0  # 0: nothing measured


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the controller sees it."""

    name: str
    role: Role
    state: str  # starting | ready | draining | silent | failed
    restarts: int = 0
    pid: int = 0
    incarnation: str = ""
    request_addr: str = ""
    control_addr: str = ""
    metrics_addr: str = ""
    sequences: int = 0  # live requests; 0 and no hand-off pending: a draining worker may go
    pending_handoffs: int = 0
    revision: int = 0  # of its configuration
    links: list[LinkStatus] = []
    error: str = ""  # why the last start failed


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Replicas wanted, and those that serve; the bounds of every change; what the autoscaler would want."""

    desired: int
    ready: int
    low: int = 0
    high: int = 1024
    cards: int = 1  # per replica
    recommended: int | None = None
    reason: str = ""  # of the recommendation


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a pool's desired size: when (Unix time), by whom, and why."""

    at: float
    pool: str
    before: int
    after: int
    by: str  # cli | admin | autoscaler | configuration
    reason: str = ""


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP edge. `ready`: it answers and knows enough workers to serve a request."""

    url: str = ""
    pid: int = 0
    restarts: int = 0
    ready: bool = False
    error: str = ""  # why the last start failed


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `baton status --json` prints. `ready`: the router serves and every pool has its desired size."""

    ready: bool
    model: str
    router: RouterStatus
    pools: dict[str, PoolStatus]
    workers: list[WorkerStatus]
    changes: list[Change] = []  # the last ones, oldest first
    revision: int = 0  # workers of older ones are being replaced
    autoscaler: str = "off"  # off | recommend | act


class GetStatus(Message, frozen=True, kw_only=True, tag="get_status"):
    """Only the status."""


class ScalePool(Message, frozen=True, kw_only=True, tag="scale_pool"):
    """Change the desired size of a pool; surplus workers drain first."""

    pool: str
    replicas: int
    by: str = "cli"
    reason: str = ""


class ConfigurePools(Message, frozen=True, kw_only=True, tag="configure_pools"):
    """The configured sizes and bounds may have changed. A size that has is obeyed, one that has not changes nothing."""

    pools: dict[str, dict[str, Any]]  # PoolsConfig as plain data


class DrainWorker(Message, frozen=True, kw_only=True, tag="drain_worker"):
    """Take a worker out once its requests are finished or handed over; a fresh one takes its place."""

    worker: str


class RollOut(Message, frozen=True, kw_only=True, tag="roll_out"):
    """Replace every worker, one at a time. `config`: for the new ones, as JSON; "": what it was."""

    config: str = ""


class StopCluster(Message, frozen=True, kw_only=True, tag="stop_cluster"):
    """Stop the router, then the workers."""


class Reply(Message, frozen=True, kw_only=True, tag="reply"):
    """`error` is empty when the request was carried out."""

    status: ClusterStatus
    error: str = ""


ControlRequest = GetStatus | ScalePool | ConfigurePools | DrainWorker | RollOut | StopCluster


class ControlRefused(ServingError):
    """The controller understood the request and refused it."""

    status: ClassVar[int] = 409


class ControlTimeout(ServingError):
    """The controller did not answer in time."""

    status: ClassVar[int] = 503
    retryable: ClassVar[bool] = True
