"""What frozen features are good for: classifiers (Table 2), transfer (Table 6), Fig. 3.

`probe_grid` runs `probe` on every cached feature and setting; `finetuning` trains the model itself.
This room imports features, training, sources, data, method and base; generation and evaluation not.
"""
