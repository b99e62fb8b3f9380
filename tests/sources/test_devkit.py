"""Against torchvision's reader, and what a broken kit is told."""

from pathlib import Path

import pytest
from torchvision.datasets import imagenet as torchvision_imagenet

from contradiff.sources.devkit import read_devkit
from tests.sources.imagenet_layouts import ILSVRC_IDS, WNIDS, tar_of, write_devkit

TRUTH = [898, 450, 1, 1, 450]
ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"


@pytest.mark.parametrize("packed", [True, False])
def test_classes_are_those_that_torchvision_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
):
    write_devkit(tmp_path, TRUTH)  # torchvision reads the archive alone
    monkeypatch.setattr(torchvision_imagenet, "_verify_archive", lambda *_: None)
    torchvision_imagenet.parse_devkit_archive(tmp_path)
    names, wnids = torchvision_imagenet.load_meta_file(tmp_path)
    if not packed:
        write_devkit(tmp_path, TRUTH, packed=False)
        (tmp_path / ARCHIVE).unlink()
    kit = read_devkit(tmp_path)
    by_id = {number: wnid for wnid, number in ILSVRC_IDS.items()}
    assert list(kit.wnids) == wnids == [by_id[number] for number in TRUTH]
    assert kit.names == {wnid: words[0] for wnid, words in names.items()}
    assert sorted(kit.names) == list(WNIDS)  # synsets with children are no classes


def test_a_data_folder_alone_will_do(tmp_path: Path):
    write_devkit(tmp_path, TRUTH, packed=False)
    (tmp_path / "ILSVRC2012_devkit_t12/data").rename(tmp_path / "data")
    assert len(read_devkit(tmp_path).wnids) == 5


def test_missing_kit_is_named(tmp_path: Path):
    expected = r"data\.root: .* lacks ILSVRC2012_devkit_t12\.tar\.gz \(or unpacked, .*meta\.mat"
    with pytest.raises(ValueError, match=expected):
        read_devkit(tmp_path)


def test_truncated_kit_is_named(tmp_path: Path):
    write_devkit(tmp_path, TRUTH)
    content = (tmp_path / ARCHIVE).read_bytes()
    (tmp_path / ARCHIVE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf".*/{ARCHIVE} is damaged or truncated"):
        read_devkit(tmp_path)


def test_kit_without_its_files_is_named(tmp_path: Path):
    import gzip

    (tmp_path / ARCHIVE).write_bytes(gzip.compress(tar_of([("kit/data/meta.mat", b"x")])))
    expected = rf"{ARCHIVE} lacks data/ILSVRC2012_validation_ground_truth\.txt"
    with pytest.raises(ValueError, match=expected):
        read_devkit(tmp_path)


@pytest.mark.parametrize("wrong", ["1001", "2", "n01440764", "", "-1"])
def test_unknown_class_is_named(tmp_path: Path, wrong: str):
    """1001 is a synset with children, no class."""
    write_devkit(tmp_path, [450, wrong, 1])
    expected = rf"ground_truth\.txt: line 2 is no ILSVRC2012_ID of a class of meta\.mat: '{wrong}'"
    with pytest.raises(ValueError, match=expected):
        read_devkit(tmp_path)


def test_unreadable_table_is_named(tmp_path: Path):
    write_devkit(tmp_path, TRUTH, packed=False)
    meta = tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat"
    content = meta.read_bytes()
    for broken in (b"", b"no matlab", content[:300], content.replace(b"synsets", b"synsetz")):
        meta.write_bytes(broken)
        with pytest.raises(ValueError, match=r".*: meta\.mat has no readable table `synsets`"):
            read_devkit(tmp_path)
