"""What every stage shares, and the only place that knows DVC and MLflow.

`run` reads the parameters, reports and fails clearly; `launch` starts several processes; `work_dir`
keeps unfinished work; `progress` shows how far it is; `tracking` and `experiments` write to MLflow.
May import `contradiff.config` and `contradiff.files`. Nothing here changes a result: DVC does not
hash it. Importing the package sets up threads and memory, which torch reads when it is loaded:
stages import it first.
"""

import ctypes
import os
import sys

# How long OpenMP's threads spin before they sleep. By default they starve other processes; with
# OMP_WAIT_POLICY=PASSIVE two threads are no faster than one on small tensors (docs/log.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# glibc gives large buffers back at once, and a training asks for the same ones at every step:
# keeping up to 2 GiB saves a tenth of its CPU time.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    _libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
