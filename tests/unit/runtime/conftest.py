"""A cluster as Ray would describe it; no Ray is started."""

from typing import Any

import pytest
import ray

from spin_ray.runtime import autoscaler, placement


@pytest.fixture
def cluster(monkeypatch):
    """Nodes and free resources, as Ray would tell them; a test changes both."""
    told: dict[str, Any] = {"nodes": [{"CPU": 2.0}], "free": {"CPU": 2.0}, "asked": []}
    monkeypatch.setattr(placement, "node_resources", lambda labels=None: told["nodes"])
    monkeypatch.setattr(ray, "available_resources", lambda: told["free"])
    monkeypatch.setattr(autoscaler, "send", told["asked"].append)
    return told
