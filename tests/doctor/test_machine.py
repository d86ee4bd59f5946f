"""`roma-ray doctor` on a storage: a folder, a bucket with its scratch, and what is wrong with either."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from roma_ray.doctor.check import Check
from roma_ray.doctor.machine import examine_machine
from roma_ray.errors import with_addresses
from roma_ray.store.buckets import UnfinishedUploads, as_path, place_of
from roma_ray.store.files import below
from tests.bucket import NAME, Proxy, _Handler


def found(storage: str) -> list[Check]:
    """What is said of the storage and its scratch."""
    return [check for check in examine_machine(storage) if check.name in ("storage", "scratch")]


def test_a_folder_and_the_scratch_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path / "scratch"))
    storage, scratch = found(str(tmp_path / "storage"))
    assert re.fullmatch(r".*: writable \(1 MiB synced in \d+ ms\), (\d+\.\d) GiB free", storage.detail)
    assert re.fullmatch(rf"{tmp_path / 'scratch'}: writable, (\d+\.\d) GiB free", scratch.detail)
    free = shutil.disk_usage(tmp_path).free / 2**30
    for check in (storage, scratch):
        assert check.state == "ok"
        assert float(check.detail.split()[-3]) == pytest.approx(free, abs=1.0)
    assert below(tmp_path / "scratch") == []


def test_a_scratch_that_is_no_folder_is_told_of_a_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path / "file" / "below"))
    storage, scratch = found(str(tmp_path / "storage"))
    assert (storage.state, scratch.state) == ("ok", "broken")
    assert "Large tables and local copies" in scratch.detail


def test_a_bucket_has_no_figure_of_room_and_a_scratch_has(
    bucket: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROMA_RAY_SCRATCH_GIB", "3")
    storage, scratch = found(bucket.address("doctor"))
    assert (storage.state, scratch.state) == ("ok", "ok")
    assert re.fullmatch(rf"s3://{NAME}/doctor: writable \(1 MiB put in \d+ ms\)", with_addresses(storage.detail)), (
        storage.detail
    )
    assert scratch.detail.startswith(
        f"{tmp_path / 'scratch'}: copies may take 3.0 GiB ($ROMA_RAY_SCRATCH_GIB sets it) and take 0.0 GiB; "
    )
    free = shutil.disk_usage(tmp_path).free / 2**30
    assert float(scratch.detail.split("; ")[1].split()[0]) == pytest.approx(free, abs=1.0)
    assert below(tmp_path / "scratch") == []


@pytest.mark.parametrize(
    ("variable", "value", "state", "said"),
    [
        ("ROMA_RAY_SCRATCH_GIB", "1000000", "note", "copies may take 1000000.0 GiB"),
        ("ROMA_RAY_SCRATCH_GIB", "0.5", "note", "copies may take 0.5 GiB"),
        ("ROMA_RAY_SCRATCH_GIB", "much", "broken", "$ROMA_RAY_SCRATCH_GIB is 'much', which is no number"),
        ("ROMA_RAY_SCRATCH", "file/below", "broken", "local copies of a bucket's files lie there"),
    ],
)
def test_a_scratch_that_does_not_serve_is_told(
    bucket: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, state: str, said: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    storage, scratch = found(bucket.address("doctor"))
    assert (storage.state, scratch.state) == ("ok", state)
    assert said in scratch.detail
    if state == "note":
        assert "$ROMA_RAY_SCRATCH_GIB" in scratch.remedy


def test_a_bucket_that_is_not_there_or_refuses_is_a_finding_and_ends_nothing(bucket: Proxy) -> None:
    """The checks after it follow: one error of the whole command hid them."""
    (missing,) = found(bucket.address("x").replace(f"s3://{NAME}/", "s3://no-such-bucket/"))
    assert missing.state == "broken"
    assert "there is no such bucket" in missing.detail
    bucket.rule = lambda request: "forbidden"
    (refused,) = found(bucket.address("x"))
    assert refused.state == "broken"
    assert "AccessDenied" in refused.detail


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_server_that_ignores_conditions_is_broken(
    bucket: Proxy, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    """On it two drivers would take one lease."""
    address = bucket.address("conditions")
    assert not any(check.name == "leases" for check in examine_machine(address))
    asked = _Handler._ask

    def without(handler: _Handler, body: bytes) -> object:
        del handler.headers[header]
        return asked(handler, body)

    monkeypatch.setattr(_Handler, "_ask", without)
    (check,) = [check for check in examine_machine(address) if check.name == "leases"]
    assert check.state == "broken"
    assert "ignores conditional writes" in check.detail
    assert below(as_path(address)) == []


def test_a_secret_in_an_address_is_not_shown() -> None:
    (check,) = found(f"s3://key:hidden@{NAME}/x")
    assert check.state == "broken"
    assert "names a user: take it out" in check.detail
    assert "hidden" not in check.detail + check.remedy


def test_unfinished_uploads_are_counted_and_a_role_that_may_not_list_them_is_told(bucket: Proxy) -> None:
    """Only S3 keeps them, and only boto3 lists them."""
    import boto3

    address = bucket.address("doctor-uploads")
    _, key = place_of(as_path(address) / "extract" / "large")
    boto3.client("s3", endpoint_url=bucket.endpoint, region_name="us-east-1").create_multipart_upload(
        Bucket=NAME, Key=key
    )
    *_, uploads = found(address)
    assert (uploads.state, uploads.detail.split(",")[0]) == ("note", "1 unfinished upload(s)")
    assert "roma-ray gc" in uploads.remedy
    UnfinishedUploads(as_path(address)).abort()
    assert [check.state for check in found(address)] == ["ok", "ok"]
    bucket.rule = lambda request: "forbidden" if "uploads" in request.query else None
    *_, refused = found(address)
    assert refused.state == "note"
    assert "AccessDenied" in refused.detail
    assert "cluster/README.md" in refused.detail
