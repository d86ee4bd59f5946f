"""What a node tells of a storage in a bucket: whether it reads and writes there, its scratch, or why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from roma_ray.doctor import nodes
from roma_ray.doctor.check import Check
from roma_ray.store.buckets import as_path
from roma_ray.store.files import write_text
from tests.bucket import Proxy

NODE = {"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 8.0}}


@pytest.fixture
def probe(bucket: Proxy, request: pytest.FixtureRequest) -> Path:
    """The driver's, as it lies in the bucket."""
    folder = as_path(bucket.address(f"nodes/{request.node.name}")) / ".doctor-0"
    write_text(folder / "driver", folder.name)
    return folder


def judged(probe: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> Check:
    """What is said of the storage where a node answered this."""
    import ray

    monkeypatch.setattr(ray, "get", lambda reference, timeout: reference)
    _, check = nodes._judge(NODE, found, probe, nodes.versions())
    return check


def test_a_node_tells_of_its_scratch(probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = judged(probe, monkeypatch, nodes.probe_node(str(probe)))
    assert check.state == "ok"
    assert f"reads and writes {probe.parent}; scratch {tmp_path / 'scratch'}: copies may take" in check.detail


def test_a_node_that_the_bucket_refuses_names_it(probe: Path, bucket: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.rule = lambda request: "expired"
    found = nodes.probe_node(str(probe))
    bucket.reset()
    check = judged(probe, monkeypatch, found)
    assert check.state == "broken"
    assert re.search("does not share the storage .*ExpiredToken", check.detail)
    assert "role" in check.remedy


def test_a_node_without_a_scratch_is_broken(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROMA_RAY_SCRATCH", "/proc/nowhere")
    check = judged(probe, monkeypatch, nodes.probe_node(str(probe)))
    assert check.state == "broken"
    assert "cannot write /proc/nowhere" in check.detail
    assert "$ROMA_RAY_SCRATCH" in check.remedy


def test_nodes_are_not_asked_where_the_driver_cannot_write(bucket: Proxy) -> None:
    bucket.rule = lambda request: "forbidden"
    (check,) = nodes._nodes(bucket.address("nodes"))
    assert (check.name, check.state) == ("nodes", "note")
