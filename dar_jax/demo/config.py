"""Where the demo is served: the block `demo`."""

import dataclasses

MEGABYTE = 2**20
MAX_PORT = 65535


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Where the page is served, and how much of it.

    Attributes:
        host: address to bind to; "0.0.0.0" lets everybody in who can reach this computer.
        port: to bind to.
        batch_size: most images of a request.
        max_requests: that wait while one is served.
        max_upload_megabytes: size of an uploaded picture.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    batch_size: int = 8
    max_requests: int = 16
    max_upload_megabytes: int = 10

    def __post_init__(self):
        if not 1 <= self.port <= MAX_PORT:
            raise ValueError(f"port={self.port} must be in 1..{MAX_PORT}")
        for name in ("batch_size", "max_requests", "max_upload_megabytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def max_upload_bytes(self) -> int:
        return self.max_upload_megabytes * MEGABYTE
