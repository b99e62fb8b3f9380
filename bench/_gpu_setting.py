"""What the rows of `bench gpu` are about: random models, and what may make them faster."""

import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import flops
from bench._copies import ROOT
from bench._rig import Rig
from contradiff.base.config import SHIPPED_CONFIGS, downsampling_of, read_config
from contradiff.base.loading import NoiseSchedule, load_scheduler
from contradiff.config import Precision, parse, read_params
from contradiff.method.lora import add_lora, cast_frozen_weights, merge_lora
from contradiff.method.model import ContraDiffModel
from contradiff.method.objective import TrainingBatch
from contradiff.toy.base_recipe import build_scheduler, build_unet, build_vae
from contradiff.training.pretraining import set_up
from contradiff.training.recipe import Checkpointing


@dataclass(frozen=True)
class Sizes:
    """How many images a row has at once, and more."""

    preset: str = "presets/paper.yaml"
    matmul: int = 8192
    training: int = 64
    checkpointed: int = 128
    sampling: tuple[int, ...] = (1, 16, 64)
    steps: int = 5
    features: int = 128
    vae: int = 64
    inception: int = 250


TINY = Sizes("presets/tiny.yaml", 64, 4, 6, (2,), 2, 4, 2, 1)


@dataclass
class Setting:
    """A preset, and its base with random weights; of the base only the configuration is needed."""

    rig: Rig
    sizes: Sizes
    folder: Path

    def __post_init__(self) -> None:
        content = read_params(ROOT / self.sizes.preset)
        self.params = parse(flops.Params, content, source=self.sizes.preset)
        self.image_size: int = content["data"]["image_size"]
        self.side = self.image_size // downsampling_of(self.folder)

    @cached_property
    def unet(self) -> Any:
        """The base's UNet in float32; rows take copies."""
        from diffusers import UNet2DConditionModel

        return self._random(UNet2DConditionModel, "unet")

    def vae(self) -> Any:
        """The base's autoencoder in float32."""
        from diffusers import AutoencoderKL

        return self._random(AutoencoderKL, "vae")

    def _random(self, kind: Any, component: str) -> Any:
        torch.manual_seed(0)
        with self.rig.device:
            module = kind.from_config(read_config(self.folder, component))
        return module.requires_grad_(requires_grad=False).eval()

    def _model(self, *, std_of_lora: float) -> ContraDiffModel:
        schedule, factor = NoiseSchedule.of_base(self.folder), downsampling_of(self.folder)
        unet = deepcopy(self.unet)
        torch.manual_seed(1)
        with self.rig.device:
            sizes = {"image_size": self.image_size, "downsampling": factor}
            model = ContraDiffModel(unet, schedule, self.params, **sizes)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=std_of_lora if "lora_" in name else 0.02)
        return model

    def model_to_train(
        self, *, gradient_checkpointing: Checkpointing = "none", precision: Precision = "bf16"
    ) -> ContraDiffModel:
        """A model as training sets it up; what starts at zero is random: gradients see it all."""
        model, options = self._model(std_of_lora=0.02), {"precision": precision}
        set_up(
            model, loss=self.params.loss, gradient_checkpointing=gradient_checkpointing, **options
        )
        return model

    def model_to_read(
        self, *, merged: bool = False, precision: Precision = "bf16"
    ) -> ContraDiffModel:
        """A model for sampling and features; its LoRA is zero: it computes what `unet` does."""
        model = self._model(std_of_lora=0.0)
        if merged:
            merge_lora(model.unet)
        if precision == "bf16":
            cast_frozen_weights(model.unet)
        return model.eval()

    def batch(self, model: ContraDiffModel, num_images: int, *, seed: int) -> TrainingBatch:
        """A batch of noise."""
        torch.manual_seed(seed)
        with self.rig.device:
            batch = flops.empty_batch(model, self.params, self.folder, num_images=num_images)
        for tensor in (batch.latents, batch.conditions, batch.condition_noise, batch.noise):
            tensor.normal_()
        batch.timesteps.random_(0, model.schedule.num_train_timesteps)
        batch.dropped.zero_()
        return batch

    def autocast(self, precision: Precision = "bf16") -> torch.autocast:
        """The project's own way to compute in bfloat16."""
        kind, is_half = self.rig.device.type, precision == "bf16"
        return torch.autocast(kind, torch.bfloat16, enabled=is_half)

    def tokens(self, num_images: int) -> Tensor:
        """As many tokens as the preset's conditioner gives."""
        number = (self.image_size // self.params.conditioner.patch_size) ** 2
        width = self.unet.config["cross_attention_dim"]
        return torch.randn(num_images, number, width, device=self.rig.device)

    def latents(self, num_images: int) -> Tensor:
        """Pure noise."""
        return torch.randn(num_images, 4, self.side, self.side, device=self.rig.device)

    def pixels(self, num_images: int) -> Tensor:
        """Noise in the shape of images."""
        shape = num_images, 3, self.image_size, self.image_size
        return torch.rand(shape, device=self.rig.device) * 2 - 1

    def lora_step(self, num_images: int) -> Callable[[], Tensor]:
        """The step of diffusers' examples: frozen weights in bf16, LoRA in float32, autocast."""
        unet = deepcopy(self.unet).to(torch.bfloat16).train()
        add_lora(unet, self.params.lora)
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        scheduler = load_scheduler(self.folder, num_inference_steps=50)
        latents, tokens = self.latents(num_images), self.tokens(num_images).bfloat16()

        def step() -> Tensor:
            noise = torch.randn_like(latents)
            steps = torch.randint(1000, (num_images,), device=latents.device)
            noisy = scheduler.add_noise(latents, noise, steps)  # pyright: ignore[reportArgumentType]
            with self.autocast():
                predicted = unet(noisy, steps, tokens, return_dict=False)[0]
                loss = F.mse_loss(predicted.float(), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step


@contextmanager
def open_setting(rig: Rig, sizes: Sizes) -> Generator[Setting]:
    """Stable Diffusion v1.4's configuration, or for TINY that of the tiny base."""
    if sizes != TINY:
        yield Setting(rig, sizes, SHIPPED_CONFIGS["CompVis/stable-diffusion-v1-4"])
        return
    builders = {"vae": build_vae, "unet": build_unet, "scheduler": build_scheduler}
    with tempfile.TemporaryDirectory() as name:
        for component, build in builders.items():
            build().save_config(Path(name, component))
        yield Setting(rig, sizes, Path(name))


def in_graph(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Capture a function's kernels in a CUDA graph at the first call for each shape."""
    graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def call(*tensors: Tensor) -> Tensor:
        key = tuple(tensor.shape for tensor in tensors)
        if key not in graphs:
            given, stream = [tensor.clone() for tensor in tensors], torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    function(*given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = function(*given)
            graphs[key] = graph, given, result
        graph, given, result = graphs[key]
        for mine, theirs in zip(given, tensors, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return result.clone()

    return call
