"""`python -m bench NAME`: measurements, each a table on stdout. Ratios, not seconds, are quoted.

flops: what each switch of the method costs, counted without weights and without GPU
experiments: DVC's experiments as a Markdown table
"""

import sys

from bench import experiments, flops

BENCHES = {"flops": flops.main, "experiments": experiments.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python -m bench {{{','.join(BENCHES)}}} [arguments]")
    BENCHES[sys.argv[1]](sys.argv[2:])
