"""stages.features and stages.probe: from a checkpoint to the accuracy, whoever does the work."""

from stages.runtime.run import Run

import csv
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from contradiff.config import parse, read_params
from contradiff.downstream.linear import LinearProbe
from contradiff.features import write_cache
from contradiff.features.batches import stored_batches
from contradiff.features.cache import FeatureCache, ModelFolders
from contradiff.features.models import DiffusionFeatures
from contradiff.features.params import FeaturesParams
from contradiff.files import sha256_of
from contradiff.method.checkpoint import base_digest, load_checkpoint
from stages import features, probe
from tests.settings import ARCHITECTURE

ROOT = Path(__file__).resolve().parents[2]
CACHE, PRETRAIN, BASE = Path("build/features"), Path("build/pretrain"), Path("build/base")
TIMM = {"model": "timm", "pool": "mean", "timm_name": "test_vit"}
HUB = TIMM | {"timm_pretrained": True}
SGD = {"headline": "sgd", "cs": [], "few_labels": []}
STORED = {"images": Path("build/shards"), "latents": Path("build/latents")}


def content_of(*, probing: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    content = read_params(ROOT / "presets/tiny.yaml") | ARCHITECTURE
    content["features"] |= {"batch_size": 4} | changes
    content["probe"] |= {"epochs": 2, "warmup_epochs": 0, "batch_size": 8} | (probing or {})
    return content


def make(run: Run, **changes: Any) -> FeatureCache:
    features.main(parse(features.Params, content_of(**changes), source="params.yaml"), run)
    return FeatureCache.open(CACHE, ModelFolders(PRETRAIN, BASE, run.root))


def judge(run: Run, **probing: Any) -> dict[str, Any]:
    probe.BASELINES.parent.mkdir(exist_ok=True)
    probe.BASELINES.write_text('{"baselines": {"rows": {"chance": {"top1": 0.25}}}}')
    probe.main(parse(probe.Params, content_of(probing=probing), source="params.yaml"), run)
    return json.loads(Path("metrics/probe.json").read_text())["probe"]


def digests() -> dict[str, str]:
    return {file.name: file.read_bytes().hex() for file in sorted(CACHE.iterdir())}


def test_the_cache_holds_what_the_model_gives(trained_project: Run):
    cache = make(trained_project, more_triples=[[999, 5, 300]], more_blocks=["mid", "up.1"])
    assert [column.name for column in cache.index.columns] == [
        f"{kind}@{triple}"
        for triple in ("401-201-101", "999-5-300")
        for kind in ("attention:mid", "mean:mid", "mean:up.1")
    ]
    content = content_of(timesteps=[999, 5, 300], more_blocks=["mid"])
    params = FeaturesParams.model_validate(content["features"])
    model = DiffusionFeatures(load_checkpoint(PRETRAIN, base=BASE), params, 0, torch.device("cpu"))
    for split, number in (("train", 24), ("val", 8)):
        [batch] = stored_batches(**STORED, split=split, batch_size=number)
        for name, expected in model(batch).items():
            stored = cache.column(split, name)
            assert stored.dtype == torch.float16
            torch.testing.assert_close(stored.float(), expected, atol=2e-3, rtol=2e-3)
        assert cache.labels(split).equal(batch.labels)
        assert tuple(cache.keys(split)) == batch.keys


def test_features_that_are_all_the_same_are_refused_where_they_are_made(
    trained_project: Run, build_tiny: Callable[..., Any], save_tiny: Callable[..., None]
):
    """Of a model whose weights are 0 and whose biases are 1."""
    model = build_tiny()
    with torch.no_grad():
        for name, parameter in model.attention.named_parameters():
            parameter.fill_(float(name.endswith("bias")))
    save_tiny(PRETRAIN, model)
    fault = r"^features 'attention:mid@.*': all 6 images have the same feature.*effective rank is 0"
    with pytest.raises(ValueError, match=fault):
        make(trained_project)
    assert not CACHE.exists()


def test_processes_and_threads_alter_no_bit(trained_project: Run, monkeypatch: pytest.MonkeyPatch):
    """Threads stand for the processes, and load the model one after the other."""
    run = trained_project
    make(run, probing={"head": "attentive"})
    alone = digests()
    assert {"attention.safetensors", "train-00003.maps.safetensors", "index.json"} <= set(alone)
    shutil.rmtree(CACHE)
    own, barrier, lock = threading.local(), threading.Barrier(2), threading.Lock()
    load = features.load_feature_model

    def load_alone(*args: Any, **settings: Any) -> Any:
        with lock:
            return load(*args, **settings)

    def accelerator(_: Run) -> SimpleNamespace:
        shared = {"num_processes": 2, "wait_for_everyone": barrier.wait}
        return SimpleNamespace(process_index=own.rank, **shared)

    monkeypatch.setattr(Run, "accelerator", accelerator)
    monkeypatch.setattr(Run, "is_main", property(lambda _: own.rank == 0))
    monkeypatch.setattr(features, "load_feature_model", load_alone)
    threads = run.runtime.model_copy(update={"num_workers": 2})
    several = Run(stage=run.stage, root=run.root, runtime=threads)
    content = content_of(probing={"head": "attentive"})

    def work(rank: int) -> None:
        own.rank = rank
        features.main(parse(features.Params, content, source="params.yaml"), several)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert digests() == alone
    assert list((run.root / ".work" / run.stage).iterdir()) == []


def test_an_interrupted_run_does_the_rest(trained_project: Run, monkeypatch: pytest.MonkeyPatch):
    write, written, limit = write_cache.write_table, [], [2]

    def note(path: Path, *args: Any, **kwargs: Any) -> Any:
        if len(written) == limit[0]:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *args, **kwargs)

    monkeypatch.setattr(write_cache, "write_table", note)
    with pytest.raises(KeyboardInterrupt):
        make(trained_project)
    limit[0] = 99
    make(trained_project)
    assert len(written) == len(set(written)) == 6
    kept = digests()
    make(trained_project)
    assert digests() == kept
    assert len(written) == 12


