import time

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from mlx_cm import rng
from mlx_cm.errors import UsageError
from mlx_cm.rng import NOISE_SOURCES, expand_seeds, mlx_noise, replay_noise, torch_noise

TORCH_SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1]


def generator(seed):
    return torch.Generator("cpu").manual_seed(seed)


def bits(array):
    return np.array(array).view(np.int32)


def assert_torchs_draw(ours, theirs):
    """Bit for bit where torch takes its AVX2 path; elsewhere it calls the C library, whose last bits are its own."""
    if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}:
        assert_same_bits(ours, theirs)
    else:
        np.testing.assert_allclose(np.array(ours), theirs, rtol=0, atol=4e-6)


def assert_same_bits(ours, theirs):
    ours, theirs = bits(ours), bits(theirs)
    assert ours.shape == theirs.shape
    assert np.array_equal(ours, theirs), f"{np.count_nonzero(ours != theirs)} of {ours.size} differ"


# --- torch's stream


@pytest.mark.parametrize("seed", TORCH_SEEDS)
def test_every_small_size_has_torchs_bits(seed):
    for size in (*range(1, 50), 100, 623, 624, 625, 1000, 1249, 3 * 64 * 64):
        ours = torch_noise([seed])((1, size), 0)
        assert_torchs_draw(ours, torch.randn((1, size), generator=generator(seed)).numpy())


def test_a_million_values_have_torchs_bits():
    ours = torch_noise([7])((1, 1 << 20), 0)
    assert_torchs_draw(ours, torch.randn((1, 1 << 20), generator=generator(7)).numpy())


def test_successive_draws_of_mixed_sizes_follow_one_stream():
    # Odd scalar draws leave half a Box-Muller pair behind, which outlives the block draws between them.
    sizes = [3, 5, 17, 1, 16, 15, 2, 100, 1, 31, 7]
    noise, reference = torch_noise([11]), generator(11)
    for index, size in enumerate(sizes):
        assert_torchs_draw(noise((1, size), index), torch.randn((1, size), generator=reference).numpy())


@pytest.mark.parametrize("inner", [(64, 64, 4), (32, 32, 3), (5, 7, 3), (2, 1, 3), (9,), (3, 4, 5, 2), ()])
def test_a_batch_is_diffusers_list_of_generators(inner):
    seeds = [3, 2**32 + 3, 99]
    noise, references = torch_noise(seeds), [generator(seed) for seed in seeds]
    channels_first = inner[-1:] + inner[:-1]
    for index in range(3):
        theirs = randn_tensor((len(seeds), *channels_first), generator=references).numpy()
        ours = noise((len(seeds), *inner), index)
        assert ours.dtype == mx.float32
        assert_torchs_draw(ours, np.moveaxis(theirs, 1, -1) if inner else theirs)


def test_the_ends_and_turning_points_of_the_polynomials_have_torchs_bits():
    """Torch is made to draw chosen uniforms, through a generator state whose next words are known."""
    turning_points = [int(2**24 * eighth / 8) for eighth in range(8)]
    chosen = [0, 1, 2, 3, 2**24 - 2, 2**24 - 1, int(2**24 * (1 - 0.5**0.5)), 2**23, 2**22]
    chosen += [point + offset for point in turning_points for offset in (-1, 0, 1) if point + offset >= 0]
    pairs = np.array([(a, b) for a in chosen for b in chosen], dtype=np.uint64)
    for start in range(0, len(pairs) - 7, 8):
        words = pairs[start : start + 8].T.reshape(-1)
        state = generator(0).get_state().numpy().copy()
        fields = state[:5016].view(np.uint64)  # seed, left and seeded, next, 624 words
        fields[1], fields[2] = 1 << 32 | 624, 0
        fields[3 : 3 + 16] = untemper(words)
        fixed = torch.Generator("cpu")
        fixed.set_state(torch.from_numpy(state))
        assert_torchs_draw(rng._box_muller_blocks(words), torch.randn(16, generator=fixed).numpy())


def untemper(words):
    """Inverts the Mersenne Twister's output function."""
    y = words.astype(np.uint32)
    y ^= y >> np.uint32(18)
    y ^= y << np.uint32(15) & np.uint32(0xEFC60000)
    x = y
    for _ in range(5):
        x = y ^ (x << np.uint32(7) & np.uint32(0x9D2C5680))
    z = x
    for _ in range(3):
        z = x ^ (z >> np.uint32(11))
    return z


def test_torchs_stream_goes_forward_only():
    noise = torch_noise([1])
    noise((1, 4), 0)
    noise((1, 4), 2)
    for index in (2, 1, 0):
        with pytest.raises(UsageError, match=f"draw {index} was asked for after draw 2"):
            noise((1, 4), index)


def test_a_left_out_index_draws_nothing():
    noise, reference = torch_noise([1]), generator(1)
    for index in (0, 3):
        assert_torchs_draw(noise((1, 20), index), torch.randn((1, 20), generator=reference).numpy())


