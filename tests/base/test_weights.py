"""Weight files that do not fit the configuration are named before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from contradiff.base.config import WEIGHTS_NAME, check_base
from contradiff.base.headers import linear_layers
from contradiff.base.loading import load_vae
from contradiff.base.weights import EARLIER_NAMES, check_values, check_weights

Tensors = dict[str, Tensor]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename(tensors: Tensors, new_name: Callable[[str], str]) -> None:
    renamed = {new_name(name): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 334643276\n"
CONV = "conv_in.weight"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda path: path.write_bytes(POINTER), "is only a Git-LFS pointer; type `git lfs pull`"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or incomplete .*get it"),
        (lambda path: path.write_bytes(b""), "damaged or incomplete"),
        (lambda path: rewrite(path, lambda t: t.pop(CONV)), f"1 of .* missing, such as {CONV}"),
        (
            lambda path: rewrite(path, lambda t: t.update(extra=t[CONV].clone())),
            "has a tensor extra that",
        ),
        (
            lambda path: rewrite(path, lambda t: t.update({CONV: torch.ones(2, 2)})),
            rf"{CONV} has shape \[2, 2\], not \[16, 4, 3, 3\]",
        ),
        (
            lambda path: rewrite(path, lambda t: t.update({CONV: t[CONV].to(torch.int8)})),
            f"{CONV} has type I8, not one of F64, F32",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    base: Path, change: Callable[[Path], object], fault: str
):
    check_weights(base)
    check_values(base)
    change(base / "unet" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=rf"^base\.path: {base}/unet/{WEIGHTS_NAME}.*{fault}"):
        check_weights(base)


def test_values_that_are_not_finite_are_named_if_asked(base: Path):
    rewrite(base / "vae" / WEIGHTS_NAME, lambda t: t["decoder.conv_in.bias"][1:2].fill_(torch.nan))
    check_weights(base)
    with pytest.raises(ValueError, match=r"vae/.*: decoder\.conv_in\.bias has NaN or infinite"):
        check_values(base)


def test_a_variant_alone_must_be_renamed(base: Path):
    path = base / "unet" / WEIGHTS_NAME
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ValueError, match=r"unet contains no .*; rename diffusion_.*\.fp16\.safe"):
        check_base(base)


def test_linear_layers_are_those_of_the_unet_with_and_without_weights(base: Path):
    of_header = linear_layers(base)
    (base / "unet" / WEIGHTS_NAME).unlink()
    assert set(of_header) == set(linear_layers(base))
    assert {
        "time_embedding.linear_1",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
    } <= set(of_header)


def test_half_precision_earlier_names_and_several_files_fit(base: Path):
    earlier = {new: old for old, new in EARLIER_NAMES.items()}
    vae, unet = (base / name / WEIGHTS_NAME for name in ("vae", "unet"))
    before, linear_before = load_vae(base).state_dict(), sorted(linear_layers(base))

    def early_name(name: str) -> str:
        name = name.replace("to_out.0", "to_out_0")
        parts = (part.replace("to_out_0", "to_out.0") for part in name.split("."))
        return ".".join(earlier.get(part, part) for part in parts)

    rewrite(vae, lambda tensors: rename(tensors, early_name))
    assert any(".query." in name for name in load_file(vae))
    rewrite(unet, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    tensors = load_file(unet)
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    of_name = {name: names[n % 2] for n, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if of_name[n] == file}, unet.with_name(file))
    unet.with_name(f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": of_name}))
    unet.unlink()
    check_base(base)
    check_weights(base)
    check_values(base)
    assert sorted(linear_layers(base)) == linear_before
    after = load_vae(base).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
