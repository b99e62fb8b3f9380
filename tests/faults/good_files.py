"""Small good files of every kind that a stage reads, and the readers that the stages use."""

from stages.runtime.work_dir import take_up

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from contradiff.base.loading import NoiseSchedule, load_unet, load_vae
from contradiff.base.weights import check_weights
from contradiff.config import read_card, read_params
from contradiff.data.decoding import decode_rgb
from contradiff.data.latents import StoredLatents
from contradiff.data.map_shards import Made, map_shards, missing_items
from contradiff.data.pairs import PairedShards
from contradiff.data.png import encode_png
from contradiff.data.shard_info import ImageInfo, LatentInfo, SampleInfo
from contradiff.data.shards import (
    Sample,
    ShardIndex,
    image_record,
    read_images,
    read_split,
    write_shard,
    write_split,
)
from contradiff.data.transforms import Crop, decode
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import (
    ExtractorCard,
    load_extractor,
    read_extractor_card,
    save_classifier,
)
from contradiff.evaluation.fid import FeatureSource, FeatureStatistics
from contradiff.evaluation.measuring import Measurement
from contradiff.evaluation.reference import ReferenceCard, read_reference, write_reference
from contradiff.features.cache import HEAD_NAME, CacheIndex, FeatureCache, ModelFolders
from contradiff.features.params import FeatureSpec
from contradiff.features.timm_backbone import load_weights
from contradiff.features.write_cache import write_table
from contradiff.files import sha256_of
from contradiff.generation.class_table import ClassTable, load_class_table
from contradiff.generation.class_table_folder import save_class_table
from contradiff.generation.params import ClassConditionParams
from contradiff.method.attention import TriTimestepAttention
from contradiff.method.checkpoint import load_checkpoint, save_checkpoint
from contradiff.method.model import build_model
from contradiff.method.parameter_counts import count_parameters
from contradiff.method.params import Architecture
from contradiff.report.results import read_results
from contradiff.sources.cifar import find_cifar, read_cifar
from contradiff.sources.image_check import check_image
from contradiff.sources.imagenet import reopen_images, scan_images
from contradiff.sources.transfer_set import TransferSet
from contradiff.toy.digits import write_digits
from contradiff.training.state import SavedState
from stages.track import table
from stages.validate import check
from tests.faults.malformed import Kind
from tests.report.conftest import CURVE, RECORDS, STAGES, png_of
from tests.settings import ARCHITECTURE, write_tiny_base
from tests.sources.imagenet_layouts import WRITERS, make_photos
from tests.sources.test_cifar import FORMS, pack

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
COLUMN = FeatureSpec("mean:mid@4-2-1", (4, 2, 1), "mid", "mean")
HEAD: dict[str, Any] = {"in_channels": 8, "width": 8, "num_heads": 2, "mlp_ratio": 1}
HEAD |= {"residual": "value", "init": "identity"}