def test_probe_writes_the_headline_its_head_and_the_grid(
    trained_project: Run, capsys: pytest.CaptureFixture[str]
):
    cache = make(trained_project, more_blocks=["up.1"])
    result = judge(trained_project, lr=0.05, lrs=[0.2])
    assert {"top1", "top5", "interval", "total", "split", "head", "pool", "model"} < set(result)
    assert (result["total"], result["model"], result["pool"]) == (8, "contradiff", "attention")
    assert result["table2"]["literal"] is False
    features = cache.column("val", "attention:mid@401-201-101").float()
    for file, protocol in (("head", "sgd"), ("logistic", "logistic")):
        head = LinearProbe(16, 3)
        head.load_state_dict(load_file(f"build/probe/{file}.safetensors"))
        right = head.eval()(features).argmax(dim=1) == cache.labels("val")
        assert right.float().mean().item() == result[protocol]["top1"]
    written = json.loads(Path("build/probe/config.json").read_text())
    assert written.pop("made_with") == cache.index.made_with
    facts = {"model": "contradiff", "checkpoint": cache.index.checkpoint, "num_classes": 3}
    facts |= {"feature": cache.index.columns[0].name, "head": "linear", "headline": "logistic"}
    files = (Path(f"build/probe/{file}.safetensors") for file in ("head", "logistic"))
    assert written.pop("sha256") == {path.name: sha256_of(path) for path in files}
    assert written == facts
    assert result["protocol"] == "logistic"
    assert result["top1"] == result["logistic"]["top1"]
    near = result["top1"] - result["sgd"]["top1"] <= 0.01
    assert result["sgd"]["converged"] == near
    assert ("the SGD probe has not converged" in capsys.readouterr().err) != near
    assert set(result["few_labels"]) == {"0.01", "0.1"}
    assert result["baselines"] == {"chance": 0.25}
    with Path("build/probe/grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["configured", "table2", "", "", "", ""]
    assert float(rows[0]["top1"]) == result["sgd"]["top1"]
    assert float(rows[1]["top1"]) == result["table2"]["top1"]
    assert {row["split"] for row in rows} == {"val"}
    # the grid moves no score of params.yaml's setting
    alone = judge(trained_project, lr=0.05, lrs=[], **SGD)
    assert (alone["top1"], alone["top5"]) == (result["sgd"]["top1"], result["sgd"]["top5"])
    assert (alone["logistic"], alone["sgd"]["converged"], alone["few_labels"]) == (None, None, {})


def test_attentive_probe_reads_maps_and_says_where_they_come_from(trained_project: Run):
    make(trained_project)
    with pytest.raises(ValueError, match=r"index\.json: no maps are .*dvc repro features"):
        judge(trained_project, head="attentive", headline="sgd")
    make(trained_project, probing={"head": "attentive"})
    result = judge(trained_project, head="attentive", lrs=[], headline="sgd")
    assert result["logistic"] is None
    assert (result["head"], result["total"]) == ("attentive", 8)
    assert load_file("build/probe/head.safetensors")["attention_head.to_q.weight"].shape == (16, 32)
    # linear probes are there as well
    assert judge(trained_project, head="linear")["head"] == "linear"


def test_diffeed_s_maps_get_a_head_of_their_own(trained_project: Run):
    probing = SGD | {"head": "attentive"}
    cache = make(trained_project, model="diffeed", pool="mean", probing=probing)
    assert cache.column("val", "mean:diffeed@401-201-101").shape == (8, 3 * 4 * 32)
    assert cache.maps("val")[7].shape == (3, 4 * 32, 2, 2)
    assert judge(trained_project, head="attentive", lrs=[], **SGD)["model"] == "diffeed"


@pytest.mark.parametrize("model", ["contradiff", "base", "diffeed"])
def test_features_of_other_weights_are_refused(trained_project: Run, model: str):
    pool = "attention" if model == "contradiff" else "mean"
    cache = make(trained_project, model=model, pool=pool)
    assert (cache.index.checkpoint == base_digest(BASE)) == (model != "contradiff")
    config = json.loads((PRETRAIN / "config.json").read_text())
    (PRETRAIN / "config.json").write_text(json.dumps(config | {"num_steps": 4}))
    if model != "contradiff":  # a baseline does not change with the training
        assert judge(trained_project)["model"] == model
        base = BASE.resolve()  # shared by the tests
        BASE.unlink()
        shutil.copytree(base, BASE)
        [weights] = (BASE / "unet").glob("*.safetensors")
        weights.write_bytes(weights.read_bytes() + b"\0")
    fault = r"^build/features/index\.json: .*checkpoint or the base .*dvc repro features"
    with pytest.raises(ValueError, match=fault):
        judge(trained_project)


def test_other_timm_weights_are_refused(trained_project: Run, monkeypatch: pytest.MonkeyPatch):
    import timm

    def use(seed: int) -> None:
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(), "w.safetensors")

    fingerprints: list[str] = []
    for seed in (0, 1):
        use(seed)
        cache = make(trained_project, timm_weights="w.safetensors", **TIMM)
        fingerprints.append(cache.index.checkpoint)
    assert len(set(fingerprints)) == 2
    assert judge(trained_project)["model"] == "timm"
    use(2)
    fault = r"^features\.timm_weights: w\.safetensors has changed .*`dvc repro -f features`"
    with pytest.raises(ValueError, match=fault):
        judge(trained_project)
    Path("w.safetensors").unlink()  # a pulled cache is used without them
    judge(trained_project)
    # as from the hub: no file to compare, but what the weights are is on record
    create = timm.create_model

    def fetch(name: str, *, pretrained: bool, num_classes: int) -> torch.nn.Module:
        assert pretrained
        torch.manual_seed(1)
        return create(name, num_classes=num_classes)

    monkeypatch.setattr(timm, "create_model", fetch)
    cache = make(trained_project, **HUB)
    assert cache.index.checkpoint == fingerprints[1]
    judge(trained_project)


def test_too_little_room_is_found_first(trained_project: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=32 * (8 + 2 * 16) - 1))
    monkeypatch.setattr(write_cache, "write_table", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=r"kB are to be written, .* set probe\.head to \"linear\""):
        make(trained_project)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model": "base"}, r"features\.pool: attention needs contradiff's .*features\.pool: mean"),
        ({"model": "timm", "pool": "mean"}, r"features\.timm_name: "),
        (TIMM, r"features\.timm_weights: .*features\.timm_pretrained: true"),
        (HUB | {"more_triples": [[3, 2, 1]]}, r"features\.more_triples: "),
        ({"model": "diffeed", "pool": "mean", "noising": "ddim_chain"}, r"features\.noising: "),
        ({"model": "diffeed", "pool": "mean", "more_blocks": ["mid"]}, r"features\.more_blocks: "),
        ({"more_triples": [[401, 101, 201]]}, r"features\.more_triples: a list has the same"),
        ({"more_triples": [[1, 2]]}, r"features\.more_triples: \[1, 2\]: set three"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], fault: str):
    with pytest.raises(ValueError, match=fault):
        parse(features.Params, content_of(**changes), source="params.yaml")
