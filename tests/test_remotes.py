"""Experiments travel through git and DVC's store: to a folder, to a server by SSH, and to S3.

The servers run on this machine. A test is skipped if its programs are missing. To have them all:
`apt-get install openssh-server openssh-client`, and `pip install 'dvc[ssh,s3]' 'moto[server]'`.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.test_makefile import call, commit_all
from tests.test_makefile import project as project  # noqa: PLC0414  # a fixture

NEEDS = {"folder": (), "ssh": ("sshd", "ssh-keygen"), "s3": ("moto_server",)}
SSHD = """
HostKey {home}/host_key
AuthorizedKeysFile {home}/.ssh/id_ed25519.pub
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""
CLIENT = """
Host 127.0.0.1
  Port {port}
  IdentityFile {home}/.ssh/id_ed25519
  StrictHostKeyChecking no
  UserKnownHostsFile {home}/.ssh/known_hosts
"""


@contextmanager
def serving(port: int, *command: str) -> Generator[None]:
    """Run a server, and wait until it answers."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(300):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None, server.stderr and server.stderr.read()
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()


@contextmanager
def ssh_server(home: Path, port: int) -> Generator[None]:
    (home / ".ssh").mkdir(mode=0o700)
    for key in ("host_key", ".ssh/id_ed25519"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / key))
    (home / ".ssh/config").write_text(CLIENT.format(home=home, port=port))
    keys = (home / "host_key.pub").read_text().split()[:2]
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(keys)}\n")
    (home / "sshd_config").write_text(SSHD.format(home=home))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    program = shutil.which("sshd") or ""
    options = ("-p", str(port), "-o", "ListenAddress=127.0.0.1", "-f", str(home / "sshd_config"))
    with serving(port, program, "-D", "-e", *options):
        yield


@contextmanager
def remotes(kind: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[list[str]]:
    """Yield the address of a git remote, that of DVC's store, and options of the latter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bare, store = home / "bare.git", home / "store"
    if kind == "folder":
        yield [str(bare), str(store)]
    elif kind == "ssh":
        # ssh does not look at HOME. DVC does, and it would ignore the command in GIT_SSH_COMMAND.
        call("git", "config", "--global", "core.sshCommand", f"ssh -F {home}/.ssh/config")
        server = f"ssh://{getpass.getuser()}@127.0.0.1:{port}"
        with ssh_server(home, port):
            yield [f"{server}{bare}", f"{server}{store}", "keyfile", f"{home}/.ssh/id_ed25519"]
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "of this test")
        address = f"http://127.0.0.1:{port}"
        with serving(port, "moto_server", "-H", "127.0.0.1", "-p", str(port)):
            bucket = urllib.request.Request(f"{address}/bucket", method="PUT")
            urllib.request.urlopen(bucket).close()
            yield [str(bare), "s3://bucket/store", "endpointurl", address]


@pytest.mark.slow
@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("kind", list(NEEDS))
def test_a_colleague_gets_an_experiment(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if missing := [name for name in NEEDS[kind] if shutil.which(name) is None]:
        pytest.skip(f"{' and '.join(missing)} must be installed (see the top of this file)")
    call("git", "init", "-q")
    if kind != "folder" and f"\t{kind} (" not in call("dvc", "version"):
        pytest.skip(f"type `pip install 'dvc[{kind}]'` to test this remote")
    for name in ("user.name", "user.email"):
        call("git", "config", "--global", name, "a@b.c")
    with remotes(kind, tmp_path, monkeypatch) as (repository, store, *options):
        call("git", "init", "-q", "--bare", str(tmp_path / "bare.git"))
        call("dvc", "remote", "add", "--force", "store", store)
        if options:
            call("dvc", "remote", "modify", "store", *options)
        commit_all()
        call("git", "remote", "add", "origin", repository)
        call("git", "push", "-q", "origin", "HEAD:main")
        call("dvc", "exp", "run", "-n", "mine", "-S", "seed=1")
        call("dvc", "exp", "push", "origin", "mine")

        call("git", "clone", "-q", "-b", "main", repository, str(tmp_path / "colleague"))
        monkeypatch.chdir(tmp_path / "colleague")
        assert "mine" in call("dvc", "exp", "list", "origin")
        call("dvc", "exp", "pull", "origin", "mine")
        call("dvc", "exp", "apply", "mine")
        assert Path("build/out").read_text() == "seed: 1\n"
        call("dvc", "exp", "branch", "mine", "from-mine")
        assert call("git", "show", "from-mine:params.yaml") == "seed: 1\n"
        call("git", "push", "-q", "origin", "from-mine")
