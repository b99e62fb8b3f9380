"""Packages are pinned; `.ci/audit` fails for a known vulnerability, or says that none answered."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOOD: dict[str, Any] = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "good", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ([GOOD, BAD], 1, "bad 2.0: CVE-1; fixed in 2.1\naudit: 1 vulnerabilities are known in 2"),
        ([GOOD, UNKNOWN], 0, "audit: 0 vulnerabilities are known in 1 packages (osv)\n"),
        ([UNKNOWN], 0, "audit: not done: osv knows none of 1 packages; pypi knows none of 1 pack"),
        (None, 0, "audit: not done: osv cannot be asked; pypi cannot be asked\n"),
    ],
)
def test_audit(tmp_path: Path, answer: list[Any] | None, code: int, said: str):
    """With a stand-in for uv, which runs pip-audit."""
    output = "" if answer is None else json.dumps({"dependencies": answer})
    (tmp_path / "uv").write_text(f"#!/bin/sh\necho '{output}'\nexit 1\n")
    (tmp_path / "uv").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, ROOT / ".ci/audit"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.startswith(said)


def test_every_package_is_pinned_by_version_and_hash():
    packages = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    assert len(packages) > 100
    for package in packages:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==\S+ ", package), package
        assert re.search(r"--hash=sha256:[0-9a-f]{64}$", package), package
