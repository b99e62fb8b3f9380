"""What frozen features are good for: classifiers, transfer, and how well classes separate.

`accuracy` counts, `probe` trains linear and attentive classifiers (Table 2), `probe_grid` does so
for every cached feature and setting. `transfer` is few-shot classification of another data set
(Table 6), for which `finetuning` trains the model itself. `separability` is Fig. 3 in numbers. This
room imports features, training, sources, data, method and base; generation and evaluation not.
"""
