"""Files of two kinds, and features beside three libraries."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import fid, peers
from contradiff.evaluation.extractors import (
    ExtractorCard,
    InceptionExtractor,
    load_extractor,
    save_inception,
)
from contradiff.evaluation.inception import (
    INCEPTION_URL,
    STATE_DICT_URL,
    Inception,
    check_inception,
    download_inception,
    inception_of,
    load_inception,
)
from contradiff.evaluation.inception_score import inception_score
from contradiff.evaluation.kid import kernel_distance
from contradiff.evaluation.measuring import measure
from contradiff.evaluation.prdc import manifold_scores
from contradiff.files import sha256_of

CPU = torch.device("cpu")


def noise(n: int, *, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def save(folder: Path, weights: Path) -> ExtractorCard:
    return save_inception(
        folder,
        weights,
        resizers=["clean", "legacy_tensorflow"],
        pinned=("0" * 64, sha256_of(weights)),
    )


# --- Files --------------------------------------------------------------------------------------


def test_script_equals_its_own_outputs(tmp_path: Path, script: Path):
    """At 299 pixels the script does not resize either, so it says what it should say."""
    card = save(tmp_path / "extractor", script)
    assert (card.num_features, card.num_classes, card.val_accuracy) == (2048, 4, None)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    assert extractor.card.resizers == ["clean", "legacy_tensorflow"]
    images = noise(3, height=299, width=299)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(script)
    with torch.no_grad():
        expected_features = module(images, return_features=True)
        expected = module(images, no_output_bias=True)
    for resizer in ("clean", "legacy_tensorflow"):
        features, logits = extractor(images, resizer=resizer)
        torch.testing.assert_close(features, expected_features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits.softmax(1), expected, rtol=1e-4, atol=1e-5)


def test_script_equals_clean_fid(tmp_path: Path, script: Path):
    """The peer's own wrapper and resizer, one image at a time."""
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    save(tmp_path / "extractor", script)
    images = noise(3, height=64, width=48)
    features, _ = load_extractor(tmp_path / "extractor", device=CPU)(images, resizer="clean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = InceptionV3W(str(tmp_path), download=False)
    resize = build_resizer("clean")
    for image, ours in zip(images, features, strict=True):
        resized = resize(image.permute(1, 2, 0).numpy())
        with torch.no_grad():
            expected = peer(torch.from_numpy(resized).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_state_dict_equals_torch_fidelity_and_pytorch_fid(
    tmp_path: Path, state_file: Path, inception_state: dict[str, Tensor]
):
    card = save(tmp_path / "extractor", state_file)
    assert (card.num_features, card.num_classes) == (2048, 1008)
    extractor = load_extractor(tmp_path / "extractor", device=CPU)
    images = peers.pictures(2, side=48, seed=0, contrast=50.0)
    folder = peers.write_pngs(tmp_path / "images", images)
    features, logits = extractor(images, resizer="legacy_tensorflow")
    peer = peers.torch_fidelity_features(state_file)(folder)
    torch.testing.assert_close(features, peer["2048"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, peer["logits_unbiased"], rtol=1e-4, atol=1e-4)
    assert features.std() > 0.01  # or the weights would let everything agree
    features, _ = extractor(images, resizer="legacy_pytorch")
    expected = peers.pytorch_fid_features(inception_state)(folder)
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_refuses_missing_and_other_files(tmp_path: Path, script: Path):
    folder = tmp_path / "extractor"
    with pytest.raises(ValueError, match=r"extractor.weights: .*absent.pt does not exist") as error:
        save_inception(folder, tmp_path / "absent.pt", resizers=["clean"])
    for hint in (INCEPTION_URL, STATE_DICT_URL, "extractor.download"):
        assert hint in str(error.value)
    with pytest.raises(ValueError, match="its sha256 is"):
        check_inception(script)
    nonsense = tmp_path / "nonsense.pt"
    nonsense.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="neither a TorchScript file nor a state dict"):
        save(folder, nonsense)
    other = tmp_path / "other.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.ReLU()).save(str(other))
    with pytest.raises(ValueError, match="has not Inception's parts"):
        save(folder, other)
    torch.save({"conv.weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="has not Inception's last layer"):
        save(folder, other)
    assert not folder.exists()


class Harmful:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_state_dict_executes_nothing(tmp_path: Path):
    touched, weights = tmp_path / "touched", tmp_path / "weights.pth"
    torch.save({"fc.weight": Harmful(touched)}, weights)
    with pytest.raises(ValueError, match="neither a TorchScript file nor a state dict"):
        load_inception(weights, device=CPU)
    assert not touched.exists()


def test_a_state_dict_of_another_network_is_refused(inception_state: dict[str, Tensor]):
    state = inception_state | {"fc.weight": torch.zeros(5, 7)}
    with pytest.raises(ValueError, match=r"other.pth does not fit Inception"):
        inception_of(state, name="other.pth")


def test_download(tmp_path: Path):
    source, weights = tmp_path / "source.pt", tmp_path / "raw" / "inception.pt"
    source.write_bytes(b"weights")
    digest = sha256_of(source)
    with pytest.raises(ValueError, match="is there a network") as error:
        download_inception(weights, url=(tmp_path / "absent").as_uri(), sha256=digest)
    assert "set extractor.weights" in str(error.value)
    with pytest.raises(ValueError, match=f"gave a file of sha256 {digest}, expected 000"):
        download_inception(weights, url=source.as_uri(), sha256="0" * 64)
    assert not weights.exists()
    download_inception(weights, url=source.as_uri(), sha256=digest)
    assert weights.read_bytes() == b"weights"
    # what is there is not fetched again
    download_inception(weights, url=(tmp_path / "absent").as_uri(), sha256=digest)


# --- Scores beside the peers' -------------------------------------------------------------------


def test_scores_of_early_features_equal_torch_fidelity(
    tmp_path: Path, state_file: Path, inception_state: dict[str, Tensor]
):
    """Whole way from files to scores, on the 64 features after the first pooling: quick."""
    n, num_features = 24, 64
    network = inception_of(inception_state, name="random")
    assert isinstance(network.layers, nn.Sequential)
    early = nn.Sequential(*list(network.layers)[:4], nn.AdaptiveAvgPool2d(1))
    card = ExtractorCard(
        kind="inception",
        name="first layers",
        resizers=["legacy_tensorflow"],
        num_features=num_features,
        num_classes=5,
        image_size=None,
        width=None,
        val_accuracy=None,
        val_count=None,
        weights_sha256="0" * 64,
    )
    extractor = InceptionExtractor(Inception(early, torch.randn(5, num_features)), card, device=CPU)
    ours, theirs = [], []
    for seed, contrast in enumerate((60.0, 35.0)):
        images = peers.pictures(n, side=40, seed=seed, contrast=contrast)
        folder = peers.write_pngs(tmp_path / str(seed), images)
        parts = measure(
            images.split(10),
            extractor,
            reference=str(seed),
            start=0,
            num_images=n,
            kept=torch.arange(n),
            splits=None,
        )
        ours.append(parts["legacy_tensorflow"])
        theirs.append(peers.torch_fidelity_features(state_file, ["64"])(folder)["64"])
    subsets = {"num_subsets": 5, "subset_size": 16, "seed": 1}
    peer = peers.torch_fidelity_scores(*theirs, **subsets)
    found = fid.distance(*ours)
    assert found == pytest.approx(peer["frechet_inception_distance"], rel=1e-4)
    kid = kernel_distance(ours[0].kept, ours[1].kept, **subsets)
    peer_kid = peer["kernel_inception_distance_mean"], peer["kernel_inception_distance_std"]
    assert kid == pytest.approx(peer_kid, rel=1e-3)
    manifold = manifold_scores(ours[0].kept, ours[1].kept)
    expected = pytest.approx((peer["precision"], peer["recall"]))
    assert (manifold.precision, manifold.recall) == expected


@pytest.mark.slow
def test_scores_equal_all_three_libraries(tmp_path: Path, state_file: Path):
    """2048 features, each library's own resizer, network and formulas: docs/scores.md's table."""
    from cleanfid.fid import kernel_distance as clean_kid
    from torch_fidelity.metric_isc import isc_features_to_metric

    n = 8
    state = torch.load(state_file, weights_only=True)
    script = peers.write_script(tmp_path, state)
    folders = [
        peers.write_pngs(
            tmp_path / str(seed), peers.pictures(n, side=64, seed=seed, contrast=contrast)
        )
        for seed, contrast in enumerate((60.0, 35.0))
    ]
    extractor = fid.our_extractor(script, fid.RESIZERS)
    ours = [fid.measured(folder, extractor, n) for folder in folders]
    theirs = {
        "clean": list(map(peers.clean_fid_features(script, mode="clean"), folders)),
        "legacy_tensorflow": list(
            map(peers.clean_fid_features(script, mode="legacy_tensorflow"), folders)
        ),
        "legacy_pytorch": list(map(peers.pytorch_fid_features(state), folders)),
    }
    subsets = {"num_subsets": 5, "subset_size": n, "seed": 1}
    for resizer, features in theirs.items():
        for mine, peer in zip(ours, features, strict=True):
            np.testing.assert_allclose(mine[resizer].kept.numpy(), peer, rtol=1e-3, atol=1e-4)
        scores = peers.torch_fidelity_scores(*map(torch.from_numpy, features), **subsets)
        found = fid.distance(ours[0][resizer], ours[1][resizer])
        assert found == pytest.approx(scores["frechet_inception_distance"], rel=1e-3)
        kid, _ = kernel_distance(ours[0][resizer].kept, ours[1][resizer].kept, **subsets)
        assert kid == pytest.approx(clean_kid(features[1], features[0], num_subsets=1), rel=1e-3)
    peer = peers.torch_fidelity_features(state_file)(folders[0])
    isc = isc_features_to_metric(peer["logits_unbiased"], splits=fid.SPLITS, shuffle=False)
    sums = ours[0]["legacy_tensorflow"].sums
    expected = isc["inception_score_mean"], isc["inception_score_std"]
    assert sums.score() == pytest.approx(expected, rel=1e-3)
    assert inception_score(
        peer["logits_unbiased"].double().softmax(1), splits=fid.SPLITS
    ) == pytest.approx(expected, rel=1e-9)
