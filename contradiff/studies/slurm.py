"""SLURM: one job for each member.

A job works in its own clone below .work/slurm, since two experiments cannot run in one folder at
the same time. The clone shares DVC's cache, MLflow's store and the notes of times with the project,
and gives its experiment back by `dvc exp push`. A job that ended early goes on in its clone if you
submit it again.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from contradiff.studies.members import Member
from contradiff.studies.queue import command_of

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --output={root}/.work/slurm/%x-%j.log
# Add what your cluster needs, such as:
#   --partition=gpu --gres=gpu:1 --cpus-per-task=8 --mem=64G --time=24:00:00
set -eu
project={root}
clone=$project/.work/slurm/{name}
export PATH=$project/.venv/bin:$PATH
export MLFLOW_TRACKING_URI=${{MLFLOW_TRACKING_URI:-sqlite:///$project/mlflow.db}}
if [ ! -e "$clone/.git" ]; then
    rm -rf "$clone"
    git clone -q "$project" "$clone"
fi
cd "$clone"
export PYTHONPATH=$clone
git config user.name "$(git -C "$project" config user.name)"
git config user.email "$(git -C "$project" config user.email)"
dvc cache dir --local "$project/.dvc/cache"
dvc remote modify --local store url "$project/artifacts"
cp "$project/params.yaml" params.yaml
mkdir -p data .work "$project/data/raw" "$project/.work/times"
ln -sfn "$project/data/raw" data/raw
ln -sfn "$project/.work/times" .work/times
dvc pull -q models/tiny || true
{command}
dvc exp push -q --no-cache "$project" {name}
cd "$project"
rm -rf "$clone"
"""


def script_of(member: Member, targets: Sequence[str], *, root: Path) -> str:
    """Return the sbatch script of a member."""
    command = shlex.join(command_of(member, targets))
    return SCRIPT.format(name=member.name, root=shlex.quote(str(root)), command=command)
