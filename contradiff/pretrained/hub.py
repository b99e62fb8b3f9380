"""Download from and upload to the Hugging Face hub. Nothing else here uses the network."""

import re
from pathlib import Path

from contradiff.base.config import CONFIG_FILES, WEIGHT_FILES
from contradiff.pretrained.folder import CARD_NAME, CONFIG_NAME, BaseReference

MODEL_FILES = (CONFIG_NAME, CARD_NAME, "*.safetensors", "base/*")


def find_model(path_or_id: str | Path, *, revision: str | None) -> Path:
    """Return the folder of an export, which is downloaded if `path_or_id` is an id on the hub.

    Raises ValueError if there is neither a folder nor an id, ConnectionError if the hub fails.
    """
    if Path(path_or_id).is_dir():
        if revision is not None:
            raise ValueError(
                f"{path_or_id}: only an id on the hub has a revision, no folder has one"
            )
        return Path(path_or_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        raise ValueError(f"{path_or_id}: no such folder, and no id on the hub, such as user/name")
    return _download(str(path_or_id), revision, MODEL_FILES)


def find_base(folder: Path, base: BaseReference, *, given: str | Path | None) -> Path:
    """Return the folder of the base: `given`, or the one in the export, or one from the hub.

    Raises ValueError if there is none, ConnectionError if the hub fails.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise ValueError(f"base: {given}: no such folder")
        return Path(given)
    if (folder / "base").is_dir():
        return folder / "base"
    if base.revision is not None:
        return _download(base.path, base.revision, (*CONFIG_FILES, *WEIGHT_FILES))
    raise ValueError(
        f"{folder}: the base model is not in it. It was trained on the folder {base.path}, whose "
        f"unet has the sha256 {base.sha256['unet']}; give this folder as base=PATH"
    )


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload an export as `repo_id`, which is created if need be; return the commit's address.

    The token is that of `hf auth login`, or in HF_TOKEN. Raises ConnectionError if the hub fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload of contradiff"
        )
    except Exception as error:
        raise ConnectionError(
            f"{repo_id}: the upload failed ({error}). Log in with `hf auth login`, and check that "
            "you may write there"
        ) from error
    return done.commit_url


def _download(repo_id: str, revision: str | None, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        raise ConnectionError(
            f"{repo_id}: could not be fetched from the hub at {revision or 'its newest commit'} "
            f"({error})"
        ) from error
