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

from contradiff.config import parse, read_params
from contradiff.files import describe_bytes
from contradiff.planning import costs
from contradiff.planning.costs import GPUS, Gpu, Precision, Work
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
class Time:
    """Hours, what bounds them, and the rates that they are computed from."""

    hours: float
    bound: str
    rates: tuple[str, ...]

    def __add__(self, other: "Time") -> "Time":
        """Return the time of two pieces of work, one after the other."""
        rates = tuple(dict.fromkeys((*self.rates, *other.rates)))
        return Time(self.hours + other.hours, self.bound, rates)


def slowest(*times: Time) -> Time:
    """Return the longest of several times that pass at once; the first, if they are equal."""
    return max(times, key=lambda time: time.hours)


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run. `gpu.memory_gb` is in units of 10^9 bytes."""

    num_gpus: int
    gpu: Gpu

    def time(
        self,
        work: Work,
        gflop: float,
        precision: Precision,
        *,
        alone: bool = False,
        compiled: bool = False,
    ) -> Time:
        """Return the time of this work, shared by all GPUs, or on one if `alone` is true."""
        rate, name = self.gpu.rate(work, precision, compiled=compiled)
        hours = gflop / (1e3 * rate * (1 if alone else self.num_gpus)) / 3600
        return Time(hours, "one GPU" if alone else "GPU", (name,))


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
        origin = f"images: {number:,} for training and {val:,} for validation, of 110 kB"
        return cls(number, val, classes, 110_000.0 * (number + val), origin)


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage. `memory_gb` is the peak of one GPU, or None without a GPU."""

    stage: str
    time: Time
    num_bytes: float
    memory_gb: float | None


@dataclass(frozen=True)
class Plan:
    """The costs of all stages that take time, what does not fit, and what was assumed."""

    stages: tuple[StageCost, ...]
    misfits: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def hours(self) -> float:
        """The hours of all stages together."""
        return sum(cost.time.hours for cost in self.stages)

    @property
    def rates(self) -> tuple[str, ...]:
        """The rates behind the hours, each once."""
        return tuple(dict.fromkeys(rate for cost in self.stages for rate in cost.time.rates))

    def __str__(self) -> str:
        """Return a table for a terminal; numbers in brackets lead to the rates below it."""
        lines = [f"{'stage':16}{'hours':>9}{'disk':>12}{'a GPU':>10}  bound by"]
        for cost in self.stages:
            memory = "" if cost.memory_gb is None else f"{cost.memory_gb:.1f} GB"
            disk = describe_bytes(round(cost.num_bytes)) if cost.num_bytes else ""
            numbers = "".join(f"[{self.rates.index(rate) + 1}]" for rate in cost.time.rates)
            row = f"{cost.stage:16}{cost.time.hours:>9.2f}{disk:>12}{memory:>10}"
            lines.append(f"{row}  {cost.time.bound} {numbers}")
        disk = describe_bytes(round(sum(cost.num_bytes for cost in self.stages)))
        most = max(cost.memory_gb or 0.0 for cost in self.stages)
        lines += [f"{'together':16}{self.hours:>9.2f}{disk:>12}{f'{most:.1f} GB':>10}", ""]
        lines += [f"Does not fit: {line}" for line in self.misfits] or ["Everything fits."]
        rates = [f"[{number}] {rate}" for number, rate in enumerate(self.rates, start=1)]
        assumed = [f"- {line}" for line in self.assumptions]
        return "\n".join([*lines, "", "Rates:", *rates, "", "Assumed:", *assumed])


