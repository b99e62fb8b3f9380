from pathlib import Path

import pytest

from tests.studies.project import make_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a study of two λ and two seeds; it is the present folder."""
    folder = make_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `dvc` that only notes its arguments, in this file."""
    notes, program = tmp_path / "calls", tmp_path / "bin/dvc"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python"))
    return notes
