"""Several processes that train together."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

LIBRARIES = [
    "accelerate",
    "contradiff.training.pretraining",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
]


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a module with ranks 0 and 1, and the arguments.

    Both processes are forks of a server that has only imported the libraries, which takes longer
    than the tests' work. A fork of the test's own process could not train on a machine with a GPU.
    """
    multiprocessing.set_forkserver_preload(LIBRARIES)
    mp.start_processes(function, arguments, nprocs=2, start_method="forkserver")
