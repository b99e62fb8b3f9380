"""What a run will cost: hours, disk, and memory of a GPU for every stage, and what bounds it.

Example:
    ```python
    content = read_params(Path("presets/paper.yaml"))
    params = parse(AllParams, content, source="presets/paper.yaml")
    four = Machine(num_gpus=4, gpu=GPUS["h100"])
    print(plan(params, four, ImageCounts.assumed(params), num_workers=8))
    ```
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from contradiff.base.config import SHIPPED_CONFIGS
from contradiff.config import parse, read_params
from contradiff.files import describe_bytes
from contradiff.planning import costs
from contradiff.planning.costs import GPUS, Gpu
from contradiff.rules import AllParams
from contradiff.sources.imagenet import scan_images
from contradiff.sources.listing import Listing

LATENT_BYTES, PNG_BYTES, MAPS_BYTES = 16_384, 120_000, 122_880
"""Bytes of a stored crop, of a sample, and of the maps that an attentive probe stores."""
BASE_BYTES, STATE_BYTES = 3.8e9, 1.1e9
"""Bytes of Stable Diffusion's UNet and VAE, and of the states of a training."""
TRANSFER_IMAGES = {"digits": (10, 1197), "cifar10": (10, 10_000), "cifar100": (100, 10_000)}
"""Source of the transfer set => its number of classes and of test images."""


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run. `gpu.memory_gb` is in units of 10^9 bytes."""

    num_gpus: int
    gpu: Gpu

    def hours(self, gflop: float, precision: str, *, num_gpus: int | None = None) -> float:
        """Return the hours for this work, shared by all GPUs unless `num_gpus` is given."""
        rate = self.gpu.bf16 if precision == "bf16" else self.gpu.fp32
        return gflop / (1e3 * rate * costs.EFFICIENCY * (num_gpus or self.num_gpus)) / 3600


@dataclass(frozen=True)
class ImageCounts:
    """How many images a run has, their size in bytes, and where these numbers come from."""

    train: int
    val: int
    classes: int
    num_bytes: float
    origin: str

    @property
    def total(self) -> int:
        """The images of both splits."""
        return self.train + self.val

    @classmethod
    def of_listing(cls, listing: Listing, *, origin: str) -> "ImageCounts":
        """Count the images of a source."""
        train, val = listing.splits["train"], listing.splits["val"]
        num_bytes = float(sum(file.num_bytes for file in (*train, *val)))
        return cls(len(train), len(val), len(listing.class_ids), num_bytes, origin)

    @classmethod
    def assumed(cls, params: AllParams, *, train: int | None = None) -> "ImageCounts":
        """Assume ImageNet-1K, or 10,000 images for class folders; `train` is another number."""
        is_imagenet = params.data.source != "imagefolder"
        few, many = (10_000, 1_000, 100), (1_281_167, 50_000, 1_000)
        number, val, classes = many if is_imagenet else few
        if train is not None:
            number, val = train, max(1, train // 10)
        origin = f"assumed: {number:,} training and {val:,} validation images of 110 kB"
        return cls(number, val, classes, 110_000.0 * (number + val), origin)


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage. `memory_gb` is the peak of one GPU, or None without a GPU."""

    stage: str
    hours: float
    num_bytes: float
    memory_gb: float | None
    bound: str


@dataclass(frozen=True)
class Plan:
    """The costs of all stages that take time, what does not fit, and what was assumed."""

    stages: tuple[StageCost, ...]
    misfits: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def hours(self) -> float:
        """The hours of all stages together."""
        return sum(cost.hours for cost in self.stages)

    def __str__(self) -> str:
        """Return a table for a terminal."""
        lines = [f"{'stage':16}{'hours':>9}{'disk':>12}{'a GPU':>10}  bound by"]
        for cost in self.stages:
            memory = "" if cost.memory_gb is None else f"{cost.memory_gb:.1f} GB"
            disk = describe_bytes(round(cost.num_bytes)) if cost.num_bytes else ""
            lines.append(f"{cost.stage:16}{cost.hours:>9.2f}{disk:>12}{memory:>10}  {cost.bound}")
        disk = describe_bytes(round(sum(cost.num_bytes for cost in self.stages)))
        most = max(cost.memory_gb or 0.0 for cost in self.stages)
        lines += [f"{'together':16}{self.hours:>9.2f}{disk:>12}{f'{most:.1f} GB':>10}", ""]
        lines += [f"Does not fit: {line}" for line in self.misfits] or ["Everything fits."]
        return "\n".join([*lines, "", "Assumed:", *(f"- {line}" for line in self.assumptions)])


