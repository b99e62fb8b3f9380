"""Upload and download, with a local stand-in for the Hugging Face hub."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from contradiff import export
from contradiff.base.config import BaseParams, check_base, fetch_from_hub
from contradiff.base.loading import load_unet
from contradiff.base.weights import check_values, check_weights
from contradiff.pretrained import hub
from contradiff.pretrained.model import ContraDiff

COMMIT = "c" * 40


class StandIn(BaseHTTPRequestHandler):
    """The few answers of the hub that an upload and a download need; files are in memory."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {"url": f"http://{self.headers['Host']}/user/name"}
        if self.path.endswith("/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": f["path"], **regular} for f in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer |= {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{answer['url']}/commit/{COMMIT}",
            }
        self.answer(json.dumps(answer).encode())

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            files = self.files.items()
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files]
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/user/name") and path.endswith(("/main", COMMIT)):
            self.answer(json.dumps({"id": "user/name", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/user/name/resolve/{COMMIT}/"):
            self.answer(self.files[path.partition(f"{COMMIT}/")[2]])
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Start the stand-in, and let huggingface_hub use it; the files on it."""
    StandIn.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    url = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield StandIn.files
    server.shutdown()


def test_a_model_goes_up_and_comes_down(project: Path, files: dict[str, bytes], tmp_path: Path):
    commit = export(tmp_path / "own", root=project, with_base=True, push_to="user/name")
    assert str(commit).endswith(f"/user/name/commit/{COMMIT}")
    own = {p.relative_to(tmp_path / "own").as_posix(): p for p in (tmp_path / "own").rglob("*")}
    assert files == {name: path.read_bytes() for name, path in own.items() if path.is_file()}
    assert b'from_pretrained("user/name")' in files["README.md"]
    files["program.py"] = b"raise SystemExit"  # is not downloaded
    for revision in (None, COMMIT):
        model = ContraDiff.from_pretrained("user/name", revision=revision, device="cpu")
        assert model.class_names == ["a", "b", "c"]
    assert not list((tmp_path / "cache").rglob("program.py"))


def test_a_base_comes_from_the_hub_at_its_commit(
    project: Path, files: dict[str, bytes], tmp_path: Path
):
    base = (project / "build/base").resolve()
    files |= {p.relative_to(base).as_posix(): p.read_bytes() for p in base.rglob("*.*")}
    reference = hub.BaseReference(path="user/name", revision=COMMIT, sha256={})
    found = hub.find_base(tmp_path, reference, given=None)
    assert (found / "unet/config.json").read_bytes() == (base / "unet/config.json").read_bytes()


@pytest.mark.parametrize("has_all", [True, False])
def test_a_base_with_weights_in_several_files_comes_from_the_hub(
    project: Path, files: dict[str, bytes], tmp_path: Path, *, has_all: bool
):
    source, large = project / "build/base", tmp_path / "large"
    shutil.copytree(source, large)
    shutil.rmtree(large / "unet")
    whole = load_unet(source)
    whole.save_pretrained(large / "unet", max_shard_size="50KB")
    parts = sorted((large / "unet").glob("*-of-*.safetensors"))
    assert len(parts) > 1
    if not has_all:
        parts[-1].unlink()
    files |= {p.relative_to(large).as_posix(): p.read_bytes() for p in large.rglob("*.*")}
    files["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"] = b"is not fetched"
    params = BaseParams(source="hub", path="user/name", revision=COMMIT)
    fetch_from_hub(params, tmp_path / "base", weights=True)
    check_base(tmp_path / "base")
    if not has_all:
        with pytest.raises(ValueError, match=rf"^base\.path: .*{parts[-1].name} is missing"):
            check_weights(tmp_path / "base")
        return
    check_weights(tmp_path / "base")
    check_values(tmp_path / "base")
    fetched = load_unet(tmp_path / "base").state_dict()
    assert all(torch.equal(fetched[name], tensor) for name, tensor in whole.state_dict().items())
    assert not list((tmp_path / "base/unet").glob("*fp16*"))


def test_faults_are_said(files: dict[str, bytes], tmp_path: Path):
    assert files == {}
    for path, fault in (("nowhere", "no such folder"), ("a/b/c", "no such folder")):
        with pytest.raises(ValueError, match=fault):
            hub.find_model(path, revision=None)
    with pytest.raises(ValueError, match="only an id on the hub has a revision"):
        hub.find_model(tmp_path, revision=COMMIT)
    with pytest.raises(ConnectionError, match="user/other: could not be fetched"):
        hub.find_model("user/other", revision=None)
