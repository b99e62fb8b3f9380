"""And shards behind it: a server on this machine, and fsspec's memory."""

import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest

from contradiff.data import remote
from contradiff.data.pairs import PairedShards
from contradiff.data.remote import size_of
from contradiff.data.shard_info import ShardInfo
from contradiff.data.shards import ShardIndex, read_shard, read_split
from contradiff.data.streams import TrainingStream, training_batches
from contradiff.training.batch import ViewChooser


class Server:
    """Serves a folder; `faults` are met by its next GET requests of .tar files, one each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.has_ranges = folder, True
        self.faults: list[str] = []
        self.requests: list[str] = []
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                server.requests.append(self.path)
                path, wanted = folder / self.path.lstrip("/"), self.headers.get("Range")
                fault = server.faults.pop(0) if self.path.endswith(".tar") and server.faults else ""
                if fault == "503":
                    self.send_error(503)
                elif wanted and server.has_ranges:
                    start, last = map(int, wanted.removeprefix("bytes=").split("-"))
                    content = path.read_bytes()[start : last + 1]
                    self.send_response(206)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
                    self.close_connection = True
                else:
                    super().do_GET()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server(tiny_data: Path, tmp_path: Path) -> Iterator[Server]:
    for name in ("images", "latents"):
        shutil.copytree(tiny_data / name, tmp_path / name)
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def memory(tiny_data: Path) -> Iterator[str]:
    """A URL of fsspec's file system in this process."""
    system = fsspec.filesystem("memory")
    for path in tiny_data.rglob("*.*"):
        system.pipe(f"/data/{path.relative_to(tiny_data)}", path.read_bytes())
    yield "memory://data"
    system.rm("/data", recursive=True)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)


@pytest.fixture(params=["server", "memory"])
def url(request: pytest.FixtureRequest) -> str:
    place = request.getfixturevalue(request.param)
    return place if isinstance(place, str) else place.url


def test_remote_shards_are_those_of_the_folder(url: str, tiny_data: Path):
    folder, remote_folder = tiny_data / "images", f"{url}/images/"
    assert ShardIndex.read(remote_folder, ShardInfo) == ShardIndex.read(folder, ShardInfo)
    assert list(read_split(remote_folder, "train")) == list(read_split(folder, "train"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_from_a_url_has_the_same_batches(url: str, tiny_data: Path, num_workers: int):
    """Also in workers, which are forked off a process that has spoken to the server."""

    def batches(images: Path | str, latents: Path | str, num_workers: int) -> list[Any]:
        pairs = PairedShards.open(images, latents, split="train")
        settings = {"latent_views": "two", "cond_view": "same", "condition": "pixels", "seed": 0}
        counts = {"batch_size": 8, "start_step": 1, "seed": 0, "rank": 0, "world_size": 1}
        make_batch = ViewChooser(pairs, **settings)
        stream = TrainingStream(pairs, make_batch=make_batch, with_images=True, **counts)
        return list(islice(training_batches(stream, num_workers=num_workers), 3))

    expected = batches(tiny_data / "images", tiny_data / "latents", 0)
    got = batches(f"{url}/images", f"{url}/latents", num_workers)
    for batch, other in zip(got, expected, strict=True):
        assert all(batch[name].equal(other[name]) for name in other)


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("faults", [[], ["503"], ["cut"], ["cut", "503", "cut", "503"]])
def test_a_shard_is_read_in_blocks_each_again_after_a_fault(
    server: Server, tiny_data: Path, monkeypatch: Any, faults: list[str], has_ranges: bool
):
    """A server without ranges sends the whole file to the first request."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 20480)
    server.faults = ["503" if not has_ranges else fault for fault in faults]
    server.has_ranges = has_ranges
    shard = ShardIndex.read(tiny_data / "images", ShardInfo).shards("train")[2]
    assert 20480 < shard.num_bytes < 40960
    records = list(read_shard(f"{server.url}/images/{shard.name}", shard))
    assert records == list(read_shard(tiny_data / "images" / shard.name, shard))
    assert server.faults == []
    assert len(server.requests) == len(faults) + (2 if has_ranges else 1)


def test_a_connection_that_stays_broken_is_no_damage(server: Server, tiny_data: Path):
    server.faults = ["503"] * 100
    shard = ShardIndex.read(tiny_data / "images", ShardInfo).shards("train")[0]
    with pytest.raises(OSError, match=r"train-00000\.tar: 5 attempts failed; the last error .*503"):
        list(read_shard(f"{server.url}/images/{shard.name}", shard))
    assert len(server.requests) == 5


def test_each_fault_of_remote_shards_has_its_message(server: Server):
    folder, url = server.folder / "images", f"{server.url}/images"
    name = "train-00001.tar"
    whole = (folder / name).read_bytes()

    (folder / name).write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=rf"^{url}/{name}: truncated or overwritten: .*copy"):
        ShardIndex.read(url, ShardInfo)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"^{url}/{name}: missing, though index.json lists it"):
        ShardIndex.read(url, ShardInfo)
    (folder / name).write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(ValueError, match=rf"^{url}/{name}: damaged .*sha256.*copy"):
        list(read_split(url, "train"))
    (folder / "index.json").write_text('{"splits": {"train": [')
    with pytest.raises(ValueError, match=rf"^{url}/index.json: damaged .*Invalid JSON"):
        ShardIndex.read(url, ShardInfo)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match=rf"^{url}/index.json: missing; copy the whole folder"):
        ShardIndex.read(url, ShardInfo)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(protocol: str, package: str, monkeypatch: pytest.MonkeyPatch):
    """And an unknown protocol."""
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    message = rf"^{protocol}://b/x/index\.json: .*`pip install {package}`"
    with pytest.raises(ValueError, match=message):
        ShardIndex.read(f"{protocol}://b/x", ShardInfo)
    with pytest.raises(ValueError, match=r"^ftq://b/x: Protocol not known: ftq; use a URL .* s3:"):
        size_of("ftq://b/x")
