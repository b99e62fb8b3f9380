"""Files in a folder or under a URL (s3://, gs://, http://, ...), through fsspec: its only user.

When a connection fails, the file is opened again and read on from where it broke off.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Location = Path | str
"""A local path, or a URL with "://" in it."""

ATTEMPTS = 5
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; twice as many before each further one."""

T = TypeVar("T")


def join(folder: Location, name: str) -> Location:
    """Return the path or URL of `name` in a folder."""
    return f"{folder.rstrip('/')}/{name}" if isinstance(folder, str) else folder / name


def read_bytes(url: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The protocol is unknown, or its package is not installed.
        OSError: The connection failed several times.
    """
    file_system, path = _resolve(url)
    return _persist(lambda: file_system.cat_file(path), url)


def size_of(url: str) -> int | None:
    """Return the size of a file in bytes; None if the server does not tell.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The protocol is unknown, or its package is not installed.
        OSError: The connection failed several times.
    """
    file_system, path = _resolve(url)
    return _persist(lambda: file_system.info(path)["size"], url)


class RemoteFile:
    """A remote file that is read once, from beginning to end."""

    def __init__(self, url: str, *, num_bytes: int) -> None:
        """Describe the file; the first `read` opens it.

        Args:
            url: Address of the file.
            num_bytes: Size of the file; if the server sends less, the connection has failed.
        """
        self.url, self.num_bytes = url, num_bytes
        self._file: Any = None
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, or all the rest if it is negative; b"" at the end.

        Raises:
            ValueError: The protocol is unknown, or its package is not installed.
            OSError: The connection failed several times.
        """
        if size >= 0:
            return _persist(lambda: self._read_some(size), self.url)
        return b"".join(iter(lambda: self.read(1 << 20), b""))

    def _read_some(self, size: int) -> bytes:
        size = min(size, self.num_bytes - self._position)
        if size == 0:
            return b""
        if self._file is None:
            self._file = self._opened()
        content = b""
        try:
            content = self._file.read(size)
        finally:
            if not content:
                self.close()
        if not content:
            raise ConnectionError(f"{self.url}: ended at byte {self._position} of {self.num_bytes}")
        self._position += len(content)
        return content

    def _opened(self) -> Any:
        file_system, path = _resolve(self.url)
        # One request for the whole file, instead of one for each block of it.
        whole = {"block_size": 0} if self.url.startswith("http") else {}
        file = file_system.open(path, "rb", **whole)
        if self._position:
            try:
                file.seek(self._position)
            except ValueError:  # a stream: read what has been read before
                left = self._position
                while left and (content := file.read(min(left, 1 << 20))):
                    left -= len(content)
        return file

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _resolve(url: str) -> tuple[Any, str]:
    """Return file system and path; not cached, since a forked worker needs its own file system."""
    from fsspec.core import url_to_fs

    # Packed as it lies there: sizes and hashes are those of the file.
    options = {"headers": {"Accept-Encoding": "identity"}} if url.startswith("http") else {}
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        protocol = url.split("://", maxsplit=1)[0]
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(protocol)
        remedy = f"`pip install {package}`" if package else "install it"
        raise ValueError(
            f"{url}: {protocol}:// needs a package that is not installed ({error}); {remedy}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{url}: {error}; fsspec knows s3://, gs://, http://, https:// and others"
        ) from error


def _persist(action: Callable[[], T], url: str) -> T:
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if not _is_passing(error):
                raise
            if attempt == ATTEMPTS - 1:
                raise OSError(
                    f"{url}: {ATTEMPTS} attempts failed, the last by {_root(error)!r}"
                ) from error
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError


def _is_passing(error: BaseException) -> bool:
    """Return whether another attempt may succeed."""
    error = _root(error)
    status = getattr(error, "status", None)  # of aiohttp's errors, which are no OSErrors
    if isinstance(status, int):
        return status >= 500 or status in {408, 429}
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    return isinstance(error, OSError) or type(error).__module__.startswith("aiohttp.")


def _root(error: BaseException) -> BaseException:
    """Return the real cause: fsspec's HTTP reports every failure as a missing file."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error