def test_a_draw_takes_a_few_times_as_long_as_numpys():
    noise, reference = torch_noise([1]), np.random.RandomState(1)
    shape = (1, 64, 64, 4)

    def fastest(draw) -> float:
        times = []
        for index in range(5):
            start = time.perf_counter()
            draw(index)
            times.append(time.perf_counter() - start)
        return min(times)

    ours, numpys = fastest(lambda index: noise(shape, index)), fastest(lambda _: reference.standard_normal(shape))
    assert ours < 20 * numpys  # it takes 5 times as long, the generator alone in Python 40 times


# --- MLX's keys


def test_mlx_noise_is_a_pure_function_of_seed_and_index():
    forwards, backwards = mlx_noise([5, 6]), mlx_noise([5, 6])
    shape = (2, 8, 8, 3)
    first = [forwards(shape, index) for index in range(4)]
    second = [backwards(shape, index) for index in reversed(range(4))][::-1]
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    assert_same_bits(forwards(shape, 1), first[1])


def test_an_image_does_not_depend_on_its_batch():
    shape = (16, 8, 3)
    whole = mlx_noise([4, 9, 2**64 - 1])((3, *shape), 2)
    for k, seed in enumerate([4, 9, 2**64 - 1]):
        assert_same_bits(whole[k : k + 1], mlx_noise([seed])((1, *shape), 2))


def test_mlx_draws_are_distinct_and_standard_normal():
    seeds = [0, 1, 2, 3, 2**32, 2**32 + 1]
    draws = np.concatenate([np.array(mlx_noise(seeds)((6, 4096), index)) for index in (0, 1, 2, 3, 2**32 - 3)])
    assert draws.dtype == np.float32
    correlation = np.corrcoef(draws)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.1
    assert abs(draws.mean()) < 0.02
    assert abs(draws.std() - 1) < 0.02
    assert abs((draws**4).mean() - 3) < 0.15


@pytest.mark.parametrize("make", NOISE_SOURCES.values(), ids=NOISE_SOURCES.keys())
@pytest.mark.parametrize(("shape", "index"), [((3, 4), 0), ((), 0), ((2, 4), -3), ((2, 4), 2**32)])
def test_a_request_that_does_not_fit_is_refused(make, shape, index):
    with pytest.raises(UsageError, match="noise"):
        make([1, 2])(shape, index)


# --- replay


def test_replay_returns_the_given_arrays():
    arrays = [np.arange(6.0).reshape(1, 2, 3), mx.ones((1, 4), dtype=mx.float16)]
    noise = replay_noise(arrays)
    for index, array in enumerate(arrays):
        replayed = noise(array.shape, index)
        assert replayed.dtype == mx.float32
        assert np.array_equal(np.array(replayed), np.array(array, dtype=np.float32))


@pytest.mark.parametrize(
    ("shape", "index", "message"),
    [((1, 3, 2), 0, "has shape"), ((1, 2, 3), 1, "only 1 are there"), ((1, 2, 3), -1, "only 1 are there")],
)
def test_replay_refuses_what_it_has_not(shape, index, message):
    with pytest.raises(UsageError, match=message):
        replay_noise([np.zeros((1, 2, 3))])(shape, index)


# --- seeds


@pytest.mark.parametrize(
    ("seeds", "count", "expected"),
    [
        (7, 1, [7]),
        (7, 3, [7, 8, 9]),
        ([7], 2, [7, 8]),
        ((20, 10), 2, [20, 21, 10, 11]),
        (np.int64(3), 2, [3, 4]),
        (2**64 - 2, 2, [2**64 - 2, 2**64 - 1]),
    ],
)
def test_seeds_expand(seeds, count, expected):
    assert expand_seeds(seeds, count) == expected


@pytest.mark.parametrize(
    ("seeds", "count", "message"),
    [
        ([1, 2], 2, r"seeds: 2 would"),
        ([5, 5], 1, r"seeds: 5 would"),
        (1, 0, "count 0"),
        ([], 1, "at least one seed"),
        (-1, 1, "seed -1"),
        (2**64, 1, "expected 0 <= seed"),
        (2**64 - 1, 2, "expected 0 <= seed"),
        (1.5, 1, "whole number"),
        ("12", 1, "whole number"),
    ],
)
def test_seeds_that_cannot_be_are_refused(seeds, count, message):
    with pytest.raises(UsageError, match=message):
        expand_seeds(seeds, count)


@pytest.mark.parametrize("make", NOISE_SOURCES.values(), ids=NOISE_SOURCES.keys())
@pytest.mark.parametrize("seeds", [[], [-1], [2**64], ["1"]])
def test_sources_refuse_impossible_seeds(make, seeds):
    with pytest.raises(UsageError):
        make(seeds)
