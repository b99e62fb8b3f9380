"""Generation as a pipeline of diffusers, with the usual arguments, callback and progress bar."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from contradiff.base.vae import downsampling_factor
from contradiff.config import Precision
from contradiff.generation.class_table import ClassTable
from contradiff.generation.sampling import denoise
from contradiff.generation.solvers import Scheduler
from contradiff.method.model import ContraDiffModel
from contradiff.pretrained.images import Images, as_list, clean_batch, name_of
from contradiff.types import Latents, Tokens

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

Generators = torch.Generator | list[torch.Generator]


class TrainedModules(ModelMixin):
    """The network and the class table, in a form that diffusers can move between devices."""

    def __init__(self, network: ContraDiffModel, class_table: ClassTable | None) -> None:
        super().__init__()
        self.network, self.class_table = network, class_table


class ContraDiffPipeline(DiffusionPipeline):
    """Images from noise, from an image, or from a class; another solver goes into `scheduler`.

    pipe = ContraDiffPipeline.from_pretrained("user/name")
    pipe("a.jpg", guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images[0]
    """

    trained: TrainedModules
    vae: Any
    scheduler: Scheduler

    def __init__(
        self,
        *,
        trained: TrainedModules,
        vae: "AutoencoderKL",
        scheduler: Scheduler,
        image_size: int = 256,
        latents_dtype: str = "float16",
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.register_modules(trained=trained, vae=vae, scheduler=scheduler)
        self.register_to_config(
            image_size=image_size, latents_dtype=latents_dtype, precision=precision
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=downsampling_factor(vae))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "ContraDiffPipeline":
        """Load an export; further arguments are those of `ContraDiff.from_pretrained`."""
        from contradiff.pretrained.model import ContraDiff

        place = pretrained_model_name_or_path
        return ContraDiff.from_pretrained(place, dtype=torch_dtype, **kwargs).pipeline()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raise ValueError: an export has another form than diffusers' pipelines."""
        raise ValueError("ContraDiffPipeline: use contradiff.export, which writes a whole model")

    @torch.no_grad()
    def __call__(
        self,
        image: Images | None = None,
        class_labels: int | Sequence[int] | None = None,
        *,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: Generators | None = None,
        latents: Latents | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate `batch_size` images for each image or class, or without a condition.

        The noise is drawn from `generator`, unless `latents` are given. `output_type` is "pil",
        "np", "pt" or "latent". The callback gets the pipeline, the step's number, its timestep and
        {"latents": ...}, and returns a dict with the latents to go on with, or {}.

        Raises ValueError if an image cannot be read, if classes were not trained, or if arguments
        contradict each other.
        """
        device = self._execution_device
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"callback_on_step_end_tensor_inputs: only latents, not {unknown}")
        tokens, null_tokens = self._encode(image, class_labels, batch_size, generator)
        if image is None and class_labels is None and guidance_scale != 1:
            raise ValueError("guidance_scale: without image or class_labels it must be 1")
        side = self.config["image_size"] // downsampling_factor(self.vae)
        shape = (len(tokens), self.trained.network.unet.config["in_channels"], side, side)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device)
        elif latents.shape != shape:
            raise ValueError(f"latents: the shape is {tuple(latents.shape)}; it must be {shape}")
        self.scheduler.set_timesteps(num_inference_steps)
        with self.progress_bar(total=num_inference_steps) as bar:  # pyright: ignore[reportCallIssue]

            def on_step(number: int, timestep: Tensor, latents: Latents) -> Latents:
                bar.update()
                if callback_on_step_end is None:
                    return latents
                shown = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                return callback_on_step_end(self, number, timestep, shown).get("latents", latents)

            clean = denoise(
                self.trained.network,
                self.scheduler,
                latents.to(device, torch.float32),
                tokens,
                null_tokens=null_tokens if guidance_scale != 1 else None,
                guidance=guidance_scale,
                precision=self.config["precision"],
                on_step=on_step,
            )
        images: Any = clean
        if output_type != "latent":
            decoded = self.vae.decode(clean / self.vae.config["scaling_factor"]).sample
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _encode(
        self,
        image: Images | None,
        class_labels: int | Sequence[int] | None,
        batch_size: int,
        generator: Generators | None,
    ) -> tuple[Tokens, Tokens]:
        """Return the tokens and the null tokens of every image to make."""
        device, config = self._execution_device, self.config
        if class_labels is not None:
            if image is not None:
                raise ValueError("class_labels: give either image or class_labels, not both")
            table = self.trained.class_table
            if table is None:
                raise ValueError("class_labels: this model has no table of classes with LoRA")
            chosen = torch.tensor(as_list(class_labels), device=device).repeat_interleave(
                batch_size
            )
            null = torch.full_like(chosen, table.null_label)
            return table(chosen), table(null)
        network, items = self.trained.network, [] if image is None else as_list(image)
        number = batch_size * max(1, len(items))
        shape = (number, *network.conditioner.shape)
        null = network.encode_condition(randn_tensor(shape, generator=generator, device=device))
        if image is None:
            return null, null
        names = [name_of(item, place) for place, item in enumerate(items)]
        size = config["image_size"]
        batch = clean_batch(self.vae, items, names, size=size, dtype=config["latents_dtype"])
        shown = network.conditioner.choose(pixels=batch.pixels, latents=batch.latents)
        tokens = network.encode_condition(shown.to(device))
        return tokens.repeat_interleave(batch_size, dim=0), null
