"""Print what a run will cost: hours, disk, memory of a GPU, and what bounds each stage.

    python -m stages.plan --preset paper --gpus 4
    python -m stages.plan --gpus 1 --gpu rtx4090 --images 20000

The exit code is 1 if something does not fit. No stage of the pipeline runs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from contradiff.planning.costs import GPUS
from contradiff.planning.plan import plan_of


def main(arguments: Sequence[str]) -> int:
    text = __doc__ or ""
    parser = argparse.ArgumentParser(
        prog="python -m stages.plan",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", help="name of a file in presets/; left out: params.yaml")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs (default: 1)")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="their kind (default: h100)")
    parser.add_argument("--gpu-memory", type=float, help="memory of a GPU in GB, if it is another")
    parser.add_argument("--images", type=int, help="number of training images, if not counted")
    given = parser.parse_args(arguments)
    path = Path(f"presets/{given.preset}.yaml" if given.preset else "params.yaml")
    try:
        found = plan_of(
            path,
            num_gpus=given.gpus,
            gpu=given.gpu,
            gpu_memory=given.gpu_memory,
            num_images=given.images,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{path}\n\n{found}")
    return 1 if found.misfits else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
