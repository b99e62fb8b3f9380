"""How good frozen features are: classifiers (Table 2), transfer (Table 6), separability (Fig. 3).

`probe_grid` runs `probe` on every cached feature in every setting. `finetuning` trains the model
itself. `params` has sections of params.yaml. This package imports neither `generation` nor
`evaluation`.
"""
