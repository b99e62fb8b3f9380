"""`python -m bench NAME`: measurements, each a table on stdout. Ratios, not seconds, are quoted.

flops: what each switch of the method costs, counted on the meta device (no weights, no GPU)
loading: images a second of the training loader, beside torchvision's and webdataset's
"""

import sys

from bench import flops, loading

BENCHES = {"flops": flops.main, "loading": loading.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python -m bench {{{','.join(BENCHES)}}} [arguments]")
    BENCHES[sys.argv[1]](sys.argv[2:])
