"""Leases: one holder at a time, taken over after they expired and never before, by the bucket's clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from roma_ray.errors import BucketError, BusyError, StorageError
from roma_ray.store import files, leases
from roma_ray.store.artifacts import Store
from roma_ray.store.buckets import as_path
from roma_ray.store.leases import Taken, check_held, leased
from roma_ray.store.tables import write_table
from tests.bucket import Proxy, Request, few

_HOLDER = """
import sys, time
from roma_ray.store.leases import leased
with leased(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(bucket: Proxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a lease is that no other test uses, and that soon expires."""
    monkeypatch.setenv("ROMA_RAY_LEASE_SECONDS", "2")
    name = request.node.name.translate({ord(c): "-" for c in "[]/ "})
    return as_path(bucket.address(f"leases/{name}")) / ".lock"


def holder(place: Path) -> subprocess.Popen[str]:
    """A process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_one_is_refused_and_told_by_whom(place: Path) -> None:
    with leased(place):
        with pytest.raises(Taken, match=f"pid {os.getpid()}; its lease expires in [0-4] s"):
            with leased(place):
                pass
    with leased(place):
        pass


def test_a_lease_is_kept_for_as_long_as_its_holder_lives(place: Path) -> None:
    with leased(place):
        time.sleep(4.0)  # twice its time
        check_held(place)
        with pytest.raises(Taken):
            with leased(place):
                pass


def test_a_dead_holders_lease_is_taken_over_after_it_expired_and_not_before(place: Path) -> None:
    process = holder(place)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(Taken, match=f"pid {process.pid}"):
        with leased(place):
            pass
    began = time.monotonic()
    with leased(place, wait=True):
        assert 0.5 < time.monotonic() - began < 10
        check_held(place)


def test_who_was_away_for_longer_than_its_lease_is_told(place: Path) -> None:
    with leased(place):
        check_held(place)
        lease = leases._held[place]
        lease._over.set()  # renews no more, as a stopped process
        with leased(place, wait=True):
            assert lease.lost
            lease_of_the_other = leases._held[place]
            assert not lease_of_the_other.lost
        leases._held[place] = lease
        with pytest.raises(Taken, match="did not renew"):
            check_held(place)


def test_of_many_that_race_one_holds_it(place: Path) -> None:
    inside, most, done = [0], [0], []
    guard = threading.Lock()

    def work() -> None:
        with leased(place, wait=True):
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            with guard:
                inside[0] -= 1
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (most[0], len(done)) == (1, 4)


def test_shares_keep_one_another_company_and_the_lone_one_out(place: Path) -> None:
    with leased(place, shared=True), leased(place, shared=True):
        with pytest.raises(Taken):
            with leased(place):
                pass
    with leased(place):
        with pytest.raises(Taken):
            with leased(place, shared=True):
                pass
    with leased(place, shared=True):
        pass
    assert not files.listed(place.with_name(".lock.shared"))


@pytest.mark.parametrize("what", ["slow", "lost", "reset"])
def test_a_storm_loses_no_lease(place: Path, bucket: Proxy, what: str) -> None:
    bucket.rule = few(what, 4, lambda request: request.method == "PUT")
    with leased(place):
        time.sleep(1.5)
        check_held(place)
    assert len(bucket.told) == 4
    with leased(place):
        pass


def test_a_lease_that_a_stranger_wrote_expires_like_any_other(
    place: Path, bucket: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(place, '[" \\u001b[31m no lease ]')
    with pytest.raises(Taken, match="unknown"):
        with leased(place):
            pass
    files.write_text(place, '{"token": "x", "seconds": 0}')
    with leased(place, wait=True):
        pass


def test_the_clock_is_the_buckets(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is a day ahead takes nobody's lease."""
    process = holder(place)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86_400)
    try:
        with pytest.raises(Taken):
            with leased(place):
                pass
    finally:
        process.kill()
        process.wait()


def test_asking_the_time_leaves_nothing(place: Path) -> None:
    with leased(place):
        with pytest.raises(Taken):
            with leased(place):
                pass
    assert [path.name for path in files.below(place.parent)] == [".lock"]


@pytest.mark.parametrize("value", ["soon", "0", "nan", "1e9"])
def test_a_time_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ROMA_RAY_LEASE_SECONDS", value)
    with pytest.raises(StorageError, match="ROMA_RAY_LEASE_SECONDS"):
        leases.lease_seconds()


def test_renewing_costs_one_request_each_time(place: Path, bucket: Proxy) -> None:
    with leased(place):
        before: list[Request] = []
        bucket.rule = lambda request: before.append(request)
        time.sleep(1.3)
        assert {request.method for request in before} == {"PUT"}
        assert 1 <= len(before) <= 3


@pytest.mark.parametrize("shared", [False, True])
def test_what_could_not_be_taken_is_not_renewed(place: Path, bucket: Proxy, shared: bool) -> None:
    if shared:
        with leased(place):
            pass
        bucket.rule = lambda request: "forbidden" if request.method == "GET" and request.key.endswith(".lock") else None
    else:
        bucket.rule = lambda request: "forbidden" if request.lists else None
    with pytest.raises(BucketError):
        with leased(place, shared=shared):
            pass
    bucket.reset()
    with leased(place):
        pass


def test_a_renewal_that_is_never_answered_keeps_nobody(place: Path, bucket: Proxy) -> None:
    def rule(request: Request) -> None:
        if request.method == "PUT" and request.key.endswith(".lock"):
            time.sleep(30)

    with leased(place):
        bucket.rule = rule
        time.sleep(3)
        began = time.monotonic()
    assert time.monotonic() - began < 15
    bucket.reset()


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"token": "x", "seconds": 1' + b"0" * 400 + b"}"])
def test_what_somebody_else_put_there_expires_like_any_other(place: Path, content: bytes) -> None:
    files.write_bytes(place, content)
    with pytest.raises(Taken, match="unknown; its lease expires in"):
        with leased(place):
            pass


@pytest.mark.parametrize("large", [False, True])
def test_who_lost_a_stage_writes_no_more_in_it(place: Path, large: bool) -> None:
    stage = Store(place.parent).stage("extract", {}, {}, 1)

    def work() -> None:
        with stage.exclusive():
            leases._held[stage.path / ".lock"]._over.set()  # renews no more, as a stopped process
            time.sleep(3)
            if large:
                write_table(stage.path / "rows.parquet", {"row": [1]}, pa.schema([("row", pa.int64())]))
            else:
                files.write_text(stage.path / "facts.json", "1")

    with pytest.raises(BusyError, match="writes nothing more there"):
        work()
    # Nor does it clear up what may be another's.
    assert {path.name for path in files.listed(stage.path)} == {".identity.json", ".lock", ".makers"}
