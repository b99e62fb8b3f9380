"""Python loads this file at its start, if its folder is in PYTHONPATH. It makes a stage fail.

A write of a stage ends with a rename: of a temporary file or folder to its final name. MLflow
writes in transactions of its database, and copies files. Python announces renames and copies to
audit hooks, and SQLite its statements, so a hook can note all writes of a stage, or kill the stage
at one of them. The stages need no code for this.

FAULTS_WRITES=<file>    note the names of all writes in the file, as "<stage> <name>"
FAULTS_KILL="<stage> <name> <n> <when> <whom>"    SIGKILL at the n-th write of this name
    <when>: before (nothing is written yet), middle (half of the file is written, or the transaction
            is not committed) or after
    <whom>: stage, dvc (its parent, alone) or group (both)
FAULTS_PID=<file>       note the stage's process id in the file before the kill
"""

import os
import re
import shutil
import signal
import sqlite3
import sqlite3.dbapi2
import sys
from pathlib import Path
from typing import Any

PART = re.compile(r"\.([^/]+)\.\d+\.part(?=/|$)")
CHANGE = re.compile(r"(?:INSERT INTO|UPDATE|DELETE FROM)\s+\"?(\w+)")
DATABASE = "mlflow.db"


class Hook:
    """Watches the writes of this process, which runs `stage`."""

    def __init__(self, stage: str) -> None:
        self.stage, self.root = stage, Path.cwd()
        self.sqlite_connect = sqlite3.dbapi2.connect
        self.writes = os.environ.get("FAULTS_WRITES")
        self.wanted = os.environ.get("FAULTS_KILL", "").split(" ")
        self.seen = 0
        self.is_busy = False
        self.changed = self.committed = ""

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Serve as an audit hook."""
        if self.is_busy:
            return
        self.is_busy = True
        if self.committed:
            self.after_commit()
        if event == "os.rename" and PART.search(os.fsdecode(arguments[0])):
            self.replace(Path(os.fsdecode(arguments[0])), Path(os.fsdecode(arguments[1])))
        elif event == "shutil.copyfile" and "/mlruns/" in str(arguments[1]):
            self.copy(Path(arguments[0]), Path(arguments[1]))
        self.is_busy = False

    def connect(self, database: Any, *arguments: Any, **named: Any) -> sqlite3.Connection:
        """Do what sqlite3.connect does, and watch the statements of MLflow's database."""
        connection = self.sqlite_connect(database, *arguments, **named)
        if Path(os.fsdecode(database)).name == DATABASE:
            connection.set_trace_callback(self.statement)
        return connection

    def replace(self, part: Path, final: Path) -> None:
        """Meet the end of `replace_file` or `replace_dir`."""
        full = final.resolve()
        if not full.is_relative_to(self.root) or not (when := self.reach(self.name_of(full))):
            return
        if self.wanted[4] != "dvc":
            if when == "after":
                part.rename(final)
            else:
                spoil(part, when)
        self.kill()

    def name_of(self, full: Path) -> str:
        """Return the name of a write in the project, with final names of the folders around it."""
        return PART.sub(r"\1", str(full.relative_to(self.root)))

    def copy(self, source: Path, target: Path) -> None:
        """Meet a file that MLflow copies to a run."""
        if when := self.reach(f"mlruns/{target.name}"):
            if when != "before":
                shutil.copyfile(source, target)
            if when == "middle":
                os.truncate(target, target.stat().st_size // 2)
            self.kill()

    def statement(self, text: str) -> None:
        """Meet a statement of MLflow's database. A write is named by the first table it changes."""
        if self.committed:
            self.after_commit()
        if not self.changed and (found := CHANGE.match(text)):
            self.changed = f"{DATABASE}:{found[1]}"
            if self.reach(self.changed) == "before":
                self.kill()
        elif self.changed and text.startswith("COMMIT"):
            if self.is_wanted(self.changed) == "middle":
                self.kill()
            self.changed, self.committed = "", self.changed

    def after_commit(self) -> None:
        """Meet the first event after a commit."""
        name, self.committed = self.committed, ""
        if self.is_wanted(name) == "after":
            self.kill()

    def reach(self, name: str) -> str:
        """Note a write; return when it is to be killed, or "" if it is not the wanted one."""
        if self.writes:
            with Path(self.writes).open("a", encoding="utf-8") as file:
                file.write(f"{self.stage} {name}\n")
        self.seen += self.wanted[:2] == [self.stage, name]
        return self.is_wanted(name)

    def is_wanted(self, name: str) -> str:
        """Return when this write is to be killed, or "" if it is not the wanted one."""
        is_here = self.wanted[:2] == [self.stage, name] and self.wanted[2] == str(self.seen)
        return self.wanted[3] if is_here else ""

    def kill(self) -> None:
        """Send SIGKILL. After the death of DVC alone, this process goes on."""
        whom, self.wanted = self.wanted[4], []
        if pid := os.environ.get("FAULTS_PID"):
            Path(pid).write_text(str(os.getpid()))
        if whom == "stage":
            os.kill(os.getpid(), signal.SIGKILL)
        # The matrix has started DVC as the leader of the process group.
        (os.killpg if whom == "group" else os.kill)(os.getpgid(0), signal.SIGKILL)


def spoil(part: Path, when: str) -> None:
    """Leave of a temporary file or folder what a kill would leave at this time."""
    files = sorted(f for f in part.rglob("*") if f.is_file()) if part.is_dir() else [part]
    if when == "before":
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    elif files:
        shutil.copyfile(files[-1], half := files[-1].with_name("half"))  # it may be a link
        os.truncate(half, half.stat().st_size // 2)
        half.replace(files[-1])


def install(stage: str) -> None:
    """Watch this process, which runs `stage`, until its end."""
    hook = Hook(stage)
    sys.addaudithook(hook.watch)
    sqlite3.dbapi2.connect = hook.connect  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "sitecustomize" and "-m" in sys.orig_argv:
    install(sys.orig_argv[sys.orig_argv.index("-m") + 1].removeprefix("stages."))
