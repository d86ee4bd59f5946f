"""Buckets: how they are addressed, reached, and what a killed process may leave in them.

An object's path is its address as a path: `s3://bucket/key` is Path("s3:/bucket/key"), so it can be joined, compared, sent to
another machine and turned into text like any other; no file has such a path. Where a server other than the cloud's own is
meant, the bucket's part carries it (`bucket?endpoint_override=...`).

Credentials come from the environment, from the machine's role, or from the cloud's own files. They are never a setting.
"""

from __future__ import annotations

import importlib.util
import os
import re
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

from roma_ray.errors import BucketError, StorageError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

SCHEMES = ("s3", "gs", "az")
_QUERY = {"endpoint_override", "region", "scheme"}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Patience = Literal["bytes", "answer", "lease"]
"""How long a request is waited for: one that moves many bytes, one that does not, and one that renews a lease."""
# A connection that went dead without a word is given up after the first. Of each request's tries, which wait longer each time.
_PATIENCE: dict[Patience, tuple[str, RetryConfig]] = {
    "bytes": ("30 minutes", {"max_retries": 12}),
    "answer": ("2 minutes", {"max_retries": 12}),
    "lease": ("10 seconds", {"max_retries": 12, "retry_timeout": timedelta(seconds=10)}),
}
_ALLOWED = "cluster/README.md lists what the role must be allowed"


def is_object(path: str | Path) -> bool:
    """Whether a path is an object's, and no file's."""
    return str(path).split(":", 1)[0] in SCHEMES and str(path).partition(":")[2].startswith("/")


def has_scheme(text: str) -> bool:
    """Whether a text is an address and no path."""
    return "://" in text


