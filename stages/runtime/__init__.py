"""What every stage shares, and the only place that knows DVC and MLflow.

`run` reads the parameters, reports and fails clearly; `launch` starts several processes; `work_dir`
keeps unfinished work; `training` and `tracking` write to MLflow. May import `contradiff.config`,
`.files`, `.processes` and `.types`, so nothing here changes a result, and no stage in dvc.yaml
depends on it. Stages import it before torch, which reads the settings below.
"""

import ctypes
import os
import sys

# How long OpenMP's threads spin before they sleep. The default starves other processes, and with
# OMP_WAIT_POLICY=PASSIVE two threads are no faster than one on small tensors (docs/log.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# glibc returns large buffers at once, and every training step asks for the same ones again:
# keeping up to 2 GiB saves a tenth of its CPU time.
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    _libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
