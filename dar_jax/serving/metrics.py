"""Counters of the service, for Prometheus."""

from typing import Any

import prometheus_client as prometheus

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""Upper ends of the buckets of times."""
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST


class Metrics:
    """A registry of its own, so that several services fit into a process.

    Attributes:
        requests: answered, by route and status.
        images: drawn to the end.
        dropped: images that were not, by reason: "cancelled", "late", "failed", "shutdown".
        waiting: images that wait for a lane.
        active: images in lanes.
        first_preview: seconds from a request to its first preview.
        finished: seconds from a request to an image of it.
    """

    def __init__(self):
        self._registry = prometheus.CollectorRegistry()
        own: dict[str, Any] = dict(namespace="dar", registry=self._registry)
        self.requests = prometheus.Counter(
            "requests", "Requests answered", ["route", "status"], **own
        )
        self.images = prometheus.Counter("images", "Images drawn", **own)
        self.dropped = prometheus.Counter("images_dropped", "Images not drawn", ["reason"], **own)
        self.waiting = prometheus.Gauge("images_waiting", "Images that wait", **own)
        self.active = prometheus.Gauge("images_active", "Images that are being drawn", **own)
        times: dict[str, Any] = dict(**own, buckets=SECONDS)
        self.first_preview = prometheus.Histogram(
            "first_preview_seconds", "Time from a request to its first preview", **times
        )
        self.finished = prometheus.Histogram(
            "image_seconds", "Time from a request to an image of it", **times
        )

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return prometheus.generate_latest(self._registry)
