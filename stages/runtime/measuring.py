"""What the stages reference and score share: a set of images, measured by all processes."""

from stages.runtime.run import Run

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from contradiff.data.shards import Shard
from contradiff.evaluation.extractors import Extractor
from contradiff.evaluation.measuring import Batches, FeatureSet, measure_shards, merge_shards

if TYPE_CHECKING:
    from accelerate import Accelerator


def measure_set(
    shards: Sequence[Shard],
    read: Callable[[Shard], Batches],
    extractor: Extractor,
    work: Path,
    *,
    run: Run,
    accelerator: "Accelerator",
    reference: str,
    num_kept: int,
    splits: int | None,
    seed: int,
) -> dict[str, FeatureSet]:
    """Measure this process's shards, wait for the others, and join all on the main process.

    Args:
        shards: of the set, in order.
        read: yields the batches of one shard.
        extractor: as from `load_extractor`.
        work: the run's folder, which all processes share.
        run: shows the progress, of each process's own share.
        accelerator: of the run.
        reference: what the set is, in words.
        num_kept: at most so many images' features are kept.
        splits: of the inception score; none: no inception score.
        seed: of the choice of kept images.

    Returns:
        Features by resizer; nothing on other processes.
    """
    accelerator.wait_for_everyone()  # the main process holds the folder's lock
    own = shards[accelerator.process_index :: accelerator.num_processes]
    with run.progress("features", sum(shard.num_samples for shard in own)) as advance:
        measure_shards(
            [(shard.num_samples, partial(read, shard)) for shard in shards],
            extractor,
            work,
            reference=reference,
            num_kept=num_kept,
            splits=splits,
            seed=seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            on_progress=advance,
        )
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    return merge_shards(work, num_shards=len(shards), resizers=extractor.card.resizers)
