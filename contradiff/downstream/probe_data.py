"""Which cached features a probe is trained on, and which it is judged by."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contradiff.data.subsets import is_dev
from contradiff.features.cache import FeatureCache, Rows


class ProbeData:
    """Train and val of a cache; or, to choose settings, nine tenths of train and the tenth."""

    def __init__(self, cache: FeatureCache, *, dev: bool) -> None:
        """Draw the line; no features are read yet.

        Raises:
            ValueError: a side is empty; names probe.split.
        """
        self.cache, self._dev = cache, dev
        held_out = torch.tensor([dev and is_dev(key) for key in cache.keys("train")])
        self._train_rows = (~held_out).nonzero().squeeze(1)
        self._dev_rows = held_out.nonzero().squeeze(1)
        if dev and not (len(self._dev_rows) and len(self._train_rows)):
            raise ValueError(
                f"probe.split: dev holds out {len(self._dev_rows)} of {len(held_out)} training "
                "images (a tenth, by their keys); use more images, or probe.split: val"
            )

    def labels(self) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " judged"]]:
        """Classes of the training and of the judged images."""
        train = self.cache.labels("train")
        judged = train[self._dev_rows] if self._dev else self.cache.labels("val")
        return train[self._train_rows], judged

    def column(self, name: str) -> tuple[Float[Tensor, "train d"], Float[Tensor, "judged d"]]:
        """A column's features, in memory."""
        train = self.cache.column("train", name)
        judged = train[self._dev_rows] if self._dev else self.cache.column("val", name)
        return train[self._train_rows], judged

    def maps(self) -> tuple[Rows, Rows]:
        """The main triple's maps, memory-mapped.

        Raises:
            ValueError: the cache has none.
        """
        train = self.cache.maps("train")
        judged = train.only(self._dev_rows) if self._dev else self.cache.maps("val")
        return train.only(self._train_rows), judged