def write_good_files(root: Path) -> list[Kind]:
    """Write all files below `root`; return their kinds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [write(root) for write in WRITERS_OF_KINDS]
    return [kind for kinds in made for kind in kinds]


def _params(root: Path) -> list[Kind]:
    shutil.copyfile(ROOT / "presets/tiny.yaml", root / "params.yaml")

    def read(root: Path) -> object:
        content = read_params(root / "params.yaml")
        check(content, source="params.yaml")
        return content

    return [Kind("parameters", ("params.yaml",), read, "params")]


def _shards(root: Path) -> list[Kind]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images = [Sample(f"k{i}", encode_png(picture), i % 2) for i, picture in enumerate(pictures)]
    moments = torch.randn(4, 1, 8, 2, 2, generator=generator).half().numpy()
    crops = (Crop(0, 0, 16, 16, mirrored=False),)
    records = {
        "images": [image_record(image, extension="png") for image in images],
        "latents": [StoredLatents(f"k{i}", moments[i], crops).to_record() for i in range(4)],
        "samples": [{"__key__": b"000000", "png": images[0].image}],
        "packed": [image_record(image, extension="png") for image in images],
    }
    facts = {"dtype": "float16", "scaling_factor": 0.5, "image_size": 16, "views": 1}
    facts |= {"flips": False, "crop_scale_min": 0.5, "colour_jitter": 0.0}
    infos: dict[str, Any] = {
        "images": ImageInfo(class_ids=("a", "b")),
        "latents": LatentInfo.model_validate(facts),
        "samples": SampleInfo(condition="noise", guidance=1.0),
        "packed": ImageInfo(class_ids=("a", "b")),
    }
    for name, content in records.items():
        size: dict[str, Any] = {"samples_per_shard": 2, "compression": "none"}
        if name == "packed":
            size["compression"] = "gzip"
        split = "sample" if name == "samples" else "train"
        shards = write_split(root / name, split, content, **size)
        ShardIndex({split: shards}, infos[name]).write(root / name)

    def read_pairs(root: Path) -> object:
        pairs = PairedShards.open(root / "images", root / "latents", split="train")
        return [pairs.image_index, pairs.latent_index]

    def read_pictures(root: Path, name: str) -> object:
        return [decode(image.image, name=image.key) for image in read_images(root / name, "train")]

    def read_samples(root: Path) -> object:
        index = ShardIndex.read(root / "samples", SampleInfo)
        return [index.shards("sample"), index.info]

    def read_latents(root: Path) -> object:
        return [StoredLatents.of_record(record) for record in read_split(root / "latents", "train")]

    pictures_of = partial(partial, read_pictures)
    return [
        Kind("shard indexes", ("images/index.json", "latents/index.json"), read_pairs, "json"),
        Kind("index of samples", ("samples/index.json",), read_samples, "json"),
        Kind("image shards", ("images/train-00001.tar",), pictures_of(name="images")),
        Kind("packed shards", ("packed/train-00001.tar.gz",), pictures_of(name="packed")),
        Kind("latent shards", ("latents/train-00001.tar",), read_latents),
    ]


def _base(root: Path) -> list[Kind]:
    write_tiny_base(root / "base")
    readers: dict[str, Callable[[Path], Any]] = {
        "unet": lambda root: [check_weights(root / "base"), load_unet(root / "base")],
        "vae": lambda root: [check_weights(root / "base"), load_vae(root / "base")],
        "scheduler": lambda root: NoiseSchedule.of_base(root / "base").alphas_cumprod,
    }
    files = {
        "configuration of the UNet": "unet/config.json",
        "configuration of the scheduler": "scheduler/scheduler_config.json",
        "weights of the UNet": "unet/diffusion_pytorch_model.safetensors",
        "weights of the VAE": "vae/diffusion_pytorch_model.safetensors",
    }
    # What comes from elsewhere has no digest of ours.
    return [
        Kind(name, (f"base/{file}",), readers[file.partition("/")[0]], "raw")
        for name, file in files.items()
    ]


def _checkpoint(root: Path) -> list[Kind]:
    base, folder = root / "base", root / "pretrain"
    model = build_model(base, Architecture.model_validate(ARCHITECTURE), image_size=32, seed=0)
    counts = count_parameters(model, num_vae_parameters=1)
    sizes = {"image_size": 32, "num_steps": 1, "counts": counts}
    save_checkpoint(folder, model, base=base, params=ARCHITECTURE, **sizes)
    params = {"epochs": 1, "width": 8, "drop": 0.1, "batch_size": 2, "lr": 0.1, "lora": True}
    save_class_table(
        root / "classes",
        ClassTable(num_classes=2, width=8, cross_attention_dim=16),
        checkpoint=folder,
        num_classes=2,
        num_steps=3,
        params=ClassConditionParams.model_validate(params),
    )

    def read(root: Path) -> object:
        return load_checkpoint(root / "pretrain", base=root / "base")

    def read_table(root: Path) -> object:
        return load_class_table(root / "classes", checkpoint=root / "pretrain")

    return [
        Kind("card of the checkpoint", ("pretrain/config.json",), read, "json"),
        Kind("weights of the checkpoint", ("pretrain/model.safetensors",), read),
        Kind("card of the class table", ("classes/config.json",), read_table, "json"),
        Kind("class table", ("classes/table.safetensors",), read_table),
    ]


def _features(root: Path) -> list[Kind]:
    folder = root / "features"
    folder.mkdir()
    rows = {COLUMN.name: torch.randn(3, 4).half(), "labels": torch.arange(3)}
    shard = write_table(folder / "train-00000.safetensors", rows, keys=["a", "b", "c"])
    maps = {"maps": torch.randn(3, 3, 8, 1, 1).half()}
    map_shard = write_table(folder / "train-00000.maps.safetensors", maps, keys=[])
    save_file(TriTimestepAttention(**HEAD).state_dict(), folder / HEAD_NAME)
    models = partial(ModelFolders, checkpoint=root / "pretrain", base=root / "base", root=root)
    CacheIndex(
        model="contradiff",
        checkpoint=models().fingerprint("contradiff"),
        dtype="fp16",
        num_classes=3,
        columns=(COLUMN,),
        head=HEAD,
        head_sha256=sha256_of(folder / HEAD_NAME),
        shards={"train": (shard,)},
        maps={"train": (map_shard,)},
        made_with={"seed": 0},
    ).write(folder)

    def read(root: Path) -> object:
        cache = FeatureCache.open(root / "features", models())
        name = cache.index.columns[0].name
        content = [cache.column("train", name), cache.labels("train"), cache.keys("train")]
        return [*content, cache.width(name), cache.attention(), *cache.maps("train"), cache.index]

    files = ("train-00000.safetensors", HEAD_NAME)
    return [
        Kind("index of the features", ("features/index.json",), read, "json"),
        Kind("features and their head", tuple(f"features/{name}" for name in files), read),
        Kind("maps", ("features/train-00000.maps.safetensors",), read),
    ]


def _evaluation(root: Path) -> list[Kind]:
    classifier = ResidualClassifier(width=4, num_classes=3)
    facts = {"image_size": 16, "val_accuracy": 0.9, "val_count": 50, "val_chance": 0.3}
    save_classifier(root / "extractor", classifier, **facts)
    card = read_extractor_card(root / "extractor")
    of_reference = {"split": "val", "num_images": 7, "image_size": 16, "images_sha256": "2" * 64}
    of_reference |= {"extractor": card.name, "extractor_sha256": card.weights_sha256}
    of_reference |= {"resizers": ["none"], "num_kept": 5, "seed": 0}
    reference = ReferenceCard.model_validate(of_reference)
    source = FeatureSource(reference.description, "none", card.name, card.weights_sha256)
    values = torch.randn(7, 8)
    statistics = FeatureStatistics.of(values, source=source)
    measured = Measurement(statistics, values[:5], torch.empty(0, 3))
    write_reference(root / "reference", reference, {"none": measured})

    def read(root: Path) -> object:
        loaded = load_extractor(root / "extractor", device=CPU)
        return [loaded.card, loaded._network]

    def read_measured(root: Path) -> object:
        extractor = read_card(ExtractorCard, root / "extractor/extractor.json", stage="extractor")
        return read_reference(root / "reference", extractor=extractor, image_size=16)

    return [
        Kind("card of the extractor", ("extractor/extractor.json",), read, "json"),
        Kind("weights of the extractor", ("extractor/extractor.safetensors",), read),
        Kind("card of the reference", ("reference/reference.json",), read_measured, "json"),
        Kind("reference", ("reference/none.safetensors",), read_measured),
    ]


def _unfinished(root: Path) -> list[Kind]:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    (root / "work").mkdir()
    SavedState(root / "work/state.safetensors", module.state_dict(), every=1).save(3, optimizer)
    (root / "begun").mkdir()
    take_up(root / "begun", state_version=1, code=None, log=print)
    record = {"__key__": b"a", "txt": b"x"}

    def make(name: str, _: Callable[[int], None]) -> Made:
        return Made((write_shard(root / "work" / f"{name}.tar", [record], compression="none"),))

    map_shards(["note"], make, root / "work", name_of=str)

    def read_state(root: Path) -> object:
        state = SavedState(root / "work/state.safetensors", module.state_dict(), every=1)
        return [state.resume(optimizer), module, optimizer.state_dict(), state.curve]

    def read_note(root: Path) -> object:
        return missing_items(["note"], root / "work", name_of=str)

    def read_begun(root: Path) -> object:
        told: list[str] = []
        take_up(root / "begun", state_version=1, code=None, log=told.append)
        return told

    return [
        Kind("resume states", ("work/state.safetensors",), read_state, may_lack=True),
        Kind("notes of finished shards", ("work/note.json",), read_note, "note"),
        Kind("notes of begun work", ("begun/begun.json",), read_begun, "note"),
    ]


def _sources(root: Path) -> list[Kind]:
    pack(root, "cifar100", FORMS["cifar100"][0])
    pack(root, "cifar10", FORMS["cifar10"][1])
    write_digits(root / "digits", num_train_per_class=170, seed=0)
    photos = make_photos(seed=0, num_train=2, num_val=1)
    for name in ("archives", "kaggle", "parquet"):
        WRITERS[name](root / name, photos)
    parquet = "parquet/data/train-00001-of-00002.parquet"
    tars = ("archives/ILSVRC2012_img_train.tar", "archives/ILSVRC2012_img_val.tar")
    kit = ("archives/ILSVRC2012_devkit_t12.tar.gz",)
    manifests = root / "manifest"
    manifests.mkdir()
    images = scan_images(root / "kaggle", layout="kaggle").manifest(project=root)
    digits = TransferSet(root / "digits", "digits").manifest(project=root)
    for name, content in (("images", images), ("transfer", digits)):
        (manifests / f"{name}.json").write_text(json.dumps(content))

    def scan(root: Path, layout: Any) -> object:
        found = scan_images(root / layout, layout=layout)
        read = [found.read(file) for files in found.listing.splits.values() for file in files]
        return [found.listing, *read]

    def cifar(root: Path, name: Any) -> object:
        split = read_cifar(find_cifar(root, name), split="train")
        return [split.labels, split.keys, split.read(range(len(split.labels)))]

    def read_digits(root: Path) -> object:
        split = read_cifar(find_cifar(root / "digits", "cifar100"), split="test")
        return [split.labels, split.keys, split.read([0])]

    def reopen(root: Path) -> object:
        found = reopen_images(root / "manifest/images.json", project=root)
        return [found.digest, TransferSet.reopen(manifests / "transfer.json", project=root)]

    scan_of, cifar_of = partial(partial, scan), partial(partial, cifar)
    files = ("manifest/images.json", "manifest/transfer.json")
    return [
        Kind("CIFAR-100, pickles", ("cifar-100-python.tar.gz",), cifar_of(name="cifar100"), "raw"),
        Kind("CIFAR-10, binary", ("cifar-10-binary.tar.gz",), cifar_of(name="cifar10"), "raw"),
        Kind("digits, a pickle", ("digits/test",), read_digits, "raw"),
        Kind("ILSVRC's archives", (*tars, *kit), scan_of(layout="archives"), "raw"),
        Kind("Kaggle's labels", ("kaggle/LOC_val_solution.csv",), scan_of(layout="kaggle"), "raw"),
        Kind("parquet files", (parquet,), scan_of(layout="parquet"), "raw"),
        Kind("manifests", files, reopen, "json"),
    ]


def _images(root: Path) -> list[Kind]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)
    names = ("photo.jpg", "photo.png", "photo.webp")
    for name in names:
        buffer = io.BytesIO()
        smooth.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.split(".")[1]])
        (root / name).write_bytes(buffer.getvalue())

    def read(root: Path, verify: Any) -> object:
        found: list[object] = []
        for name in names:
            content = (root / name).read_bytes()
            found.append(check_image(content, path=name, verify=verify, resize=16))
            found.append(np.asarray(decode_rgb(content, name=name)))
        return found

    read_of = partial(partial, read)
    return [
        Kind("images", names, read_of(verify="full"), "raw"),
        Kind("images, only headers", names, read_of(verify="header"), "raw"),
    ]


def _weights(root: Path) -> list[Kind]:
    module = nn.Linear(3, 2)
    save_file(module.state_dict(), root / "timm.safetensors")

    def read(root: Path) -> object:
        load_weights(module, root / "timm.safetensors")
        return module

    return [Kind("weights for timm", ("timm.safetensors",), read, "raw")]


def _results(root: Path) -> list[Kind]:
    project = root / "project"
    for folder in ("metrics", "build/pretrain", "build/figures", "build/shards"):
        (project / folder).mkdir(parents=True)
    for stage in STAGES:
        (project / f"metrics/{stage}.json").write_text(json.dumps({stage: RECORDS[stage]}))
    (project / "build/pretrain/config.json").write_text(json.dumps(RECORDS["pretrain"]))
    (project / "build/shards/index.json").write_text(json.dumps(RECORDS["images"]))
    (project / "metrics/pretrain.csv").write_text(CURVE)
    for value, name in enumerate(("samples", "tsne", "tsne_dark")):
        (project / f"build/figures/{name}.png").write_bytes(png_of(value))
    summary = {"rows": [["top-1", "50%"]], "report": "build/report/index.html"}
    (root / "summary.json").write_text(json.dumps(summary))
    files = [f"metrics/{stage}.json" for stage in STAGES]
    files += ["build/pretrain/config.json", "build/figures/samples.png"]

    def read(root: Path) -> object:
        return read_results(root / "project", seed=0)

    return [
        Kind("results", tuple(f"project/{name}" for name in files), read, "json"),
        Kind("curve", ("project/metrics/pretrain.csv",), read, "json"),
        Kind("summary", ("summary.json",), lambda root: table(root / "summary.json"), "json"),
    ]


WRITERS_OF_KINDS = (_params, _shards, _base, _checkpoint, _features, _evaluation)
WRITERS_OF_KINDS += (_unfinished, _sources, _images, _weights, _results)
