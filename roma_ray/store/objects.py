"""Objects of a bucket: put whole, got whole, listed, created where absent, removed; the talking is obstore's."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from roma_ray.errors import BucketError, OddNameError
from roma_ray.store.buckets import Patience, place_of

_DIGEST = "sha256"
# In one request up to here; above, in parts, of which a killed process may leave some (`roma-ray gc` removes them).
_WHOLE_BYTES = 64 << 20
_PART_BYTES = 16 << 20
_TRIES = 5
# Before another try of a download, in seconds; None: there is none.
_WAITS = (0.1, 0.2, 0.4, 0.8, None)
_NO_BUCKET = "cannot {} {}: there is no such bucket. Make it, or correct the address (--storage, $ROMA_RAY_STORAGE)"

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What a bucket says of an object."""

    size: int
    tag: str
    """Its ETag: another one with every change."""
    written: float
    """When it was put, by the bucket's clock: seconds since 1970."""
    digest: str | None
    """SHA-256 of its bytes, in hex, where we put it."""


class Lost(Exception):
    """A conditional write found another object than it expected."""


@contextlib.contextmanager
def _told(path: str | Path, doing: str, *, last: bool = True) -> Iterator[None]:
    """Turn what the library raises into FileNotFoundError (no such object), Lost, or a BucketError with its remedy.

    Not `last`: go on where a connection ended in the middle of the bytes, which the library does not try again.
    """
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        if _no_bucket(error):
            raise BucketError(_NO_BUCKET.format(doing, path)) from None
        raise FileNotFoundError(f"there is no {path}") from None
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
        raise Lost(str(path)) from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise BucketError(
            f"cannot {doing} {path}: the bucket refuses it ({_reason(error)}). Check the credentials, which may have expired, and "
            "what they allow (cluster/README.md lists it), then run the same command again: finished work is kept."
        ) from None
    except exceptions.BaseError as error:
        if not last and "Server returned" not in str(error) and not _odd_name(error):
            return
        if _no_bucket(error):
            raise BucketError(_NO_BUCKET.format(doing, path)) from None
        if _odd_name(error):
            raise OddNameError(
                f"cannot {doing} {path}: {_reason(error)}. No file can have such a name, and nothing here gives one: remove or "
                "rename that object by the bucket's own tools, or choose another prefix"
            ) from None
        known = (
            "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a machine with a role"
        )
        reason = known if "169.254.169.254" in str(error) else _reason(error)
        raise BucketError(
            f"cannot {doing} {path}: {reason}. Check the address, the network and the credentials, then run the same command "
            "again: finished work is kept."
        ) from None


def _no_bucket(error: Exception) -> bool:
    return any(words in str(error) for words in ("NoSuchBucket", "ContainerNotFound", "bucket does not exist"))


def _odd_name(error: Exception) -> bool:
    """Whether a list held a name that the library refuses: with `//`, `..` or control characters."""
    return "invalid path" in str(error) or "empty path segment" in str(error)


def _reason(error: Exception) -> str:
    """The part of a library's error that a reader needs: the server's code and words, else its first line."""
    text = str(error)
    code, words = (re.search(f"<{tag}>([^<]{{1,200}})</{tag}>", text) for tag in ("Code", "Message"))
    if code:
        return f"{code[1]}: {words[1]}" if words else code[1]
    return text.splitlines()[0].replace("Error performing ", "").partition(" for path ")[0][:300]


def put(path: str | Path, content: bytes | Path, digest: str) -> str:
    """Put bytes, or a file's, whole, with their SHA-256; the ETag. Raises BucketError."""
    import obstore

    store, key = place_of(path, "bytes")
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    with _told(path, "write"):
        done = obstore.put(
            store,
            key,
            content,
            attributes={_DIGEST: digest},
            use_multipart=size > _WHOLE_BYTES,
            chunk_size=_PART_BYTES,
        )
    return str(done["e_tag"])


def create(path: str | Path, content: bytes) -> str | None:
    """Put bytes where nothing is; the ETag, or None where something else was. Raises BucketError.

    The answer to a write may get lost after the bucket took it. The next try then finds the object there: it is ours if it
    holds what we wrote.
    """
    import obstore

    store, key = place_of(path)
    for _ in range(_TRIES):
        try:
            with _told(path, "write"):
                return str(obstore.put(store, key, content, mode="create", use_multipart=False)["e_tag"])
        except Lost:
            with contextlib.suppress(FileNotFoundError):
                there, facts = get(path)
                return facts.tag if there == content else None
            # 409: another write of it was under way, and came to nothing.
            time.sleep(0.2)
    raise BucketError(f"cannot write {path}: other writers kept it busy. Run the same command again.")


def replace(path: str | Path, content: bytes, tag: str, patience: Patience = "answer") -> str:
    """Put bytes in place of the object with this ETag; the new one. Raises Lost where it is another by now, BucketError."""
    import obstore

    store, key = place_of(path, patience)
    try:
        with _told(path, "write"):
            return str(obstore.put(store, key, content, mode={"e_tag": tag}, use_multipart=False)["e_tag"])
    except (Lost, FileNotFoundError):
        with contextlib.suppress(FileNotFoundError):
            there, facts = get(path, patience)
            if there == content and facts.tag != tag:
                return facts.tag
        raise Lost(str(path)) from None


def _tried(path: str | Path, doing: str, call: Callable[[], T]) -> T:
    """What a call returns, made again where a connection ended in the middle of the answer."""
    for wait in _WAITS:
        with _told(path, doing, last=wait is None):
            return call()
        time.sleep(wait or 0)
    raise AssertionError("the last try returns or raises")


