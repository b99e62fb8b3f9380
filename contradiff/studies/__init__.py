"""Studies: tables of experiments by name, with seeds, beside the paper's printed values.

Start with `study` (what studies/*.yaml says) and `members` (the experiments that it needs).
`pipeline` reads dvc.yaml, `experiments` reads the results of DVC's experiments, and `queue` and
`slurm` run what is missing. `store` keeps results as text in git; `comparison`, `figures` and
`page` write docs/studies from the store alone. DVC and git are called as programs.
"""
