"""`python -m bench NAME`: measurements, each a table on stdout. Ratios, not seconds, are quoted.

flops: what each switch of the method costs, counted on the meta device (no weights, no GPU)
sampling: from noise to images, beside diffusers' own pipeline
"""

import sys

from bench import flops, sampling

BENCHES = {"flops": flops.main, "sampling": sampling.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python -m bench {{{','.join(BENCHES)}}} [arguments]")
    BENCHES[sys.argv[1]](sys.argv[2:])
