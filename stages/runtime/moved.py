"""Lets MLflow find its files again after the project's folder was moved or copied.

MLflow writes full paths into mlflow.db. `make install` and `make ui` call this module, as
`python -m stages.runtime.moved` in the project's folder; each stage that uses MLflow does the same.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

PLACES = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri")),
    *(("logged_models", "artifact_location"), ("model_versions", "source")),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's database that have addresses of files."""


def mend_store(root: Path) -> int:
    """Make the addresses in `root`/mlflow.db lead into `root`/mlruns; return how many were wrong.

    An address changes only if its folder is in `root`/mlruns, so a store that keeps its files
    elsewhere stays as it is.
    """
    path, folder = root.resolve() / "mlflow.db", root.resolve() / "mlruns"
    if not path.is_file() or not folder.is_dir():
        return 0
    count = 0
    with closing(sqlite3.connect(path, timeout=60)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        if "experiments" not in tables:
            return 0
        rows = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
        for name, old in rows:
            new = (folder / name).as_uri()
            is_ours = str(old).endswith(f"/mlruns/{quote(name)}") and (folder / name).is_dir()
            if old == new or not is_ours:
                continue
            for table, column in PLACES:
                if table in tables:
                    # The names come from PLACES; the addresses are arguments.
                    change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                    where = f"WHERE substr({column}, 1, ?) = ?"
                    given = (new, len(old) + 1, len(old), old)
                    count += database.execute(change + where, given).rowcount
    return count


if __name__ == "__main__":
    if number := mend_store(Path()):
        print(f"mlflow.db: {number} addresses of files lead into this folder now")
