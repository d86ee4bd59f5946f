"""A bucket's objects do what files of the storage do, and a network's faults change nothing but the time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from roma_ray.errors import BucketError, RomaError, StorageError
from roma_ray.store import buckets, files, objects
from roma_ray.store.artifacts import Store
from roma_ray.store.buckets import address, as_path, is_object
from roma_ray.store.objects import Lost
from tests.bucket import NAME, REFUSALS, Proxy, Request, every, few

CONTENT = os.urandom(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def put(path: Path, content: bytes = CONTENT) -> str:
    return objects.put(path, content, hashlib.sha256(content).hexdigest())


@pytest.fixture
def root(bucket: Proxy, request: pytest.FixtureRequest) -> Path:
    """A folder of the bucket that no other test uses."""
    return as_path(bucket.address(f"objects/{request.node.name.translate({ord(c): '-' for c in '[]/ '})}"))


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "again"),
    [
        ("s3://bucket", "s3:/bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3:/bucket/a/b", "s3://bucket/a/b"),
        ("gs://bucket/a", "gs:/bucket/a", "gs://bucket/a"),
        (
            "s3://b/p?endpoint_override=127.0.0.1:9000&scheme=http&region=x",
            "s3:/b?endpoint_override=http%3A%2F%2F127.0.0.1%3A9000&region=x/p",
            "s3://b/p?endpoint_override=http%3A%2F%2F127.0.0.1%3A9000&region=x",
        ),
    ],
)
def test_an_address_is_a_path_and_a_path_an_address(text: str, path: str, again: str) -> None:
    found = as_path(text)
    assert (str(found), address(found)) == (path, again)
    assert is_object(found)
    assert is_object(Path(str(found)) / "deeper")
    assert as_path(again) == found


@pytest.mark.parametrize("path", ["/a/s3:/b", "s3", "s3:", "s3x:/b", "models/s3:/b", "./s3:/b"])
def test_files_have_no_such_path(path: str) -> None:
    assert not is_object(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://user:secret@host/x", "no kind that is known"),
        ("file:///x", "no kind that is known"),
        ("s3://key:secret@bucket/x", "names a user"),
        ("s3://bucket/x?endpoint_override=http://key:secret@host", "names a user"),
        ("s3://bucket/x?secret_access_key=secret", "not understood"),
        ("s3:///x", "not understood"),
        ("s3://bucket/../other", "not understood"),
        ("gs://bucket?region=x", "takes no"),
        ("s3://bucket#part/x", "cannot be a bucket's"),
        ("s3://two words/x", "cannot be a bucket's"),
        ("s3://bucket/a\tb", "no control characters"),
    ],
)
def test_other_addresses_are_refused_without_a_word_of_their_secrets(text: str, says: str) -> None:
    with pytest.raises(StorageError, match=says) as caught:
        as_path(text)
    assert "secret@" not in str(caught.value)
    assert "=secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["s3:/", "s3:/bucket/../other", "s3:/bucket/a\tb"])
def test_a_path_is_held_against_what_an_address_is(text: str) -> None:
    with pytest.raises(StorageError, match="address"):
        Store(text)


@pytest.mark.parametrize("server", ["http://", "ftp://host", "host:9000", "http://host:99999", "http://a b"])
def test_what_can_be_no_server_is_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server)
    with pytest.raises(StorageError, match="no server of a bucket"):
        objects.get(Path("s3:/of-no-server/x"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SECRET_ACCESS_KEY", "secret\n"), ("AWS_SKIP_SIGNATURE", "perhaps"), ("AWS_S3_EXPRESS", "1")],
)
def test_an_environment_that_cannot_be_is_told_without_its_secrets(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="AWS_") as caught:
        objects.get(Path("s3:/of-no-environment/x"))
    assert "secret" not in str(caught.value)


def test_people_read_addresses_and_no_paths() -> None:
    path = as_path("s3://bucket/runs?endpoint_override=http://127.0.0.1:9") / "extract"
    assert str(RomaError(f"cannot read {path}: no; see '{path}'.")) == (
        "cannot read s3://bucket/runs/extract: no; see 's3://bucket/runs/extract'."
    )


# -- verbs -------------------------------------------------------------------------------------------------------------


def test_what_is_put_is_got(root: Path) -> None:
    assert not files.exists(root)
    files.write_bytes(root / "a" / "one.bin", CONTENT)
    files.write_text(root / "a" / "two.txt", "é")
    files.write_text(root / "empty", "")
    files.write_json(root / "b.json", {"x": [1]})
    assert files.read_bytes(root / "a" / "one.bin") == CONTENT
    assert files.read_text(root / "a" / "two.txt") == "é"
    assert files.read_text(root / "empty") == ""
    assert files.read_json(root / "b.json") == {"x": [1]}
    assert files.size(root / "a" / "one.bin") == len(CONTENT)
    assert files.file_digest(root / "a" / "one.bin") == DIGEST
    assert files.exists(root / "a")
    assert files.exists(root / "a" / "one.bin")
    assert not files.exists(root / "a" / "one")
    assert files.written_at(root / "empty") > 1.7e9


def test_what_is_not_there_is_missing_as_a_file_is(root: Path) -> None:
    for read in (files.read_bytes, files.size, files.file_digest, files.local, files.local_tree, files.written_at):
        with pytest.raises(FileNotFoundError):
            read(root / "nothing")
    files.remove(root / "nothing")
    files.remove_folder(root / "nothing")
    assert files.listed(root / "nothing") == []
    assert files.below(root / "nothing") == []


@pytest.fixture
def stranger(root: Path, bucket: Proxy) -> Callable[[str, bytes], object]:
    """Puts an object below the root as another program may, whatever its name."""
    import boto3

    client = boto3.client("s3", endpoint_url=bucket.endpoint, region_name="us-east-1")
    prefix = "/".join(root.parts[2:])
    return lambda name, content: client.put_object(Bucket=NAME, Key=f"{prefix}/{name}", Body=content)


def test_what_tools_put_in_a_folders_place_is_no_file(root: Path, stranger: Callable[[str, bytes], object]) -> None:
    files.write_text(root / "deep" / "one.txt", "1")
    files.write_text(root / "empty", "")
    for name in ("", "deep/", "lone/"):
        stranger(name, b"")
    assert files.below(root) == [root / "deep" / "one.txt", root / "empty"]
    assert sorted(path.name for path in files.local_tree(root).iterdir()) == ["deep", "empty"]
    assert files.file_facts(files.below(root))[1][0] == 0


@pytest.mark.parametrize("name", ["a//b", "a/../b", "a/./b", "a/\x01", "a\tb"])
def test_names_that_no_file_can_have_are_told(name: str, root: Path, stranger: Callable[[str, bytes], object]) -> None:
    stranger(name, b"1")
    with pytest.raises(BucketError, match="No file can have such a name"):
        files.below(root)


def test_lists_are_those_of_a_folder(root: Path, tmp_path: Path) -> None:
    names = ["x/1.json", "x/2.txt", "x/deep/3.json", "y/1.json", ".hidden", "top.json", "x/.makers/a"]
    for place in (root, tmp_path):
        for name in names:
            files.write_text(place / name, name)

    def relative(place: Path, found: list[Path]) -> list[str]:
        return [path.relative_to(place).as_posix() for path in found]

    patterns = ["*", "*.json", "x/*.json", "*/1.json", "[!.]*", "x/*", "*/*/*.json", "x/deep/*", "top.json", "gone/*"]
    for pattern in patterns:
        assert relative(root, files.listed(root, pattern)) == relative(tmp_path, files.listed(tmp_path, pattern))
    assert relative(root, files.below(root)) == relative(tmp_path, files.below(tmp_path))
    sizes = {path.name: size for path, size, _ in files.entries(root)}
    assert sizes["3.json"] == len("x/deep/3.json")


def test_removing_takes_a_folder_and_nothing_beside_it(root: Path) -> None:
    for name in ("x/1", "x/deep/2", "xy/3", "4"):
        files.write_text(root / name, "")
    files.remove_folder(root / "x")
    assert [path.name for path in files.below(root)] == ["4", "3"]
    files.remove(root / "4")
    assert [path.name for path in files.below(root)] == ["3"]


def test_large_files_go_in_parts(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Proxy) -> None:
    monkeypatch.setattr(objects, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)
    content = os.urandom(11 << 20)
    (tmp_path / "large").write_bytes(content)
    objects.put(root / "large", tmp_path / "large", "digest")
    assert bucket.requests["POST"] == 2  # begun, completed
    assert files.read_bytes(root / "large") == content
    assert objects.facts(root / "large").digest == "digest"


def test_unfinished_uploads_are_found_and_removed(root: Path, bucket: Proxy) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=bucket.endpoint, region_name="us-east-1")
    key = "/".join((root / "large").parts[2:])
    client.create_multipart_upload(Bucket="bucket", Key=key)
    client.create_multipart_upload(Bucket="bucket", Key="elsewhere/large")
    assert [found for found, _ in buckets.UnfinishedUploads(root).found] == [key]
    buckets.UnfinishedUploads(root).abort()
    assert buckets.UnfinishedUploads(root).found == []
    assert len(client.list_multipart_uploads(Bucket="bucket")["Uploads"]) == 1


def test_only_one_creates(root: Path) -> None:
    assert files.create(root / "one", "mine")
    assert not files.create(root / "one", "yours")
    assert files.read_text(root / "one") == "mine"


def test_only_what_was_read_is_replaced(root: Path) -> None:
    first = put(root / "one", b"1")
    second = objects.replace(root / "one", b"2", first)
    with pytest.raises(Lost):
        objects.replace(root / "one", b"3", first)
    assert files.read_bytes(root / "one") == b"2"
    files.remove(root / "one")
    with pytest.raises(Lost):
        objects.replace(root / "one", b"3", second)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["slow", "broken", "reset", "lost"])
def test_writes_outlive_a_storm(root: Path, bucket: Proxy, what: str) -> None:
    bucket.rule = few(what, 3)
    put(root / "one")
    assert len(bucket.told) == 3
    assert files.read_bytes(root / "one") == CONTENT


@pytest.mark.parametrize("what", ["slow", "broken", "reset", "lost", "cut"])
def test_reads_outlive_a_storm(root: Path, bucket: Proxy, what: str) -> None:
    put(root / "one")
    bucket.rule = few(what, 3)
    assert files.read_bytes(root / "one") == CONTENT
    bucket.rule = few(what, 3)
    copy = files.local(root / "one")
    assert copy.read_bytes() == CONTENT
    assert bucket.told


@pytest.mark.parametrize("what", ["lost", "conflict", "slow"])
def test_a_creation_whose_answer_got_lost_is_still_ours(root: Path, bucket: Proxy, what: str) -> None:
    bucket.rule = few(what, 2, lambda request: request.method == "PUT")
    assert files.create(root / "one", "mine")
    assert len(bucket.told) == 2
    bucket.rule = few(what, 2, lambda request: request.method == "PUT")
    assert not files.create(root / "one", "yours")
    assert files.read_text(root / "one") == "mine"


def test_a_replacement_whose_answer_got_lost_is_still_ours(root: Path, bucket: Proxy) -> None:
    tag = put(root / "one", b"1")
    bucket.rule = few("lost", 1, lambda request: request.method == "PUT")
    tag = objects.replace(root / "one", b"2", tag)
    assert objects.replace(root / "one", b"3", tag)


@pytest.mark.parametrize("what", ["forbidden", "expired"])
def test_a_refusal_is_told_with_its_remedy(root: Path, bucket: Proxy, what: str) -> None:
    put(root / "one")
    bucket.rule = lambda request: what
    calls = {
        "read": lambda: files.read_bytes(root / "one"),
        "write": lambda: files.write_text(root / "two", ""),
        "list": lambda: files.below(root),
        "remove": lambda: files.remove(root / "one"),
    }
    for doing, call in calls.items():
        with pytest.raises(BucketError, match=f"cannot {doing} s3://.*{REFUSALS[what][1]}.*credentials"):
            call()


def test_a_bucket_that_is_not_there_is_told(bucket: Proxy) -> None:
    path = as_path(bucket.address("x").replace("s3://bucket/", "s3://no-such-bucket/"))
    for call in (
        lambda: files.write_text(path / "a", ""),
        lambda: files.read_text(path / "a"),
        lambda: files.below(path),
    ):
        with pytest.raises(BucketError, match="there is no such bucket"):
            call()


def test_a_storm_without_end_ends_in_words(root: Path, bucket: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's own patience shortened: by itself it tries for three minutes."""
    monkeypatch.setitem(buckets._PATIENCE, "answer", ("2 minutes", {"max_retries": 1}))
    monkeypatch.setitem(buckets._PATIENCE, "bytes", ("2 minutes", {"max_retries": 1}))
    buckets._bucket.cache_clear()
    bucket.rule = lambda request: "slow"
    try:
        with pytest.raises(BucketError, match=r"SlowDown.*finished work is kept"):
            files.write_text(root / "one", "")
    finally:
        buckets._bucket.cache_clear()


