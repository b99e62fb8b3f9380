"""A small project in git with a pipeline of four stages, and experiments as DVC commits them."""

import hashlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

PARAMS: dict[str, Any] = {
    "seed": 0,
    "loss": {"lambda": 0.1},
    "probe": {"lr": 0.3},
    "generate": {"num_samples": 1000},
    "runtime": {"device": "cpu"},
}
PIPELINE = """
stages:
  validate:
    cmd: 'true'
    deps: [code]
    params: [params.yaml: ]
    outs: [build/validated]
  shard: {cmd: 'true', deps: [build/validated, code/data], params: [seed], outs: [build/shards]}
  pretrain:
    cmd: 'true'
    deps: [build/shards, code/method]
    params: [seed, loss]
    outs: [build/pretrain]
    plots: [metrics/pretrain.csv: {cache: false}]
  probe:
    cmd: 'true'
    deps: [build/pretrain, code/probe.py]
    params: [seed, probe]
    metrics: [metrics/probe.json: {cache: false}]
  score:
    cmd: 'true'
    deps: [build/pretrain, code/score.py]
    params: [seed, generate]
    metrics: [metrics/score.json: {cache: false}]
"""
STUDY = """
question: Does λ matter?
paper: Table 8.
differences: [Other data.]
seeds: [0, 1]
targets: []
fixed: {}
columns:
  top1: {title: top-1, key: probe.top1, format: ".1%", better: up}
  fid: {title: FID, key: score.fid, format: ".2f", better: down}
rows:
- {title: another method, paper: {top1: "70.0"}}
- {title: λ = 0, set: {loss.lambda: 0}, paper: {top1: "78.0"}}
- {title: λ = 0.1, set: {loss.lambda: 0.1}}
baseline: λ = 0
curve: [top1, fid]
bubble: null
samples: false
"""
CODE = {"code/data/a.py": "1", "code/method/b.py": "2", "code/method/in/c.py": "3"}
CODE |= {"code/probe.py": "4", "code/score.py": "5"}


def git(folder: Path, *arguments: str, stdin: bytes = b"") -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x", *arguments]
    done = subprocess.run(command, cwd=folder, input=stdin, capture_output=True, check=True)
    return done.stdout.decode().strip()


def make_project(folder: Path) -> Path:
    files = {**CODE, "dvc.yaml": PIPELINE, "studies/lambdas.yaml": STUDY}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "params.yaml").write_bytes(yaml(PARAMS))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "begin")
    return folder


def params(**changes: Any) -> dict[str, Any]:
    """Return PARAMS with changes such as seed=1 or loss={"lambda": 0}."""
    return {**PARAMS, **changes}


def add_experiment(
    folder: Path,
    name: str,
    content: dict[str, Any],
    *,
    top1: float = 0.8,
    fid: float = 10.0,
    reference: str = "r",
    lock: dict[str, Any] | None = None,
    time: int = 1_700_000_000,
    code: str = "code",
) -> str:
    """Commit an experiment as `dvc exp run` does; `lock` overrides values of its dvc.lock."""
    score = {"fid": fid, "reference_sha256": f"{reference}{content['seed']}", "extractor": "c"}
    curve = "step,loss,reconstruction,contrastive\n"
    curve += "".join(f"{step},{1 / step},{1 / step},\n" for step in range(1, 65))
    files = {
        "params.yaml": yaml(content),
        "metrics/probe.json": json.dumps({"probe": {"top1": top1, "total": 9}}).encode(),
        "metrics/score.json": json.dumps({"score": score}).encode(),
        "metrics/pretrain.csv": curve.encode(),
    }
    md5 = {path: hashlib.md5(text).hexdigest() for path, text in files.items()}
    locked: dict[str, Any] = {}
    for stage, deps, sections, outs in (
        ("shard", ["code/data"], ["seed"], ["build/shards"]),
        ("pretrain", ["build/shards", "code/method"], ["seed", "loss"], ["build/pretrain"]),
        ("probe", ["build/pretrain", "code/probe.py"], ["seed", "probe"], ["metrics/probe.json"]),
        (
            "score",
            ["build/pretrain", "code/score.py"],
            ["seed", "generate"],
            ["metrics/score.json"],
        ),
    ):
        own = {path: md5.get(path, path if path.startswith("build") else code) for path in deps}
        locked[stage] = {
            "deps": [{"path": path, "md5": own[path]} for path in deps],
            "params": {"params.yaml": {key: content[key] for key in sections}},
            "outs": [{"path": path, "md5": md5.get(path, path)} for path in outs],
        }
    for path, value in (lock or {}).items():
        stage, kind, *rest = path.split("/")
        if value is None:
            del locked[stage]
        elif kind == "params":
            locked[stage]["params"]["params.yaml"][rest[0]] = value
        else:
            locked[stage][kind][int(rest[0])]["md5"] = value
    files["dvc.lock"] = yaml({"schema": "2.0", "stages": locked})
    head = git(folder, "rev-parse", "HEAD")
    reference = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
    stream = f"commit {reference}\ncommitter x <x> {time} +0000\ndata 1\nx\nfrom {head}\n".encode()
    for path, text in files.items():
        stream += f"M 100644 inline {path}\ndata {len(text)}\n".encode() + text + b"\n"
    git(folder, "fast-import", "--quiet", "--force", stdin=stream)
    return git(folder, "rev-parse", reference)


def yaml(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    YAML().dump(content, buffer)
    return buffer.getvalue()
