"""`python -m bench NAME`: measurements, each a table on stdout. Ratios, not seconds, are quoted.

fid: our scores beside pytorch-fid, clean-fid and torch-fidelity: agreement and time
flops: what each switch of the method costs, counted on the meta device (no weights, no GPU)
"""

import sys

from bench import fid, flops

BENCHES = {"fid": fid.main, "flops": flops.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python -m bench {{{','.join(BENCHES)}}} [arguments]")
    BENCHES[sys.argv[1]](sys.argv[2:])
