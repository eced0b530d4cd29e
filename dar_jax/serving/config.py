"""How the API is served: the block `serve`."""

import dataclasses

MAX_PORT = 65535
MEGABYTE = 2**20
OWNERS_SHARE = 2
"""One client may fill one part of so many of the queue."""


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How the API is served, and how much of it.

    Attributes:
        host: address to bind to; "0.0.0.0" lets everybody in who can reach this computer.
        port: to bind to.
        batch_size: most images that are drawn at a time; memory is for so many.
        max_waiting: most images that wait; one client may have half of them.
        max_images: most images of a request.
        ttl: seconds after which a request is given up.
        drain: seconds that requests have to end in when the server is told to stop.
        max_body_megabytes: size of a request.
        api_key_file: a SHA-256 of an API key in every line, in hexadecimal; empty asks for no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    batch_size: int = 32
    max_waiting: int = 256
    max_images: int = 10
    ttl: float = 300.0
    drain: float = 30.0
    max_body_megabytes: int = 20
    api_key_file: str = ""

    def __post_init__(self):
        if not 1 <= self.port <= MAX_PORT:
            raise ValueError(f"port={self.port} must be in 1..{MAX_PORT}")
        for name in ("batch_size", "max_waiting", "max_images", "max_body_megabytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_images > self.max_waiting / OWNERS_SHARE:
            raise ValueError(
                f"max_images={self.max_images} must be at most half of max_waiting="
                f"{self.max_waiting}, which is what one client may have of the queue"
            )
        for name in ("ttl", "drain"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite")

    @property
    def max_body_bytes(self) -> int:
        return self.max_body_megabytes * MEGABYTE
