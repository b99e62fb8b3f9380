"""What `bench gpu` proves beside its times: saved states, and processes that share a step."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bench import flops
from bench._gpu_setting import Setting, Sizes, open_setting
from bench._rig import Rig
from bench._turns import relative_error
from contradiff.method import objective as method
from contradiff.method.objective import TrainingBatch, TrainingStep
from contradiff.training.loop import train
from contradiff.training.optim import build_adamw
from contradiff.training.state import SavedState

NUM_IMAGES = 4
"""Of a step, and of each process."""


def check_resuming(setting: Setting) -> None:
    """Four bf16 steps, and two that are saved and taken up by new objects for two more."""

    def body() -> Mapping[str, Any]:
        # Or else some kernels, such as attention's backward pass, add in any order.
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        try:
            with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
                whole = _train(setting, Path(first), 4)
                _train(setting, Path(second), 2)
                resumed = _train(setting, Path(second), 4)
        finally:
            torch.use_deterministic_algorithms(mode=False)
        error = relative_error(resumed, whole)
        found = "equal, bit for bit" if torch.equal(whole, resumed) else f"error {error:.1e}"
        return {"note": f"four bf16 steps, and two resumed for two more: {found}", "error": error}

    setting.rig.attempt("resuming", body, needs=15)


def _train(setting: Setting, folder: Path, num_steps: int) -> Tensor:
    model = setting.model_to_train()
    step = flops.training_step(model, setting.params)
    options: Any = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}
    optimizer = build_adamw(model.named_parameters(), **options)
    tensors = {f"model.{name}": tensor for name, tensor in model.trained_state().items()}
    saved = SavedState(folder / "state.safetensors", tensors, every=2)

    def take_gradients(number: int) -> dict[str, Tensor]:
        batch = setting.batch(model, NUM_IMAGES, seed=number)
        with setting.autocast():
            losses = step(batch)
        losses["loss"].backward()
        return losses

    train(
        take_gradients,
        steps=range(saved.resume(optimizer), num_steps),
        optimizer=optimizer,
        lr=lambda _: 1e-4,
        lr_key="lr",
        is_reported=lambda _: False,
        on_step=lambda *_: None,
        clipped=model.parameters(),
        max_grad_norm=1.0,
        saved=saved,
    )
    return torch.cat([tensor.flatten().float() for tensor in tensors.values()])


def check_processes(setting: Setting, count: int) -> None:
    """Processes under DDP, over NCCL on GPUs, find the gradients that one finds alone."""

    def body() -> Mapping[str, Any]:
        model = setting.model_to_train()
        batch = setting.batch(model, NUM_IMAGES * count, seed=0)
        alone = _gradients(setting, flops.training_step(model, setting.params), batch)
        with tempfile.TemporaryDirectory() as folder:
            if count == 1:
                _process(0, 1, setting.sizes, folder, setting)
            else:
                given = count, setting.sizes, folder
                torch.multiprocessing.spawn(_process, given, nprocs=count)  # pyright: ignore[reportPrivateImportUsage]
            shared = torch.load(Path(folder, "gradients.pt"), weights_only=True)
        error, backend = relative_error(shared.to(alone), alone), _backend(setting.rig.device)
        note = f"{count} over {backend}: gradients as without, error {error:.1e}"
        return {"note": note, "error": error, "same": error <= 0.05}

    setting.rig.attempt("processes", body, needs=10)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _process(
    rank: int, count: int, sizes: Sizes, folder: str, setting: Setting | None = None
) -> None:
    """Compute the gradients of this process's rows; the first process writes the average."""
    if setting is None:
        device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        with open_setting(Rig(device, seconds=600.0, output=None), sizes) as own:
            _process(rank, count, sizes, folder, own)
        return
    device, meeting = setting.rig.device, f"file://{folder}/meeting"
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(_backend(device), init_method=meeting, rank=rank, world_size=count)
    try:
        # `gather_views` leaves it out where a process is alone.
        views = torch.randn(2, 3, 5, device=device, requires_grad=True)
        gathered = method.all_gather_single_autograd(views, 1, dist.group.WORLD)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(gathered.chunk(count, dim=1)[rank], views)
        gathered.sum().backward()
        torch.testing.assert_close(views.grad, torch.full_like(views, count))

        model = setting.model_to_train()
        batch = setting.batch(model, NUM_IMAGES * count, seed=0)
        mine = slice(rank * NUM_IMAGES, (rank + 1) * NUM_IMAGES)
        rows = {name: getattr(batch, name)[:, mine] for name in vars(batch)}
        rows |= {name: getattr(batch, name)[:, :, mine] for name in ("timesteps", "noise")}
        devices = [rank] if device.type == "cuda" else None
        step = flops.training_step(model, setting.params)
        shared = DistributedDataParallel(step, device_ids=devices)
        found = _gradients(setting, shared, TrainingBatch(**rows))
        if rank == 0:
            torch.save(found.cpu(), Path(folder, "gradients.pt"))
    finally:
        dist.destroy_process_group()


def _gradients(
    setting: Setting, step: TrainingStep | DistributedDataParallel, batch: TrainingBatch
) -> Tensor:
    with setting.autocast():
        loss = step(batch)["loss"]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None])