def get(path: str | Path, patience: Patience = "answer") -> tuple[bytes, Facts]:
    """An object's bytes, and what the bucket says of them. Raises FileNotFoundError, BucketError."""
    import obstore

    store, key = place_of(path, patience)

    def read() -> tuple[bytes, Facts]:
        found = obstore.get(store, key)
        return bytes(found.bytes()), _facts(path, found)

    return _tried(path, "read", read)


def get_after(path: str | Path, offset: int) -> bytes:
    """An object's bytes from this one on. Raises FileNotFoundError, BucketError."""
    import obstore

    store, key = place_of(path)
    if facts(path).size <= offset:
        return b""
    return _tried(path, "read", lambda: bytes(obstore.get(store, key, options={"range": {"offset": offset}}).bytes()))


def facts(path: str | Path) -> Facts:
    """What the bucket says of an object. Raises FileNotFoundError, BucketError."""
    import obstore

    store, key = place_of(path)
    with _told(path, "read"):
        return _facts(path, obstore.get(store, key, options={"head": True}))


def _facts(path: str | Path, found: Any) -> Facts:
    meta = found.meta
    if not meta["e_tag"]:
        raise BucketError(
            f"cannot read {path}: what answers is no bucket's server, as it gives no ETag; perhaps a proxy, or a network that wants "
            "a sign-in. Check the address and the network, then run the same command again: finished work is kept."
        )
    digest = found.attributes.get(_DIGEST)
    return Facts(meta["size"], str(meta["e_tag"]), meta["last_modified"].timestamp(), digest)


def fetch(path: str | Path, target: Path, tag: str) -> None:
    """Write the object with this ETag to a local file. Raises FileNotFoundError, Lost (another by now), OSError, BucketError."""
    import obstore

    store, key = place_of(path, "bytes")

    def read() -> None:
        with open(target, "wb") as stream:
            for part in obstore.get(store, key, options={"if_match": tag}).stream(min_chunk_size=_PART_BYTES):
                stream.write(part)

    _tried(path, "read", read)


def exists(path: str | Path) -> bool:
    """Whether there is such an object, or any below a folder of that name. Raises BucketError."""
    if place_of(path)[1]:
        with contextlib.suppress(FileNotFoundError):
            facts(path)
            return True
        if Path(path).suffix:
            return False  # no folder here is named like a file
    return any_below(path)


def below(folder: str | Path) -> list[tuple[Path, int, float]]:
    """Every object below a folder: path, bytes, when it was put. Raises BucketError.

    Some tools put an empty object in a folder's own place (`folder/`), which is listed by the folder's name: it is left out.
    """
    import obstore

    store, key = place_of(folder)
    root = Path(*Path(folder).parts[:2])

    def read() -> list[tuple[Path, int, float]]:
        parts = obstore.list(store, f"{key}/" if key else None)
        return [(root / o["path"], o["size"], o["last_modified"].timestamp()) for part in parts for o in part]

    found = _tried(folder, "list", read)
    folders = (
        {above for path, size, _ in found for above in path.parents} if any(not one[1] for one in found) else set()
    )
    return [one for one in found if one[1] or not (one[0] in folders or one[0] == Path(folder) or _is_gone(one[0]))]


def _is_gone(path: Path) -> bool:
    try:
        facts(path)
    except FileNotFoundError:
        return True
    return False


def any_below(folder: str | Path) -> bool:
    """Whether there is any object below a folder. Raises BucketError."""
    import obstore
    from obstore.exceptions import BaseError

    store, key = place_of(folder)

    def read() -> bool:
        try:
            return any(obstore.list(store, f"{key}/" if key else None, chunk_size=1))
        except BaseError as error:
            if _odd_name(error):
                return True
            raise

    return _tried(folder, "list", read)


def listed(folder: str | Path, pattern: str) -> list[Path]:
    """What lies in a folder and matches, by name: objects, and folders of objects. Raises BucketError."""
    first, _, rest = pattern.partition("/")
    if not any(sign in first for sign in "*?["):
        place = Path(folder) / first
        if rest:
            return listed(place, rest)
        return [place] if exists(place) else []
    folders, names = _children(folder)
    if not rest:
        return sorted(path for path in [*folders, *names] if fnmatch.fnmatchcase(path.name, first))
    return [path for one in sorted(folders) if fnmatch.fnmatchcase(one.name, first) for path in listed(one, rest)]


def _children(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Folders and objects right below a folder."""
    import obstore

    store, key = place_of(folder)
    root = Path(*Path(folder).parts[:2])
    found = _tried(folder, "list", lambda: obstore.list_with_delimiter(store, f"{key}/" if key else None))
    names = [root / one["path"] for one in found["objects"]]
    return [root / name for name in found["common_prefixes"]], [name for name in names if name != Path(folder)]


def remove(path: str | Path) -> None:
    """Remove an object; no error where there is none. Raises BucketError."""
    import obstore

    store, key = place_of(path)
    with _told(path, "remove"), contextlib.suppress(FileNotFoundError):
        obstore.delete(store, key)


def remove_folder(folder: str | Path) -> None:
    """Remove every object below a folder. Raises BucketError."""
    import obstore

    store, _ = place_of(folder)
    for keys in _groups("/".join(path.parts[2:]) for path, _, _ in below(folder)):
        with _told(folder, "remove"), contextlib.suppress(FileNotFoundError):
            obstore.delete(store, keys)


def _groups(keys: Iterator[str], count: int = 1000) -> Iterator[list[str]]:
    group: list[str] = []
    for key in keys:
        group.append(key)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group