def as_path(address: str) -> Path:
    """The path of an address `s3://bucket/prefix`, perhaps with `?endpoint_override=`. Raises StorageError."""
    scheme, _, rest = address.partition("://")
    place, _, query = rest.partition("?")
    bucket, _, prefix = place.partition("/")
    if scheme not in SCHEMES:
        raise StorageError(
            f"a storage at {scheme}:// is of no kind that is known here: use a folder (also a mounted shared one), or "
            f"{', '.join(f'{name}://bucket/prefix' for name in SCHEMES)}"
        )
    if "@" in bucket or ":" in bucket or "@" in query:
        raise StorageError(
            f"the address {scheme}://... names a user: take it out. Credentials come from the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY), from the machine's role, or from the cloud's own files"
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    if bucket and (not _BUCKET.fullmatch(bucket) or not prefix.isprintable()):
        raise StorageError(
            f"the address {scheme}://{bucket!r}/... cannot be a bucket's: of its name letters, digits, dots, hyphens and underscores "
            "are known, and of the prefix no control characters"
        )
    if not bucket or set(options) - _QUERY or ".." in Path(prefix).parts:
        raise StorageError(
            f"the address {scheme}://{bucket or '...'} is not understood: it is {scheme}://bucket/prefix, perhaps with "
            f"?endpoint_override=http://host:port ({', '.join(sorted(_QUERY))} are known; credentials are not given here)"
        )
    if options and scheme != "s3":
        raise StorageError(f"{scheme}:// takes no ?{'&'.join(options)}: another server is named in the environment")
    server = _server(options)
    return Path(f"{scheme}:", bucket + (f"?{urlencode(server)}" if server else ""), prefix)


def checked(path: Path) -> Path:
    """An object's path that somebody gave as one (`s3:/bucket/prefix`). Raises StorageError as its address would."""
    return as_path(address(path) if len(path.parts) > 1 else f"{path}//")


def _server(options: dict[str, str]) -> dict[str, str]:
    """Options in one form: an endpoint with its scheme."""
    endpoint, scheme = options.get("endpoint_override"), options.get("scheme", "https")
    known = {"region": options["region"]} if "region" in options else {}
    if endpoint:
        known["endpoint_override"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
    return dict(sorted(known.items()))


def address(path: str | Path) -> str:
    """The address of an object's path, as other libraries take it (`?endpoint_override=` last)."""
    scheme, bucket, *rest = Path(path).parts
    bucket, separator, query = bucket.partition("?")
    return f"{scheme}//{'/'.join([bucket, *rest])}{separator}{query}"


def place_of(path: str | Path, patience: Patience = "answer") -> tuple[Any, str]:
    """The bucket's connection and the key of a path. Raises StorageError for a server that cannot be one, or without obstore."""
    scheme, bucket, *rest = Path(path).parts
    return _bucket(scheme.rstrip(":"), bucket, patience), "/".join(rest)


@lru_cache(maxsize=32)
def _bucket(scheme: str, name: str, patience: Patience) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError:
        raise StorageError(
            f"a storage at {scheme}:// needs obstore: pip install 'roma-ray[objects]' on every node"
        ) from None
    bucket, _, query = name.partition("?")
    timeout, retries = _PATIENCE[patience]
    client: ClientConfig = {"timeout": timeout, "connect_timeout": "10 seconds"}
    if scheme != "s3":
        return (GCSStore if scheme == "gs" else AzureStore)(bucket, client_options=client, retry_config=retries)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if not os.environ.get(variable, "").isprintable():
            raise StorageError(
                f"${variable} holds a line break or a control character, perhaps at its end: take it out"
            )
    endpoint, region = _endpoint(query)
    known: dict[str, Any] = {}
    if endpoint:
        known["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    if region:
        known["region"] = region
    try:
        return S3Store(bucket, client_options=client, retry_config=retries, credential_provider=_profile(), **known)
    except BaseError as error:
        # It reads more of them than are named here.
        raise StorageError(
            f"cannot reach s3://{bucket}: {str(error).splitlines()[0][:300]}. Correct that in the environment ($AWS_...)"
        ) from None


def _endpoint(query: str) -> tuple[str | None, str | None]:
    """The server and the region that S3 is asked at, where they are given: by the address, else by the usual variables."""
    options = dict(parse_qsl(query))
    endpoint = (
        options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint and not _is_server(endpoint):
        raise StorageError(
            f"{endpoint!r} is no server of a bucket: give http://host:port or https://host (?endpoint_override=, "
            "$AWS_ENDPOINT_URL_S3, $AWS_ENDPOINT_URL)"
        )
    return endpoint, region or ("us-east-1" if endpoint else None)


def _is_server(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        # The port is looked at when it is asked for.
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return known and endpoint.isprintable() and " " not in endpoint


def _profile() -> Any:
    """The credentials of ~/.aws, which obstore by itself does not read; None where others are at hand, or no boto3."""
    given = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    files = [
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
    ]
    if any(os.environ.get(name) for name in given) or not any(Path(file).expanduser().is_file() for file in files):
        return None
    if importlib.util.find_spec("boto3") is None:
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    return Boto3CredentialProvider()


class UnfinishedUploads:
    """Uploads in parts that were begun below a folder and never ended: nobody reads them, and they are paid for.

    Of S3 alone: the other clouds remove theirs by themselves.
    """

    def __init__(self, folder: Path) -> None:
        """Look for them. Raises StorageError without boto3, BucketError where the bucket does not tell."""
        scheme, name, *rest = folder.parts
        self.found: list[tuple[str, str]] = []
        if scheme != "s3:":
            return
        if importlib.util.find_spec("boto3") is None:
            raise StorageError(
                "unfinished uploads are found by boto3, which is missing: pip install 'roma-ray[objects]'"
            )
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        self.bucket, _, query = name.partition("?")
        endpoint, region = _endpoint(query)
        self._errors = (BotoCoreError, ClientError)
        try:
            self._client = boto3.client("s3", endpoint_url=endpoint, region_name=region)
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix="".join(f"{part}/" for part in rest)):
                self.found += [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", ())]
        except self._errors as error:
            raise BucketError(f"cannot list unfinished uploads in {folder}: {error}. {_ALLOWED}") from None

    def abort(self) -> None:
        """Remove them. Raises BucketError."""
        try:
            for key, upload in self.found:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)
        except self._errors as error:
            raise BucketError(f"cannot remove unfinished uploads in {self.bucket}: {error}. {_ALLOWED}") from None
