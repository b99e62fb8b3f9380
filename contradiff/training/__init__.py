"""Training: one loop that all trainers share, and pretraining.

Read `loop` (calls a trainer's step function), `state` (saved to resume a stopped training), `optim`
(AdamW, learning rates, weight average), `recipe` (parameters of pretraining), `batch` (views and
random numbers of a step) and `pretraining`, in this order. `flops` counts a step's FLOPs.
"""
