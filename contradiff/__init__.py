"""ContraDiff: one latent diffusion model that classifies and generates.

The names below are for users of a trained model. They are imported on first use, so that
`import contradiff` loads none of the heavy libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contradiff.pretrained.model import ContraDiff
    from contradiff.pretrained.pipeline import ContraDiffPipeline
    from contradiff.pretrained.project import export
    from contradiff.pretrained.transformer import ContraDiffFeatures

    __version__: str

__all__ = ["ContraDiff", "ContraDiffFeatures", "ContraDiffPipeline", "__version__", "export"]

_MODULES = {
    "ContraDiff": "model",
    "ContraDiffFeatures": "transformer",
    "ContraDiffPipeline": "pipeline",
    "export": "project",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # pyproject.toml has it
        from importlib.metadata import version

        return version("contradiff")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.pretrained.{_MODULES[name]}"), name)
