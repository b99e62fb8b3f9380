"""Training: one loop for every trainer, and pretraining.

In reading order: `loop` (a trainer is its set-up and a step function), `state` (what a stopped
training resumes from), `optim` (AdamW, learning rates, average of the weights); `recipe` (the
parameters of pretraining), `batch` (the views and the random numbers of a step), `pretraining`.
"""
