"""The order of training: what every step sees, from nothing but seed and step."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cm.errors import UsageError
from mlx_cm.training.order import Order, Purpose, random_bits

counts, sizes, seeds = st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**64 - 1)
KNOWN = [[8, 4, 1, 6], [3, 2, 7, 5], [9, 0, 2, 5], [4, 7, 0, 8]]  # steps 0, 1, 2 and 1000
KNOWN_BUCKETS = [[0, 4], [3, 2], [1, 4], [1, 0]]
bucketed = st.lists(st.sampled_from("abcde"), min_size=1, max_size=40)


def stream(order: Order, steps: int) -> list[int]:
    return [index for step in range(steps) for index in order.batch(step)]


@given(counts, sizes, seeds)
@settings(max_examples=100, deadline=None)
def test_every_epoch_is_a_permutation_and_no_batch_is_short(count, batch_size, seed):
    order = Order(count, batch_size, seed)
    steps = -(-3 * count // batch_size)
    assert all(len(order.batch(step)) == batch_size for step in range(steps))
    seen = stream(order, steps)
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(bucketed, sizes, seeds)
@settings(max_examples=100, deadline=None)
def test_batches_are_of_one_bucket_and_every_bucket_goes_through_permutations(buckets, batch_size, seed):
    order = Order(len(buckets), batch_size, seed, buckets)
    streams: dict[str, list[int]] = {}
    for step in range(30):
        batch = order.batch(step)
        assert len(batch) == batch_size
        (bucket,) = {buckets[index] for index in batch}
        streams.setdefault(bucket, []).extend(batch)
    for bucket, seen in streams.items():
        members = [index for index, one in enumerate(buckets) if one == bucket]
        for start in range(0, len(seen) - len(members) + 1, len(members)):
            assert sorted(seen[start : start + len(members)]) == members


@given(bucketed, sizes, seeds, st.lists(st.integers(0, 300), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_batch_does_not_depend_on_what_was_asked_before(buckets, batch_size, seed, steps):
    used = Order(len(buckets), batch_size, seed, buckets)
    for step in steps:
        assert used.batch(step) == Order(len(buckets), batch_size, seed, buckets).batch(step)


def test_pictures_of_small_and_large_buckets_come_equally_often():
    buckets = ["wide"] * 1 + ["tall"] * 5 + ["square"] * 50
    order = Order(len(buckets), 8, 3, buckets)
    seen = Counter(stream(order, 700))  # 100 epochs
    assert set(seen) == set(range(56))
    assert all(abs(count - 100) <= 8 for count in seen.values()), seen  # a batch of one picture comes every 8 epochs


def test_buckets_are_interleaved_and_not_in_the_same_way_in_every_epoch():
    buckets = ["a"] * 64 + ["b"] * 64
    order = Order(128, 8, 0, buckets)
    epochs = ["".join(buckets[order.batch(step)[0]] for step in range(16 * e, 16 * e + 16)) for e in range(4)]
    assert all(epoch.count("a") == 8 for epoch in epochs)
    assert all("aaaaaaaa" not in epoch for epoch in epochs)
    assert len(set(epochs)) == 4


def test_epochs_and_seeds_differ():
    order = Order(30, 30, 0)
    assert order.batch(0) != order.batch(1)
    assert order.batch(0) != Order(30, 30, 1).batch(0)
    assert order.batch(0) != list(range(30))
    assert [order.epoch(step) for step in (0, 1, 5)] == [0, 1, 5]
    assert Order(30, 45, 0).epoch(2) == 3.0


def test_a_known_order_stays():
    """Runs of an earlier version go on as they began, whatever NumPy is installed."""
    assert [Order(10, 4, 7).batch(step) for step in (0, 1, 2, 1000)] == KNOWN
    assert [Order(5, 2, 2**64 - 1, "aabba").batch(step) for step in range(4)] == KNOWN_BUCKETS


def test_random_bits_of_different_uses_differ():
    arguments = [(0, Purpose.ORDER, 0), (1, Purpose.ORDER, 0), (0, Purpose.AUGMENTATION, 0), (0, Purpose.ORDER, 1)]
    words = [random_bits(*one).random_raw() for one in arguments] + [random_bits(0, Purpose.ORDER, 0, 1).random_raw()]
    assert len(set(words)) == len(words)
    assert random_bits(0, Purpose.ORDER, 0).random_raw() == words[0]
    # The counter's words: drawing on from one index, bucket or step never leads into another's numbers.
    many = [tuple(random_bits(0, Purpose.ORDER, index).random_raw(64)) for index in range(8)]
    assert len({word for one in many for word in one}) == 8 * 64


@pytest.mark.parametrize("arguments", [(0, 4, 0), (3, 0, 0), (3, 4, 0, ["a", "b"])])
def test_impossible_orders_are_refused(arguments):
    with pytest.raises(UsageError, match="order"):
        Order(*arguments)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        Order(3, 2, seed).batch(0)


def test_steps_and_rows_out_of_range_are_refused():
    order = Order(3, 4, 0)
    with pytest.raises(UsageError, match="step -1"):
        order.batch(-1)
    assert [order.checked_stop(0, None), order.checked_stop(1, 3)] == [4, 3]
    for start, stop in [(-1, 2), (2, 2), (0, 5), (4, None)]:
        with pytest.raises(UsageError, match="rows"):
            order.checked_stop(start, stop)
