"""Whoever reads, every sample once; counted sample by sample."""

from itertools import chain, islice, product

from hypothesis import given
from hypothesis import strategies as st

from contradiff.data.order import Part, TrainingOrder, parts_of, share_of

each_size = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def samples_of(parts: list[Part]) -> list[tuple[int, int]]:
    return [(part.shard, place) for part in parts for place in range(part.first, part.last)]


def all_samples(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]


@given(sizes=each_size, world_size=st.integers(1, 12))
def test_shares_are_disjoint_complete_and_equal(sizes: list[int], world_size: int):
    shares = [share_of(sum(sizes), rank=rank, world_size=world_size) for rank in range(world_size)]
    found = [samples_of(parts_of(sizes, share, order=range(len(sizes)))) for share in shares]
    assert list(chain(*found)) == all_samples(sizes)
    assert [len(share) for share in shares] == [len(samples) for samples in found]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def streams_of(order: TrainingOrder, epoch: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """What each stream takes in an epoch, by a counting of turns of its own."""
    turns = dict.fromkeys(
        ((lane, phase) for lane in range(order.num_lanes) for phase in range(order.num_phases)), 0
    )
    for step in range(order.steps_per_epoch):
        for lane in range(order.num_lanes):
            turns[lane, step % order.num_phases] += 1
    found = {}
    for (lane, phase), number in turns.items():
        samples = samples_of(order.parts(epoch=epoch, lane=lane, phase=phase))
        shuffled = order.shuffled(samples, epoch=epoch, lane=lane, phase=phase)
        found[lane, phase] = list(islice(shuffled, number * order.rows_per_lane))
        assert len(found[lane, phase]) == number * order.rows_per_lane
    return found


@given(sizes=each_size, batch_size=st.integers(1, 64), epoch=st.integers(0, 3))
def test_no_sample_twice_and_only_what_fills_no_batch_left_out(
    sizes: list[int], batch_size: int, epoch: int
):
    order = TrainingOrder(tuple(sizes), batch_size, seed=0)
    if order.steps_per_epoch == 0:
        return
    taken = list(chain(*streams_of(order, epoch).values()))
    assert len(taken) == len(set(taken)) == sum(sizes) // batch_size * batch_size
    parts = [
        order.parts(epoch=epoch, lane=lane, phase=phase)
        for lane in range(order.num_lanes)
        for phase in range(order.num_phases)
    ]
    assert sorted(samples_of(list(chain(*parts)))) == all_samples(sizes)


@given(rows=st.integers(1, 24), world_size=st.integers(1, 9), num_shards=st.integers(1, 70))
def test_processes_have_all_rows_in_order(rows: int, world_size: int, num_shards: int):
    order = TrainingOrder((10,) * num_shards, rows * world_size, seed=0)
    assert order.num_lanes * order.rows_per_lane == order.batch_size
    found = [
        [lane * order.rows_per_lane + row for lane, own in order.rows_of(**who) for row in own]
        for who in ({"rank": rank, "world_size": world_size} for rank in range(world_size))
    ]
    assert list(chain(*found)) == list(range(rows * world_size))
    assert {len(of_rank) for of_rank in found} == {rows}


def test_up_to_64_readers_share_64_equal_shards_without_reading_any_twice():
    order = TrainingOrder((64,) * 64, 64, seed=1)
    shards = {
        (lane, phase): {part.shard for part in order.parts(epoch=0, lane=lane, phase=phase)}
        for lane, phase in product(range(8), range(8))
    }
    for world_size, num_workers in product((1, 2, 4, 8), repeat=2):
        read: dict[tuple[int, int], set[int]] = {}
        for rank, step in product(range(world_size), range(order.steps_per_epoch)):
            for lane, _ in order.rows_of(rank=rank, world_size=world_size):
                found = shards[lane, step % order.num_phases]
                read.setdefault((rank, step % num_workers), set()).update(found)
        assert len(read) == world_size * num_workers
        assert sorted(chain(*read.values())) == list(range(64))


def test_paper_scale_reads_little_twice():
    """313 shards of ImageNet: a shard that is cut is read, up to the cut, by both."""
    sizes = (4096,) * 312 + (1281167 - 312 * 4096,)
    order = TrainingOrder(sizes, 512, seed=0)
    assert (order.num_lanes, order.num_phases) == (8, 8)
    parts = [order.parts(epoch=0, lane=i, phase=j) for i in range(8) for j in range(8)]
    read = sum(part.last for of_stream in parts for part in of_stream)
    assert read / sum(sizes) < 1.15


def test_order_depends_on_seed_and_epoch():
    def of(seed: int, epoch: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
        return streams_of(TrainingOrder((5,) * 8, 8, seed), epoch)

    assert of(0, 0) == of(0, 0)
    assert of(0, 0) != of(0, 1)
    assert of(0, 0) != of(1, 0)