def plan(params: AllParams, machine: Machine, images: ImageCounts, *, num_workers: int) -> Plan:
    """Compute what a run costs. Raises ValueError for a base or an image size without counts."""
    base, size = params.base.path, params.data.image_size
    if base not in SHIPPED_CONFIGS or size != costs.COUNTED_SIZE:
        known = f"{costs.COUNTED_BASE} at {costs.COUNTED_SIZE} pixels"
        raise ValueError(
            f"base.path, data.image_size: a plan knows the costs of {known} only, not of {base} at "
            f"{size}; `python -m bench flops params.yaml` counts a training step of any base (the "
            "embedded default takes 8 to 12 minutes on 2 idle CPU cores)"
        )
    planner = _Planner(params, machine, images, num_workers)
    gpu = f"{machine.num_gpus} x {machine.gpu.memory_gb:g} GB, {machine.gpu.bf16:g} TFLOP/s in bf16"
    assumptions = (f"{gpu}, {machine.gpu.fp32:g} in fp32", images.origin, *costs.NOT_MEASURED)
    return Plan(tuple(planner.stages()), tuple(planner.misfits()), assumptions)


def plan_of(
    path: Path,
    *,
    num_gpus: int = 1,
    gpu: str = "h100",
    gpu_memory: float | None = None,
    num_images: int | None = None,
) -> Plan:
    """Compute the plan of a parameter file; raises ValueError if it is wrong, or has no counts.

    The images are counted if their folder is there and `num_images` is None.
    """
    if num_gpus < 1 or (gpu_memory is not None and gpu_memory <= 0):
        raise ValueError("--gpus and --gpu-memory: type numbers above 0")
    if gpu not in GPUS:
        raise ValueError(f"--gpu: {gpu!r} is unknown; type one of: {', '.join(GPUS)}")
    content = read_params(path)
    params = parse(AllParams, content, source=str(path))
    card = GPUS[gpu] if gpu_memory is None else replace(GPUS[gpu], memory_gb=gpu_memory)
    root = Path(params.data.root)
    if num_images is None and params.data.source == "imagefolder" and root.is_dir():
        listing = scan_images(root).listing
        images = ImageCounts.of_listing(listing, origin=f"images counted in {root}")
    else:
        images = ImageCounts.assumed(params, train=num_images)
    num_workers = content["runtime"]["num_workers"]
    return plan(params, Machine(num_gpus, card), images, num_workers=num_workers)