def test_without_the_library_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(StorageError, match=r"roma-ray\[objects\]"):
        files.exists(as_path("s3://other-bucket/x"))


def test_one_request_in_three_may_fail(root: Path, bucket: Proxy) -> None:
    bucket.rule = every("broken", 3)
    for number in range(6):
        files.write_text(root / f"{number}", f"{number}")
    assert [files.read_text(path) for path in files.below(root)] == [f"{number}" for number in range(6)]
    assert len(bucket.told) >= 6


def test_a_list_is_asked_for_again_and_not_kept(root: Path, bucket: Proxy) -> None:
    def lists(request: Request) -> str | None:
        return "slow" if request.lists and not bucket.told else None

    put(root / "one", b"")
    assert len(files.below(root)) == 1
    put(root / "two", b"")
    bucket.rule = lists
    assert len(files.below(root)) == 2


def test_what_is_no_buckets_server_gives_no_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A proxy, or a network that wants a sign-in, answers everything with a page."""

    class Page(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "13")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"<html></html>")

        do_HEAD = do_GET

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("ROMA_RAY_SCRATCH", str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = as_path(f"s3://bucket/x?endpoint_override=http://127.0.0.1:{server.server_port}") / "model.safetensors"
    for read in (files.read_bytes, files.size, files.local):
        with pytest.raises(BucketError, match="no bucket's server"):
            read(path)
    server.shutdown()
    server.server_close()
