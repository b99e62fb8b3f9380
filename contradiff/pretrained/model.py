"""The class `ContraDiff` of users: a trained model that gives features, classes and images."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from contradiff.base.loading import load_scheduler, load_vae
from contradiff.base.vae import decode_latents
from contradiff.config import Precision, parse_exactly
from contradiff.features.batches import CleanBatch
from contradiff.features.cache import MAPS
from contradiff.features.models import DiffusionFeatures, image_noise
from contradiff.features.write_cache import to_stored
from contradiff.generation.class_table import ClassTable, choose_denoiser
from contradiff.generation.conditions import Conditioning, class_conditional, unconditional
from contradiff.generation.params import GenerateParams, Solver
from contradiff.generation.sampling import generate
from contradiff.generation.solvers import load_solver
from contradiff.method.lora import cast_frozen_weights
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import add_noise
from contradiff.method.params import NUM_LEVELS
from contradiff.method.unet import block_channels
from contradiff.pretrained import hub
from contradiff.pretrained.folder import Parts, read_export_config, read_folder
from contradiff.pretrained.images import (
    ImageLike,
    Images,
    as_list,
    clean_batch,
    name_of,
    square,
    to_pil,
)
from contradiff.pretrained.project import read_project
from contradiff.types import Tokens

if TYPE_CHECKING:
    from contradiff.pretrained.pipeline import ContraDiffPipeline

PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Classification:
    """The most probable classes of an image, and their probabilities in falling order."""

    name: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class ContraDiff:
    """A trained model: features, classes and generated images, as the pipeline computes them.

    Images are paths, PIL images, or arrays or tensors of uint8, of any size; `ImageLike` says more.
    An image's index (its place in the call, or `indices`) seeds its noise, as in the pipeline.

        model = ContraDiff.from_pretrained("user/name")
        h = model.features(["a.jpg", "b.jpg"])
        print(model.classify("a.jpg")[0].classes)
        model.generate(4, condition="a.jpg", guidance=2.0, seed=0)[0].save("sample.png")

    The network inside is `contradiff.method.model.ContraDiffModel`.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config, self._base = parts.config, parts.base
        self.config, self.device = config, _choose_device(device)
        if dtype not in (None, *PRECISIONS):
            raise ValueError(f"dtype: {dtype} is not possible; use torch.float32 or torch.bfloat16")
        changes = {} if dtype is None else {"precision": PRECISIONS[dtype]}
        self._generate = config.generate.model_copy(update=changes)
        self._more = {name: module.to(self.device) for name, module in parts.more.items()}
        self._vae = load_vae(parts.base).to(self.device)  # pyright: ignore[reportArgumentType]
        self._features = DiffusionFeatures(
            parts.network.to(self.device),
            config.features.model_copy(update=changes),
            config.seed,
            self.device,
        )
        self._denoisers: dict[bool, ContraDiffModel] = {}

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        base: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ContraDiff":
        """Load an exported model from a folder, or from an id on the hub at a `revision`.

        `base` is the folder of the base model, if it is neither in the export nor on the hub. The
        default `device` is CUDA if there is a GPU. `dtype` is that of the UNet's computation:
        torch.float32 or torch.bfloat16; the default is what the model was measured with.

        Raises ValueError if the model is missing, damaged, of a newer form or of another base, and
        ConnectionError if the hub fails.
        """
        _choose_device(device)
        folder = hub.find_model(path_or_id, revision=revision)
        found = hub.find_base(folder, read_export_config(folder).base, given=base)
        return cls(read_folder(folder, found), device=device, dtype=dtype)

    @classmethod
    def from_project(
        cls,
        root: str | Path = ".",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ContraDiff":
        """Load what the pipeline in the folder `root` has trained.

        Raises ValueError if a result is missing, or was not made with the present params.yaml.
        """
        return cls(read_project(Path(root)), device=device, dtype=dtype)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes. A class is also known by its place in this list."""
        return self.config.class_names

    @property
    def width(self) -> int:
        """The number of values of a feature."""
        if self.config.features.pool == "attention":
            return self.config.head.width
        model = self._features.model
        return NUM_LEVELS * block_channels(model.unet, model.block)

    def prepare(self, image: ImageLike, *, name: str = "image") -> Tensor:
        """Return an image as the model sees it: its central square, as uint8 (3, size, size).

        Raises ValueError, with `name`, if the image cannot be read.
        """
        return square(image, size=self.config.image_size, name=name)

    def features(
        self,
        images: Images,
        *,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> Float[Tensor, "num_images width"]:
        """Compute the feature h of each image, as float32 on the CPU.

        `on_progress` gets the size of each finished batch. Raises ValueError if an image cannot be
        read.
        """
        name = self._features.columns[0].name
        found: list[Tensor] = []
        for batch in self._batches(images, indices, batch_size):
            found.append(self._rounded(self._features(batch)[name], batch))
            on_progress(len(batch.keys))
        return torch.cat(found)

    def classify(
        self,
        images: Images,
        *,
        top: int = 5,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> list[Classification]:
        """Return the `top` classes of each image, by the probe that gave the main score.

        Raises ValueError if the model has no probe, or if an image cannot be read.
        """
        if self.config.probe is None:
            why = "it was trained on images without labels"
            raise ValueError(f"this model has no probe, because {why}; it has features only")
        probe, classes = self._more[self.config.probe], self.class_names
        is_attentive = "attention" in self.config.parts[self.config.probe]
        model = replace(self._features, keep_maps=is_attentive)
        name = MAPS if is_attentive else model.columns[0].name
        found: list[Classification] = []
        for batch in self._batches(images, indices, batch_size):
            with torch.inference_mode():
                features = self._rounded(model(batch)[name], batch).to(self.device)
                probabilities = probe(features).softmax(dim=1).cpu()
            best = probabilities.topk(min(top, len(classes)), dim=1)
            for key, values, labels in zip(batch.keys, best.values, best.indices, strict=True):
                names = tuple(classes[label] for label in labels.tolist())
                found.append(Classification(key, names, tuple(values.tolist())))
            on_progress(len(batch.keys))
        return found

    def noised(
        self,
        images: Images,
        *,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> list[list[Image.Image]]:
        """Show what the head reads: each image with three amounts of noise, the noisiest first.

        The VAE decodes the latents that the UNet gets. An image's `info` has its timestep.

        Raises ValueError if the features are made by DDIM inversion, or if an image cannot be read.
        """
        params, schedule = self.config.features, self._features.model.schedule
        if params.noising != "direct":
            raise ValueError("features.noising: ddim_chain adds no noise; it inverts the image")
        timesteps, found = sorted(params.timesteps, reverse=True), list[list[Image.Image]]()
        for batch in self._batches(images, indices, batch_size):
            latents, steps = batch.latents, torch.tensor(timesteps)
            shape = (NUM_LEVELS, *latents.shape[1:])
            noise = image_noise(shape, batch.indices, seed=self.config.seed)
            noisy = add_noise(
                latents.repeat_interleave(NUM_LEVELS, dim=0),
                noise.flatten(0, 1),
                steps.repeat(len(latents)),
                schedule.alphas_cumprod.cpu(),
            )
            pixels = decode_latents(self._vae, noisy.to(self.device)).cpu()
            for levels in pixels.unflatten(0, (-1, NUM_LEVELS)):
                found.append(list(map(to_pil, levels)))
                for image, timestep in zip(found[-1], timesteps, strict=True):
                    image.info = {"timestep": str(timestep)}
        return found

    def generate(
        self,
        n: int,
        *,
        condition: Images | int | Sequence[int] | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        first_index: int = 0,
        num_inference_steps: int | None = None,
        solver: Solver | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[int], object] = lambda _: None,
    ) -> list[Image.Image]:
        """Generate n images, whose indices begin with `first_index`.

        `condition` is None (unconditional), an image, a class (its name or number), or a list of
        images or classes, which take turns. Other defaults are the settings that the model was
        measured with; `guidance` is 1 without a condition. An image depends only on the seed, its
        index, its condition and these settings, except for rounding. Its `info` has these names.

        Raises ValueError if a condition is unknown, or if a setting is impossible.
        """
        config, settings = self.config, self._generate
        seed = config.seed if seed is None else seed
        given = [] if condition is None else as_list(condition)
        labels = [label for item in given if (label := self._label_of(item)) is not None]
        kind = "noise" if not given else "class" if labels else "image"
        if labels and len(labels) < len(given):
            raise ValueError("condition: give either images or classes, not both")
        scale = (settings.guidance if given else 1.0) if guidance is None else guidance
        asked: dict[str, Any] = {"num_samples": n, "condition": kind, "guidance": scale}
        asked |= {"num_inference_steps": num_inference_steps, "solver": solver}
        asked |= {"batch_size": batch_size, "guidance_interval": None if scale != 1 else [0.0, 1.0]}
        changes = {key: value for key, value in asked.items() if value is not None}
        params = parse_exactly(GenerateParams, settings.model_dump() | changes, source="generate")
        network = self._denoiser(lora=config.class_lora if labels else True)
        num_steps = params.num_inference_steps
        batches = generate(
            network,
            self._vae,
            load_solver(self._base, solver=params.solver, num_inference_steps=num_steps),
            range(first_index, first_index + n),
            self._conditioning(network, given, labels, seed=seed),
            params=params,
            image_size=config.image_size,
            seed=seed,
        )
        names = [self.class_names[label] for label in labels] or list(map(name_of, given, count()))
        images: list[Image.Image] = []
        for batch in batches:
            for pixels in batch:
                index = first_index + len(images)
                image = to_pil(pixels)
                image.info = {"name": f"{index:06d}", "seed": str(seed)}
                if given:
                    image.info["condition"] = names[index % len(given)]
                images.append(image)
            on_progress(len(batch))
        return images

    def pipeline(self) -> "ContraDiffPipeline":
        """Return the generator as a pipeline of diffusers, with the base's DDIM scheduler.

        It has classes only if they were trained with LoRA, which is merged into its UNet.
        """
        from contradiff.pretrained.pipeline import ContraDiffPipeline, TrainedModules

        settings, config = self._generate, self.config
        steps, table = settings.num_inference_steps, self._more.get("class_table")
        assert table is None or isinstance(table, ClassTable)
        return ContraDiffPipeline(
            trained=TrainedModules(self._denoiser(lora=True), table if config.class_lora else None),
            vae=self._vae,
            scheduler=load_scheduler(self._base, num_inference_steps=steps),
            image_size=config.image_size,
            latents_dtype=config.latents_dtype,
            precision=settings.precision,
        )

    def _label_of(self, item: Any) -> int | None:
        """Return the number of a class, or None if `item` is an image."""
        names = self.class_names
        if isinstance(item, str) and item in names:
            item = names.index(item)
        elif isinstance(item, str) and not Path(item).is_file():
            raise ValueError(f"condition: {item!r} is neither a class of this model nor a file")
        if not isinstance(item, int):
            return None
        if "class_table" not in self._more:
            raise ValueError("condition: this model has no table of classes; give an image")
        if not 0 <= item < len(names):
            raise ValueError(f"condition: there is no class {item}; the last is {len(names) - 1}")
        return item

    def _conditioning(
        self, network: ContraDiffModel, given: list[Any], labels: list[int], *, seed: int
    ) -> Conditioning:
        """Give sample i the condition number i, as the pipeline does; after the last, the first."""
        if labels:
            table = self._more["class_table"]
            assert isinstance(table, ClassTable)
            chosen, encode, conditioning = torch.tensor(labels), table, class_conditional(table)
        else:
            conditioning, encode = unconditional(network, seed=seed), network.encode_condition
            if not given:
                return conditioning
            batches = list(self._batches(given, None, None))
            latents, pixels = (
                torch.cat([getattr(b, n) for b in batches]) for n in ("latents", "pixels")
            )
            chosen = network.conditioner.choose(pixels=pixels, latents=latents)

        @torch.inference_mode()
        def tokens(indices: range) -> Tokens:
            return encode(chosen[[index % len(chosen) for index in indices]].to(self.device))

        return replace(conditioning, tokens=tokens)

    def _denoiser(self, *, lora: bool) -> ContraDiffModel:
        """Return a copy of the network for generation, with LoRA merged or switched off."""
        if lora not in self._denoisers:
            network = copy.deepcopy(self._features.model)
            choose_denoiser(network, lora=lora)
            if self._generate.precision == "bf16":
                cast_frozen_weights(network.unet)
            self._denoisers = {lora: network}  # one at a time, to save memory
        return self._denoisers[lora]

    def _rounded(self, features: Tensor, batch: CleanBatch) -> Tensor:
        """Round features as the pipeline stores them, and return them as float32 on the CPU."""
        dtype = self.config.features.dtype
        return to_stored(features, dtype=dtype, keys=batch.keys, name="h").float()

    def _batches(
        self, images: Images, indices: Sequence[int] | None, batch_size: int | None
    ) -> Iterator[CleanBatch]:
        """Encode images as the pipeline does, with latents rounded as they are stored."""
        items = as_list(images)
        if not items:
            raise ValueError("there are no images")
        numbers = range(len(items)) if indices is None else indices
        if len(numbers) != len(items):
            raise ValueError(f"indices: {len(numbers)} indices for {len(items)} images")
        names = [name_of(item, number) for number, item in enumerate(items)]
        side, dtype = self.config.image_size, self.config.latents_dtype
        size = batch_size or self.config.features.batch_size
        for first in range(0, len(items), size):
            rows = slice(first, first + size)
            batch = clean_batch(self._vae, items[rows], names[rows], size=side, dtype=dtype)
            yield replace(batch, indices=tuple(numbers[rows]))


def _choose_device(device: str | torch.device | None) -> torch.device:
    num_gpus = torch.cuda.device_count()
    try:
        chosen = torch.device(device or ("cuda" if num_gpus else "cpu"))
    except RuntimeError as error:
        raise ValueError(f'device: {device} is unknown; use "cpu", "cuda" or "cuda:1"') from error
    if chosen.type == "cuda" and (chosen.index or 0) >= num_gpus:
        found = f"only {num_gpus}" if num_gpus else "no GPU"
        raise ValueError(f'device: {chosen} is asked for, but torch finds {found}; use "cpu"')
    return chosen