def plan(
    params: AllParams,
    machine: Machine,
    images: ImageCounts,
    *,
    num_workers: int,
    compiled_stages: str = "none",
) -> Plan:
    """Compute what a run costs. Raises ValueError for a base or an image size without counts.

    `num_workers` is that of `runtime`, and `compiled_stages` is `runtime.compile`.
    """
    base, size = params.base.path, params.data.image_size
    if base not in costs.SIMILAR_BASES or size != costs.COUNTED_SIZE:
        known = f"{', '.join(costs.SIMILAR_BASES)} at {costs.COUNTED_SIZE} pixels"
        raise ValueError(
            f"base.path, data.image_size: a plan knows the costs of {known} only, not of {base} at "
            f"{size}; `python -m bench flops params.yaml` counts a training step of any base (the "
            "embedded default takes 4 to 9 minutes on 2 idle CPU cores)"
        )
    planner = _Planner(params, machine, images, num_workers, compiled_stages)
    gpus = f"{machine.num_gpus} x {machine.gpu.memory_gb:g} GB"
    reserve = f"{costs.GPU_RESERVE_GB} GB of each for CUDA, its workspace and gaps between tensors"
    assumptions = (f"GPUs: {gpus}; {reserve}", images.origin, *costs.SIMILAR_BASES[base])
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
    if gpu not in GPUS:
        raise ValueError(f"--gpu: {gpu!r} is unknown; type one of: {', '.join(GPUS)}")
    content = read_params(path)
    params = parse(AllParams, content, source=str(path))
    card = GPUS[gpu] if gpu_memory is None else replace(GPUS[gpu], memory_gb=gpu_memory)
    root = Path(params.data.root)
    if num_images is None and params.data.source == "imagefolder" and root.is_dir():
        listing = scan_images(root).listing
        images = ImageCounts.of_listing(listing, origin=f"images: as counted in {root}")
    else:
        images = ImageCounts.assumed(params, train=num_images)
    runtime = content["runtime"]
    workers, compiled = runtime["num_workers"], runtime.get("compile", "none")
    machine = Machine(num_gpus, card)
    return plan(params, machine, images, num_workers=workers, compiled_stages=compiled)


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
    compiled_stages: str

    def stages(self) -> Iterator[StageCost]:
        """Yield the cost of each stage, in the order of dvc.yaml."""
        params, images = self.params, self.images
        time = slowest(
            self._reading(images.total, num_gpus=1),
            _moving(2 * images.num_bytes, "disk", costs.DISK_MB),
        )
        yield StageCost("shard", time, images.num_bytes, None)
        yield StageCost("base", _moving(BASE_BYTES, "network", costs.NETWORK_MB), BASE_BYTES, None)
        yield self._latents()
        yield self._pretrain()
        if params.class_condition.epochs:
            work = 3 * costs.UNET.gflop * images.train * params.class_condition.epochs
            time = self.machine.time("training", work, params.pretrain.precision, alone=True)
            yield StageCost("class_condition", time, 0.0, 11.5 + costs.GPU_RESERVE_GB)
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

    def _reading(self, num_images: int, *, num_gpus: int | None = None) -> Time:
        """Return the time to decode images, by the workers of all GPUs or of `num_gpus`."""
        workers = max(1, self.num_workers) * (num_gpus or self.machine.num_gpus)
        per_second = costs.WORKER_IMAGES
        rate = f"reading: {per_second:g} images/s a worker (runtime.num_workers), stated"
        return Time(num_images / (per_second * workers) / 3600, "reading", (rate,))

    def _latents(self) -> StageCost:
        section, images = self.params.latents, self.images
        number = images.train * section.views * (1 + section.flips) + images.val
        encoding = self.machine.time("encoding", number * costs.VAE_ENCODE.gflop, "fp32")
        time = slowest(encoding, self._reading(images.total))
        num_bytes = float(number * LATENT_BYTES + 2048 * images.total)
        return StageCost("latents", time, num_bytes, _gb(costs.VAE_ENCODE, section.batch_size))

    def _pretrain(self) -> StageCost:
        params, section = self.params, self.params.pretrain
        work = costs.STEP_GFLOP * costs.STEP_MEMORY[section.gradient_checkpointing].work
        work *= 1 + costs.RECON_PASS_WORK * (params.loss.recon_passes - 1)
        work *= costs.TWO_CONDITIONS_WORK if params.conditioner.cond_view != "same" else 1
        work *= costs.UP_BLOCK_STEP_WORK if params.head.block != "mid" else 1
        seen = self.images.train * section.epochs
        reads = seen if params.conditioner.input == "pixels" else 0
        compiled = self.compiled_stages == "all"
        training = self.machine.time("training", work * seen, section.precision, compiled=compiled)
        memory = step_memory_gb(params, num_gpus=self.machine.num_gpus)
        time = slowest(training, self._reading(reads))
        return StageCost("pretrain", time, STATE_BYTES, memory)

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
        triples = self.machine.time("features", work * len(section.triples), section.precision)
        time = slowest(triples, self._reading(total))
        yield StageCost("features", time, float(stored * total), memory)
        if params.probe.baselines != "none":
            stored = 12_288 + 40_960 * (params.probe.baselines == "all")
            once = self.machine.time("features", work, section.precision)
            time = slowest(once, self._reading(total))
            yield StageCost("baselines", time, float(stored * total), memory)

    def _classifiers(self) -> Iterator[StageCost]:
        params, images = self.params, self.images
        heads = (1 + len(params.probe.lrs)) * (1 + len(params.probe.weight_decays)) + 1
        each = 2e-9 * params.head.width * images.classes
        work = 3 * each * images.train * params.probe.epochs * heads
        sgd = self.machine.time("classifiers", work, "fp32", alone=True)
        passes = 2 * costs.LBFGS_PASSES * len(params.probe.cs)
        hours = each * images.train * passes / costs.CPU_GFLOPS / 3600
        rate = f"logistic regression (probe.cs): {costs.CPU_GFLOPS:g} GFLOP/s of the CPU, stated"
        yield StageCost("probe", slowest(sgd, Time(hours, "CPU", (rate,))), 0.0, None)
        transfer = params.transfer
        classes, test = TRANSFER_IMAGES.get(params.transfer_data.source, (100, 10_000))
        shots = [500 if number == "full" else number for number in transfer.shots]
        number = test + classes * sum(shots) * transfer.num_splits
        time = self.machine.time("features", number * self._feature_work, "fp32")
        time += self.machine.time("encoding", number * costs.VAE_ENCODE.gflop, "fp32")
        memory = _gb(costs.UNET, 3 * params.features.batch_size)
        yield StageCost("transfer", time, 0.0, memory)
        number = min(params.separability.num_images, images.val)
        work = 2.0 * number * self._feature_work + 2 * 10 * 250 * costs.UNET.gflop
        time = self.machine.time("features", work, "fp32", alone=True)
        yield StageCost("separability", time, 0.0, memory)

    def _generate(self) -> StageCost:
        section = self.params.generate
        low, high = section.guidance_interval
        passes = 1 + (high - low if section.guidance != 1 else 0)
        steps = section.num_inference_steps * passes * section.num_samples
        work, compiled = steps * costs.UNET.gflop, self.compiled_stages != "none"
        time = self.machine.time("sampling", work, section.precision, compiled=compiled)
        decoding = section.num_samples * costs.VAE_DECODE.gflop
        time += self.machine.time("decoding", decoding, "fp32")
        latents = section.batch_size * (2 if section.guidance != 1 else 1)
        in_unet = _gb(costs.UNET, latents) + costs.VAE_DECODE.fixed_mb / 1e3
        in_vae = _gb(costs.VAE_DECODE, section.batch_size) + costs.UNET.fixed_mb / 1e3
        memory = max(in_unet, in_vae)
        return StageCost("generate", time, float(PNG_BYTES * section.num_samples), memory)

    def _scores(self) -> Iterator[StageCost]:
        params, images = self.params, self.images
        if params.extractor.kind == "inception":
            work = costs.INCEPTION_GFLOP * len(params.extractor.resizers)
        else:
            work = costs.CLASSIFIER_GFLOP
            training = 3 * work * images.train * params.extractor.epochs
            time = self.machine.time("classifiers", training, "fp32", alone=True)
            yield StageCost("extractor", time, 0.0, None)
        real = images.val if params.reference.split == "val" else images.train
        for stage, number in (("reference", real), ("score", params.generate.num_samples)):
            scoring = self.machine.time("classifiers", work * number, "fp32")
            yield StageCost(stage, slowest(scoring, self._reading(number)), 0.0, None)


def _moving(num_bytes: float, what: str, megabytes: float) -> Time:
    rate = f"{what}: {megabytes:g} MB/s, stated"
    return Time(num_bytes / megabytes / 1e6 / 3600, what, (rate,))


def _gb(each: costs.Pass, batch_size: int) -> float:
    return (each.fixed_mb + each.image_mb * batch_size) / 1e3 + costs.GPU_RESERVE_GB
