"""How the server behaves; how requests run is `emoe.engine.interface.EngineSettings`."""

from __future__ import annotations

from dataclasses import dataclass

from emoe.errors import UsageError

MAX_BODY_BYTES = 4 << 20
"""Some 1,000,000 tokens of text; a context that is longer needs --max-body-size."""

MAX_CONNECTIONS = 512
"""More than may wait and run by default (288), and less than the 1,024 files that systems let a process open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP side.

    Attributes:
        api_key: what clients must send as `Authorization: Bearer KEY`; None: everyone may. /health is open always.
        cors_origins: origins whose pages may call the server ("*": all); none by default.
        max_connections: open at once; beyond, idle ones are closed, and where none is idle requests get 503.
        max_body_bytes: a larger request body is refused with 413.
        request_timeout_s: seconds after which a request ends with an error, its waiting included; None: never.
        keep_alive_s: seconds of silence after which a stream gets a comment, so that nobody takes it for dead.
        write_timeout_s: seconds for which a client may leave a part of a stream unread before it counts as gone.
        shutdown_timeout_s: seconds that running requests get to finish once the server is told to stop.
        status_interval_s: seconds between two status lines in the log; 0: none.
        default_task: the task of requests that name none; None: the engine looks for keywords.
        temperature, top_p, top_k: of requests that do not say, as the model's generation configuration has them.
        max_tokens: the longest chat answer of requests that do not say, also from there; None: what the context leaves.
    """

    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_connections: int = MAX_CONNECTIONS
    max_body_bytes: int = MAX_BODY_BYTES
    request_timeout_s: float | None = 600.0
    keep_alive_s: float = 15.0
    write_timeout_s: float = 60.0
    shutdown_timeout_s: float = 30.0
    status_interval_s: float = 10.0
    default_task: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_alive_s", "write_timeout_s", "max_body_bytes", "max_connections"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("shutdown_timeout_s", "status_interval_s"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            raise UsageError(f"request_timeout_s must be above 0, not {self.request_timeout_s}; None: no limit")
        if self.api_key == "":
            raise UsageError("the API key is empty; leave it out to let everyone in")