def step_memory_gb(params: AllParams, *, num_gpus: int) -> float:
    """Return the peak memory of a training step on each GPU, with all that comes on top."""
    section, method = params.pretrain, costs.STEP_MEMORY[params.pretrain.gradient_checkpointing]
    images = -(-section.batch_size // section.grad_accumulation // num_gpus)
    decoded = images * params.loss.recon_passes
    in_parts = 0 < section.decode_batch_size < decoded
    image_mb = method.image_mb if in_parts else method.whole_mb
    image_mb += costs.TWO_CONDITIONS_MB * (params.conditioner.cond_view != "same")
    image_mb += costs.UP_BLOCK_MB * (params.head.block != "mid")
    parts_mb = method.per_latent_mb * section.decode_batch_size * in_parts
    counted = (images * image_mb + method.fixed_mb + parts_mb) / 1e3
    if section.precision == "fp32":
        counted *= 2  # all tensors are twice as large
    return counted + costs.OPTIMISER_GB + costs.GPU_RESERVE_GB


@dataclass(frozen=True)
class _Planner:
    params: AllParams
    machine: Machine
    images: ImageCounts
    num_workers: int

    def stages(self) -> Iterator[StageCost]:
        """Yield the cost of each stage, in the order of dvc.yaml."""
        params, images = self.params, self.images
        reading = images.num_bytes / costs.DISK_MB / 1e6 / 3600
        hours, bound = max(
            (self._decoding(images.total, num_gpus=1), "decoding (runtime.num_workers)"),
            (2 * reading, "disk"),
        )
        yield StageCost("shard", hours, images.num_bytes, None, bound)
        download = BASE_BYTES / costs.NETWORK_MB / 1e6 / 3600
        yield StageCost("base", download, BASE_BYTES, None, "network")
        yield self._latents()
        yield self._pretrain()
        if params.class_condition.epochs:
            work = 3 * costs.UNET.gflop * images.train * params.class_condition.epochs
            hours = self.machine.hours(work, params.pretrain.precision, num_gpus=1)
            yield StageCost("class_condition", hours, 0.0, 11.5 + costs.GPU_RESERVE_GB, "one GPU")
        yield from self._features()
        yield from self._classifiers()
        yield self._generate()
        yield from self._scores()

    def misfits(self) -> Iterator[str]:
        """Yield what does not fit a GPU, and the parameter that makes it fit."""
        memory = self.machine.gpu.memory_gb
        for cost in self.stages():
            if cost.memory_gb is None or cost.memory_gb <= memory:
                continue
            needs = f"needs {cost.memory_gb:.1f} GB of a GPU, which has {memory:g}"
            yield f"{cost.stage} {needs}; {self._remedy(cost)}"

    def _remedy(self, cost: StageCost) -> str:
        if cost.stage == "pretrain":
            return self._step_that_fits()
        keys = {"latents": "latents.batch_size", "generate": "generate.batch_size"}
        key = keys.get(cost.stage, "features.batch_size")
        section, name = key.split(".")
        size = getattr(getattr(self.params, section), name)
        each = {"latents": costs.VAE_ENCODE, "generate": costs.VAE_DECODE}
        fixed = each.get(cost.stage, costs.UNET).fixed_mb / 1e3 + costs.GPU_RESERVE_GB
        fixed += costs.UNET.fixed_mb / 1e3 * (cost.stage == "generate")
        assert cost.memory_gb is not None
        fitting = int(size * (self.machine.gpu.memory_gb - fixed) / (cost.memory_gb - fixed))
        if fitting < 1:
            return "use a larger card"
        return f"set {key} to {fitting} or less"

    def _step_that_fits(self) -> str:
        """Name the parameter that costs least work; a smaller batch is the last way."""
        memory, num_gpus = self.machine.gpu.memory_gb, self.machine.num_gpus
        section = self.params.pretrain
        ways: list[dict[str, int | str]] = []
        kinds = list(costs.STEP_MEMORY)
        for blocks in kinds[kinds.index(section.gradient_checkpointing) :]:
            sizes = {section.decode_batch_size, 32, 8}
            ordered = sorted(sizes, key=lambda size: (size != section.decode_batch_size, -size))
            ways += [{"gradient_checkpointing": blocks, "decode_batch_size": n} for n in ordered]
        batches = [section.batch_size >> shift for shift in range(1, 10)]
        ways += [{"gradient_checkpointing": "all", "batch_size": n} for n in batches if n >= 2]
        for changes in ways:
            changed = section.model_copy(update=changes)
            params = self.params.model_copy(update={"pretrain": changed})
            needed = step_memory_gb(params, num_gpus=num_gpus)
            if needed <= memory:
                shown = ", ".join(
                    f"pretrain.{name} to {value}"
                    for name, value in changes.items()
                    if value != getattr(section, name)
                )
                work = costs.STEP_MEMORY[changed.gradient_checkpointing].work
                return f"set {shown} ({needed:.1f} GB, {work:.2f} times the work)"
        return "use more or larger cards"

    def _decoding(self, num_images: int, *, num_gpus: int | None = None) -> float:
        workers = max(1, self.num_workers) * (num_gpus or self.machine.num_gpus)
        return num_images / (costs.WORKER_IMAGES * workers) / 3600

    def _slower(self, computing: float, num_images: int) -> tuple[float, str]:
        decoding = self._decoding(num_images)
        return max((computing, "GPU"), (decoding, "decoding (runtime.num_workers)"))

    def _latents(self) -> StageCost:
        section, images = self.params.latents, self.images
        number = images.train * section.views * (1 + section.flips) + images.val
        work = number * costs.VAE_ENCODE.gflop
        hours, bound = self._slower(self.machine.hours(work, "fp32"), images.total)
        num_bytes = float(number * LATENT_BYTES + 2048 * images.total)
        return StageCost(
            "latents", hours, num_bytes, _gb(costs.VAE_ENCODE, section.batch_size), bound
        )

    def _pretrain(self) -> StageCost:
        params, section = self.params, self.params.pretrain
        work = costs.STEP_GFLOP * costs.STEP_MEMORY[section.gradient_checkpointing].work
        work *= 1 + costs.RECON_PASS_WORK * (params.loss.recon_passes - 1)
        work *= costs.TWO_CONDITIONS_WORK if params.conditioner.cond_view != "same" else 1
        work *= costs.UP_BLOCK_STEP_WORK if params.head.block != "mid" else 1
        seen = self.images.train * section.epochs
        reads = seen if params.conditioner.input == "pixels" else 0
        hours, bound = self._slower(self.machine.hours(work * seen, section.precision), reads)
        memory = step_memory_gb(params, num_gpus=self.machine.num_gpus)
        return StageCost("pretrain", hours, STATE_BYTES, memory, bound)

    @property
    def _feature_work(self) -> float:
        """GFLOP of the feature of one image, at one list of three timesteps."""
        work = costs.FEATURE_GFLOP
        work *= costs.UP_BLOCK_FEATURE_WORK if self.params.head.block != "mid" else 1
        return work * (costs.CHAIN_WORK if self.params.features.noising == "ddim_chain" else 1)

    def _features(self) -> Iterator[StageCost]:
        params, section, total = self.params, self.params.features, self.images.total
        work = self._feature_work * total
        memory = _gb(costs.UNET, 3 * section.batch_size)
        width = params.head.width if section.pool == "attention" else 1280
        columns = len(section.triples) * (width + 1280 * len(section.more_blocks))
        stored = 8 + 2 * columns + MAPS_BYTES * (params.probe.head == "attentive")
        triples = work * len(section.triples)
        hours, bound = self._slower(self.machine.hours(triples, section.precision), total)
        yield StageCost("features", hours, float(stored * total), memory, bound)
        if params.probe.baselines != "none":
            stored = 12_288 + 40_960 * (params.probe.baselines == "all")
            hours, bound = self._slower(self.machine.hours(work, section.precision), total)
            yield StageCost("baselines", hours, float(stored * total), memory, bound)

    def _classifiers(self) -> Iterator[StageCost]:
        params, images = self.params, self.images
        heads = (1 + len(params.probe.lrs)) * (1 + len(params.probe.weight_decays)) + 1
        each = 2e-9 * params.head.width * images.classes
        sgd = self.machine.hours(
            3 * each * images.train * params.probe.epochs * heads, "fp32", num_gpus=1
        )
        passes = 2 * costs.LBFGS_PASSES * len(params.probe.cs)
        logistic = each * images.train * passes / costs.CPU_GFLOPS / 3600
        hours, bound = max((sgd, "one GPU"), (logistic, "CPU (probe.cs)"))
        yield StageCost("probe", hours, 0.0, None, bound)
        transfer = params.transfer
        classes, test = TRANSFER_IMAGES.get(params.transfer_data.source, (100, 10_000))
        shots = [500 if number == "full" else number for number in transfer.shots]
        number = test + classes * sum(shots) * transfer.num_splits
        work = number * (self._feature_work + costs.VAE_ENCODE.gflop)
        hours = self.machine.hours(work, "fp32")
        memory = _gb(costs.UNET, 3 * params.features.batch_size)
        yield StageCost("transfer", hours, 0.0, memory, "GPU")
        number = min(params.separability.num_images, images.val)
        work = 2.0 * number * self._feature_work + 2 * 10 * 250 * costs.UNET.gflop
        yield StageCost(
            "separability", self.machine.hours(work, "fp32", num_gpus=1), 0.0, memory, "one GPU"
        )

    def _generate(self) -> StageCost:
        section = self.params.generate
        low, high = section.guidance_interval
        passes = 1 + (high - low if section.guidance != 1 else 0)
        steps = section.num_inference_steps * passes * section.num_samples
        hours = self.machine.hours(steps * costs.UNET.gflop, section.precision)
        decoding = section.num_samples * costs.VAE_DECODE.gflop
        hours += self.machine.hours(decoding, "fp32")
        latents = section.batch_size * (2 if section.guidance != 1 else 1)
        in_unet = _gb(costs.UNET, latents) + costs.VAE_DECODE.fixed_mb / 1e3
        in_vae = _gb(costs.VAE_DECODE, section.batch_size) + costs.UNET.fixed_mb / 1e3
        memory = max(in_unet, in_vae)
        return StageCost("generate", hours, float(PNG_BYTES * section.num_samples), memory, "GPU")

    def _scores(self) -> Iterator[StageCost]:
        params, images = self.params, self.images
        if params.extractor.kind == "inception":
            work = costs.INCEPTION_GFLOP * len(params.extractor.resizers)
        else:
            work = costs.CLASSIFIER_GFLOP
            hours = self.machine.hours(
                3 * work * images.train * params.extractor.epochs, "fp32", num_gpus=1
            )
            yield StageCost("extractor", hours, 0.0, None, "one GPU")
        real = images.val if params.reference.split == "val" else images.train
        for stage, number in (("reference", real), ("score", params.generate.num_samples)):
            hours, bound = self._slower(self.machine.hours(work * number, "fp32"), number)
            yield StageCost(stage, hours, 0.0, None, bound)


def _gb(each: costs.Pass, batch_size: int) -> float:
    return (each.fixed_mb + each.image_mb * batch_size) / 1e3 + costs.GPU_RESERVE_GB
