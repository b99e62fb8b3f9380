"""Set-up of all tests: checked array shapes, one thread, no network, no live tracking store."""

import os

# Before anything imports torch or numpy. One thread: tests are small, and CI has two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# A test must not write to the user's tracking server, nor take itself for a stage of a real run.
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
    os.environ.pop(_name, None)

from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and types of `contradiff` are enforced here, and only here: a run pays nothing for them.
# The hook stays for the whole session, so it is installed without its context manager.
install_import_hook("contradiff", "beartype.beartype")

# The same examples on every run, and no deadline: no test here asserts on time.
settings.register_profile("contradiff", deadline=None, derandomize=True, database=None)
settings.load_profile("contradiff")
