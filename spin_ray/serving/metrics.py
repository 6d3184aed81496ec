"""Metrics of the ingress, exported to Prometheus by Ray."""

from ray.util.metrics import Counter, Histogram

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]


class Metrics:
    def __init__(self) -> None:
        self._requests = Counter(
            "spin_ray_requests", "Requests by the iterate that answered and HTTP status.", ("model", "status")
        )
        self._seconds = Histogram("spin_ray_request_seconds", "Whole requests.", _SECONDS, ("model",))
        self._first = Histogram("spin_ray_first_output_seconds", "Until the first output.", _SECONDS, ("model",))

    def answered(self, model: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"model": model, "status": str(status)})
        self._seconds.observe(max(seconds, 1e-6), {"model": model})

    def first_output(self, model: str, seconds: float) -> None:
        self._first.observe(max(seconds, 1e-6), {"model": model})
