"""A project whose results the report shows; all of them are made up."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML

RECORDS: dict[str, Any] = YAML(typ="safe").load("""
probe:
  {top1: 0.734, top5: 0.951, interval: [0.7058, 0.7605], total: 1000, split: val, head: linear,
   pool: attention, model: contradiff, protocol: logistic,
   logistic: {top1: 0.734, interval: [0.7058, 0.7605], c: 0.1, converged: true},
   sgd: {top1: 0.701, interval: [0.6719, 0.7285], converged: false},
   table2: {top1: 0.62, top5: 0.9, literal: true},
   few_labels: {"0.1": {top1: 0.6, c: 1.0, converged: false}, "0.01": {top1: 0.4, c: 0.001}}}
baselines:
  protocol: logistic
  split: val
  rows: {base_pooled: {top1: 0.81, interval: [0.784, 0.833], c: 0.1, converged: true, width: 1288},
         chance: {top1: 0.0833333}}
few_shot: &few_shot
  {logistic: {mean: 0.8345, std: 0.0104},
   ridge: {mean: 0.8123, std: 0.0104}, sgd: {mean: 0.7891, std: 0.0123}, num_splits: 3}
transfer:
  {<<: *few_shot, shots: 25, total: 797, source: digits, protocol: logistic,
   top1: {mean: 0.8345, std: 0.0104}, by_shots: {"25": *few_shot, full:
   {ridge: {mean: 0.95, std: null}, sgd: {mean: 0.96, std: null},
    finetuned: {mean: 0.99, std: null}, num_splits: 1}}}
separability: {contradiff: {knn: 0.625, silhouette: 0.0712}, base: {knn: 0.5, silhouette: null},
               num_images: 900, num_classes: 12, num_neighbours: 10,
               denoising_error: {contradiff: 0.10648, base: 0.1061, num_images: 250},
               diagnostics: {num_images: 256, h: {effective_rank: 25.3}, retrieval:
                {own: 0.85, "null": 0.6, by_latent: 0.31, by_condition: 0.03}}}
by_resizer: &by_resizer
  {fid: 31.4159, kid: 0.01234, kid_std: 0.002, precision: 0.7, recall: 0.65, density: 0.6042,
   coverage: 0.8, inception_score: 6.28, inception_score_std: 0.17}
score:
  {<<: *by_resizer, biased: true, withheld: null, num_kept: 500, reference_sha256: a191c74b00,
   num_samples: 1000, num_reference: 900, extractor: domain-classifier, extractor_accuracy: 0.95,
   guidance: 1.0, condition: "unconditional: c(noise)", resizer: none, seed: 7,
   reference: "val images, crop"}
images:
  splits: {train: [{num_samples: 1000}, {num_samples: 234}], val: [{num_samples: 900}]}
  facts: {class_ids: [a, b], num_quarantined: {train: 0, val: 2},
          ignored: {train: {.gif: 3, hidden: 1}, val: {}}}
pretrain:
  params:
    seed: 3
    loss: {lambda: 0.1, contrastive: ntxent, temperature: 0.1}
    lora: {rank: 16, targets: [attn2.to_q, attn2.to_k]}
    pretrain: {lr: 0.0005, scale_lr: false}
  parameters: {trainable: 250000, frozen: 750000,
               modules: {unet: [50000, 700000], vae: [0, 50000], head: [200000, 0]}}
  num_steps: 372
""")
STAGES = "probe", "baselines", "transfer", "score", "separability"
CURVE = """step,epoch,lr,loss,reconstruction,contrastive,grad_norm
10,0,0.0005,0.4,0.2,,0.1
20,1,0.0005,0.35,0.2,0.67,0.05
"""


def png_of(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "png")
    return buffer.getvalue()


LOSS, LOSS_DARK, TSNE, TSNE_DARK, SAMPLES = (png_of(value) for value in range(5))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project in which every stage but the report has run."""
    for stage in STAGES:
        write_json(tmp_path / f"metrics/{stage}.json", {stage: RECORDS[stage]})
    write_json(tmp_path / "build/pretrain/config.json", RECORDS["pretrain"])
    write_json(tmp_path / "build/shards/index.json", RECORDS["images"])
    (tmp_path / "metrics/pretrain.csv").write_text(CURVE)
    (tmp_path / "build/figures").mkdir()
    for name, png in (("samples", SAMPLES), ("tsne", TSNE), ("tsne_dark", TSNE_DARK)):
        (tmp_path / f"build/figures/{name}.png").write_bytes(png)
    return tmp_path
