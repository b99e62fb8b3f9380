"""What users copy: the workflow of GitHub, whose steps run here, and the devcontainer."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW: dict[str, Any] = YAML(typ="safe").load(ROOT / "docs/ci/smoke.yml")
JOBS = WORKFLOW["jobs"]
MAKE = """#!/bin/sh
mkdir -p metrics
seed=$(sed -n 's/^seed: //p' params.yaml)
echo "{\\"top1\\": $(cat score), \\"fid\\": $seed.5}" > metrics/headline.json
"""
PIPELINE = "stages:\n  s: {cmd: 'true', metrics: [metrics/headline.json: {cache: false}]}\n"


def test_only_the_job_without_the_pull_request_s_code_can_write():
    assert WORKFLOW["permissions"] == {}
    assert JOBS["run"]["permissions"] == {"contents": "read"}
    assert JOBS["comment"]["permissions"] == {"pull-requests": "write"}
    steps = JOBS["comment"]["steps"]
    assert not [step for step in steps if "checkout" in step.get("uses", "")]
    # An expression in a shell script would let the name of a branch become code.
    assert not [
        step for job in JOBS.values() for step in job["steps"] if "${{" in step.get("run", "")
    ]


def test_its_steps_compare_the_scores_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`make repro` is replaced; git and DVC are real. The score falls from 0.75 to 0.5."""
    project, programs = tmp_path / "project", tmp_path / "programs"
    for folder in (project / "presets", project / ".venv/bin", programs):
        folder.mkdir(parents=True)
    for name, text in (("make", MAKE), ("gh", '#!/bin/sh\necho "$@" > "$GH_CALLED"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (project / ".venv/bin/dvc").symlink_to(
        subprocess.check_output(["sh", "-c", "command -v dvc"], text=True).strip()
    )
    (project / "presets/smoke.yaml").write_text("seed: 7\n")
    (project / "params.yaml").write_text("seed: 0\n")
    (project / "dvc.yaml").write_text(PIPELINE)
    (project / ".gitignore").write_text("/.venv/\n")
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GH_CALLED", str(tmp_path / "called"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    monkeypatch.setenv("NUMBER", "12")
    monkeypatch.setenv("REPOSITORY", "someone/contradiff")

    def shell(script: str) -> str:
        done = subprocess.run(  # GitHub starts bash in this way
            ["bash", "-eo", "pipefail", "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    shell("git init -q && dvc init -q && git config user.name a && git config user.email b")
    for name, score in (("BASE", "0.75"), ("HEAD", "0.5")):
        (project / "score").write_text(score)
        shell("git add -A && git commit -qm commit")
        monkeypatch.setenv(name, shell("git rev-parse HEAD"))
    for job in JOBS.values():
        for step in job["steps"]:
            if "run" in step:
                shell(step["run"])
    rows = [line.split() for line in (tmp_path / "summary").read_text().splitlines()]
    cells = [row[3::2] for row in rows if "metrics/headline.json" in row]
    assert cells == [["fid", "7.5", "7.5", "0.0"], ["top1", "0.75", "0.5", "-0.25"]]
    called = (tmp_path / "called").read_text()
    assert called.startswith("pr comment 12 --repo someone/contradiff --body-file scores.md")


def test_the_devcontainer_sets_the_project_up():
    content = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert content["postCreateCommand"] == "make install"
    assert int(content["image"].rpartition("3.")[2]) >= 11
