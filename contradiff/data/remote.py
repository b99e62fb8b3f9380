"""Read files from a folder or a URL (s3://, gs://, http://, ...). Only this module uses fsspec."""

import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

Location = Path | str
"""A local path, or a URL with "://" in it."""

ATTEMPTS = 5
FIRST_PAUSE = 0.5
"""Seconds of waiting before the second attempt. Each later wait is twice as long."""
BLOCK_BYTES = 1 << 22

T = TypeVar("T")


def join(folder: Location, name: str) -> Location:
    """Return the path or URL of the file `name` in a folder."""
    return f"{folder.rstrip('/')}/{name}" if isinstance(folder, str) else folder / name


def read_bytes(place: Location) -> bytes:
    """Read a file. Raises FileNotFoundError if it is missing, and the errors of `open_file`."""
    if isinstance(place, Path):
        return place.read_bytes()
    file_system, path = _resolve(place)
    return _persist(lambda: file_system.cat_file(path), place)


def size_of(place: Location) -> int | None:
    """Return a file's size in bytes, or None if the server does not know the size."""
    if isinstance(place, Path):
        return place.stat().st_size
    file_system, path = _resolve(place)
    return _persist(lambda: file_system.info(path)["size"], place)


def open_file(place: Location, *, num_bytes: int) -> io.BufferedReader:
    """Open a file of known size. A remote file is read in blocks, with retries for each block.

    Raises ValueError if the URL's protocol is unknown or its Python package is missing. Reading
    raises OSError if the server cannot be reached.
    """
    if isinstance(place, Path):
        return place.open("rb")
    return io.BufferedReader(_Blocks(place, num_bytes), BLOCK_BYTES)


class _Blocks(io.RawIOBase):
    """A remote file. Each read is a separate request, so that a failed request can be repeated."""

    def __init__(self, url: str, num_bytes: int) -> None:
        self.url, self.num_bytes, self.position, self.whole = url, num_bytes, 0, b""
        self.file_system, self.path = _resolve(url)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        start, stop = self.position, min(self.position + len(buffer), self.num_bytes)
        if start < stop:
            request = partial(self._request, start, stop)
            buffer[: stop - start] = self.whole[start:stop] or _persist(request, self.url)
        self.position = stop
        return stop - start

    def _request(self, start: int, stop: int) -> bytes:
        content: bytes = self.file_system.cat_file(self.path, start=start, end=stop)
        if len(content) == self.num_bytes:  # some servers ignore ranges and send the whole file
            self.whole = content
            return content[start:stop]
        if len(content) != stop - start:
            raise ConnectionError(f"{self.url}: received {len(content)} of {stop - start} bytes")
        return content


def _resolve(url: str) -> tuple[Any, str]:
    """Return the URL's file system and path. Each forked worker needs its own file system."""
    from fsspec.core import url_to_fs

    # Forbid compression on the way: sizes and hashes must be those of the stored file.
    options = {"headers": {"Accept-Encoding": "identity"}} if url.startswith("http") else {}
    try:
        return url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        remedy = "use a URL that begins with s3://, gs://, http:// or https://"
        if isinstance(error, ImportError):
            package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(url.partition(":")[0])
            remedy = f"`pip install {package}`" if package else "install the missing package"
        raise ValueError(f"{url}: {error}; {remedy}") from error


def _persist(action: Callable[[], T], url: str) -> T:
    """Call `action`. After an error that may be temporary, call it again."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:
            cause: BaseException = error  # fsspec turns all HTTP failures into FileNotFoundError
            while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if not _is_passing(cause):
                raise
            if attempt == ATTEMPTS - 1:
                failure = f"{ATTEMPTS} attempts failed; the last error was {cause!r}"
                raise OSError(f"{url}: {failure}") from error
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError


def _is_passing(error: BaseException) -> bool:
    status = getattr(error, "status", None)  # aiohttp's errors have a status and are not OSErrors
    if isinstance(status, int):
        return status >= 500 or status in {408, 429}
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    return isinstance(error, OSError) or type(error).__module__.startswith("aiohttp.")
