"""Files of both formats, and features beside three libraries."""

import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import fid
from contradiff.data.png import encode_png
from contradiff.evaluation import inception
from contradiff.evaluation.extractors import Extractor, load_extractor, save_inception
from contradiff.evaluation.inception_files import (
    INCEPTION_URL,
    PINNED,
    SCRIPT_NAME,
    STATE_DICT_NAME,
    STATE_DICT_URL,
    download_inception,
)
from contradiff.evaluation.params import Resizer
from contradiff.files import sha256_of

CPU = torch.device("cpu")
RESIZERS: list[Resizer] = ["clean", "legacy_tensorflow", "legacy_pytorch"]


def load(weights: Path, folder: Path) -> Extractor:
    name = STATE_DICT_NAME if weights.suffix == ".pth" else SCRIPT_NAME
    with mock.patch.dict(PINNED, {sha256_of(weights): name}):
        save_inception(folder, weights, resizers=RESIZERS)
        return load_extractor(folder, device=CPU)


def write_pngs(folder: Path, images: Tensor) -> list[Path]:
    folder.mkdir()
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(encode_png(image))
    return sorted(folder.iterdir())


def test_script_gives_clean_fids_features_and_its_own_logits(script: Path, tmp_path: Path):
    """The peer reads the files itself, and neither downloads nor needs a GPU."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    images = fid.pictures(3, side=64, seed=0, contrast=50.0)[:, :, :48]
    write_pngs(tmp_path / "images", images)
    filters = list(warnings.filters)
    with mock.patch("urllib.request.urlopen", side_effect=AssertionError("a download")):
        extractor = load(script, tmp_path / "extractor")
        found = {resizer: fid.features_of(extractor, images, resizer) for resizer in RESIZERS}
    assert list(warnings.filters) == filters
    card, options = extractor.card, {"num_workers": 0, "device": CPU, "verbose": False}
    assert (card.num_features, card.num_classes, card.val_accuracy) == (2048, 4, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = InceptionV3W(str(script.parent), download=False)
        for mode in ("clean", "legacy_tensorflow"):
            peer.resize_inside = mode == "legacy_tensorflow"
            expected = get_folder_features(str(tmp_path / "images"), peer, mode=mode, **options)
            np.testing.assert_allclose(found[mode][0].numpy(), expected, rtol=1e-5, atol=1e-6)
        probabilities = peer.base(images, no_output_bias=True)
    logits = found["legacy_tensorflow"][1]
    torch.testing.assert_close(logits.softmax(1), probabilities, rtol=1e-4, atol=1e-5)
    features = torch.stack([features.flatten() for features, _ in found.values()])
    assert torch.pdist(features, p=torch.inf).min() > 1e-3  # or a score's name would not matter


def test_state_dict_gives_the_features_of_two_peers(state_file: Path, tmp_path: Path):
    from pytorch_fid import fid_score
    from pytorch_fid import inception as theirs
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = load(state_file, tmp_path / "extractor")
    assert (extractor.card.num_features, extractor.card.num_classes) == (2048, 1008)
    images = fid.pictures(2, side=48, seed=0, contrast=50.0)
    found = fid.features_of(extractor, images, "legacy_tensorflow")
    peer = FeatureExtractorInceptionV3(
        "peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(state_file)
    )
    torch.testing.assert_close(found, peer(images), rtol=1e-4, atol=1e-4)
    assert found[0].std() > 0.01  # or the weights would let everything agree
    features, _ = fid.features_of(extractor, images, "legacy_pytorch")
    state = torch.load(state_file, weights_only=True)
    with mock.patch.object(theirs, "load_state_dict_from_url", return_value=state):
        model = theirs.InceptionV3([3])
    files = write_pngs(tmp_path / "images", images)
    with mock.patch.object(fid_score, "tqdm", lambda loader: loader):
        expected = fid_score.get_activations(files, model, 2, num_workers=0)
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_refuses_missing_and_other_files(tmp_path: Path, script: Path):
    folder = tmp_path / "extractor"
    with pytest.raises(ValueError, match=r"extractor.weights: .*absent.pt does not exist") as error:
        save_inception(folder, tmp_path / "absent.pt", resizers=["clean"])
    for hint in (
        INCEPTION_URL,
        STATE_DICT_URL,
        "extractor.download",
    ):
        assert hint in str(error.value)
    with pytest.raises(ValueError, match="its sha256 is"):
        save_inception(folder, script, resizers=["clean"])
    assert not folder.exists()


def test_a_state_dict_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / STATE_DICT_NAME
    harmful = type("Harmful", (), {"__reduce__": lambda _: (Path.touch, (Path("touched"),))})()
    torch.save({"fc.weight": harmful}, weights)
    with pytest.raises(Exception, match="Weights only load failed"):
        inception.Inception(weights)
    assert not Path("touched").exists()


def test_download(tmp_path: Path):
    source, weights = tmp_path / "source.pt", tmp_path / "raw" / "inception.pt"
    source.write_bytes(b"weights")
    digest = sha256_of(source)
    with pytest.raises(ValueError, match="is there a network") as error:
        download_inception(weights, url=(tmp_path / "absent").as_uri(), sha256=digest)
    assert "set extractor.weights" in str(error.value)
    with pytest.raises(ValueError, match=f"invalid hash value .*{digest}"):
        download_inception(weights, url=source.as_uri(), sha256="0" * 64)
    assert not weights.exists()
    download_inception(weights, url=source.as_uri(), sha256=digest)
    assert weights.read_bytes() == b"weights"
    # what is there is not fetched again
    download_inception(weights, url=(tmp_path / "absent").as_uri(), sha256=digest)
