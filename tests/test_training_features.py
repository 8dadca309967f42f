"""Latents and features of captions: computed once, kept by content and model, the same however often and by whom."""

import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from parity import channels_last, relative_error
from PIL import Image
from tiny_latent import autoencoder, native_pipeline

from mlx_cm.errors import DiskError, ModelError, OutputError, UsageError
from mlx_cm.images import from_pil
from mlx_cm.training import feature_store
from mlx_cm.training.data import DataSettings, PictureData, make_order, open_data, target_sizes
from mlx_cm.training.feature_store import FeatureStore, Item
from mlx_cm.training.features import LatentBatches, variant_draws
from mlx_cm.training.order import Order
from mlx_cm.training.preparation import micro_conditioning, prepare

SQUARE = DataSettings(16)
CUT = DataSettings(16, crop="random", flip=True, variants=3)


def encoded(seed: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_folder(root: Path, count: int = 6) -> Path:
    """Pictures of several shapes; the last one has no caption, and two share one."""
    root.mkdir()
    for number in range(count):
        (root / f"{number}.png").write_bytes(encoded(number, width=60 + 3 * number, height=26))
        if number < count - 1:
            (root / f"{number}.txt").write_text(f"picture {number // 2}")
    return root


class Encoder:
    """Stands for an autoencoder and text encoders: cheap, different for different input, and counted."""

    def __init__(self, fail_after: int | None = None):
        self.pictures: list[str] = []  # digests of what was encoded
        self.texts: list[str] = []
        self.fail_after = fail_after

    def encode_pictures(self, x: mx.array) -> tuple[mx.array, mx.array]:
        assert x.dtype == mx.float32
        if self.fail_after is not None and len(self.pictures) + len(x) > self.fail_after:
            raise KeyboardInterrupt
        self.pictures += [hashlib.sha256(row.tobytes()).hexdigest() for row in np.array(x)]
        blocks = x.reshape(len(x), x.shape[1] // 4, 4, x.shape[2] // 4, 4, 3)
        return blocks.mean(axis=(2, 4)), mx.sqrt(blocks.var(axis=(2, 4)))

    def encode_prompts(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        self.texts += texts
        states = mx.array([[[len(text), token, sum(map(ord, text))] for token in range(5)] for text in texts])
        return states.astype(mx.float16), states[:, 0, :2].astype(mx.float32)


@pytest.fixture
def data(tmp_path) -> PictureData:
    return open_data(make_folder(tmp_path / "d"))


def make(data: PictureData, encoder: Encoder, settings: DataSettings = SQUARE, **options) -> LatentBatches:
    options = {"picture_model": "a", "prompt_model": "b", "encode_prompts": encoder.encode_prompts} | options
    order = make_order(data, settings, options.pop("rows", 4), 0)
    return LatentBatches(data, order, settings, 5, encode_pictures=encoder.encode_pictures, **options)


def equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


# --- what a batch holds


def test_a_batch_is_what_the_encoders_make_of_its_pictures_and_captions(data):
    rows = make(data, Encoder()).load(3)
    indices = Order(6, 4, 0).batch(3)
    x = mx.concatenate([from_pil(Image.fromarray(prepare(data.read(index), SQUARE))) for index in indices])
    mean, std = Encoder().encode_pictures(x)
    states, pooled = Encoder().encode_prompts([data.captions[index] or "" for index in indices])
    assert equal(rows, {"mean": mean, "std": std, "states": states, "pooled": pooled})
    assert [rows[name].dtype for name in ("mean", "std", "states")] == [mx.float32, mx.float32, mx.float16]
    assert 5 in [index for step in range(3) for index in Order(6, 4, 0).batch(step)]  # the one without a caption


@pytest.mark.parametrize("family", ["lcm", "xl"])
def test_real_encoders_give_what_diffusers_and_transformers_train_on(data, family):
    pipeline = native_pipeline(family)
    vae, reference = pipeline.autoencoder, autoencoder("kl")[1]

    def encode(x: mx.array) -> tuple[mx.array, mx.array]:
        mean, logvar = vae.encode(x)
        return vae.to_scaled(mean), mx.exp(0.5 * logvar) * vae.config.scaling_factor

    settings = DataSettings((32, 16))
    order = Order(6, 4, 0)
    batches = LatentBatches(
        data, order, settings, encode_pictures=encode, encode_prompts=pipeline.encode_prompt, picture_model="kl",
        prompt_model=family, with_time_ids=family == "xl",
    )  # fmt: skip
    rows = batches.load(1)
    x = np.stack([prepare(data.read(index), settings) for index in order.batch(1)]).astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist
    factor = reference.config.scaling_factor
    assert relative_error(rows["mean"], posterior.mean * factor) < 1e-5
    assert relative_error(rows["std"], posterior.std * factor) < 1e-5
    features = pipeline.encode_prompt([data.captions[index] or "" for index in order.batch(1)])
    assert np.allclose(rows["states"], features.states, atol=1e-5)
    assert set(rows) == {"mean", "std", "states"} | ({"pooled", "time_ids"} if family == "xl" else set())
    if family == "xl":
        assert np.allclose(rows["pooled"], features.pooled, atol=1e-5)
        assert rows["time_ids"].tolist() == [[*data.sizes[index], *PLACES[index], 32, 16] for index in order.batch(1)]
    assert channels_last(posterior.mean).shape == rows["mean"].shape


# Covering (32, 16) a picture of height 26 is 32 high, and of width w it is 32 w / 26 wide; half of the rest is left.
PLACES = [(0, (round(32 * (60 + 3 * number) / 26) - 16) // 2) for number in range(6)]


def test_an_autoencoder_without_deviation_has_none(data, tmp_path):
    for number, deviation in enumerate([lambda mean: None, mx.zeros_like]):
        encode = lambda x, deviation=deviation: (x[:, ::8, ::8], deviation(x[:, ::8, ::8]))  # noqa: E731
        order, root = make_order(data, SQUARE, 4, 0), tmp_path / str(number)
        rows = LatentBatches(
            data, order, SQUARE, encode_pictures=encode, picture_model="tiny", root=root,
            encode_prompts=Encoder().encode_prompts,
        ).load(0)  # fmt: skip
        assert rows["mean"].shape == rows["std"].shape == (4, 2, 2, 3)
        assert not rows["std"].any()
        (shard,) = root.glob("latents-*/*.safetensors")
        assert ".std" not in shard.read_bytes()[:2000].decode("latin-1")


def test_slices_of_a_batch_make_up_the_whole_and_steps_do_not_depend_on_each_other(data):
    batches = make(data, Encoder(), CUT, with_time_ids=True, rows=7)
    for step in (4, 0, 4):
        whole = batches.load(step)
        pieces = [batches.load(step, start, stop) for start, stop in ((0, 2), (2, 3), (3, None))]
        assert equal({name: mx.concatenate([piece[name] for piece in pieces]) for name in whole}, whole)
    with pytest.raises(UsageError, match="rows 3 to 3"):
        batches.load(0, 3, 3)


def test_token_ids_for_text_encoders_that_are_trained(data):
    def tokenize(texts: list[str]) -> list[mx.array]:
        ids = mx.array([[len(text), 7, sum(map(ord, text)) % 1000] for text in texts])
        return [ids, ids[:, :2] + 1]

    batches = make(data, Encoder(), encode_prompts=None, tokenize=tokenize)
    rows, indices = batches.load(2), Order(6, 4, 0).batch(2)
    first, second = tokenize([data.captions[index] or "" for index in indices])
    assert set(rows) == {"mean", "std", "ids", "ids_2"}
    assert rows["ids"].dtype == mx.int32
    assert mx.array_equal(rows["ids"], first)
    assert mx.array_equal(rows["ids_2"], second)
    assert set(make(data, Encoder(), encode_prompts=None, tokenize=lambda texts: tokenize(texts)[:1]).load(0)) == {
        "mean", "std", "ids",
    }  # fmt: skip
    assert mx.array_equal(batches.prompt_rows([""])["ids"], tokenize([""])[0])


def test_rows_of_prompts_beside_the_captions(data):
    batches = make(data, Encoder(), prompts=("", "ugly"))
    states, pooled = Encoder().encode_prompts(["ugly", "", "picture 1"])
    assert equal(batches.prompt_rows(["ugly", "", "picture 1"]), {"states": states, "pooled": pooled})
    with pytest.raises(UsageError, match="was not encoded"):
        batches.prompt_rows(["pretty"])


def test_half_precision_features_are_kept_whole(data):
    wide = mx.array([[[1.0, 3e38, 2**-120, 1 + 2**-7]]]).astype(mx.bfloat16)
    batches = make(data, Encoder(), encode_prompts=lambda texts: (mx.repeat(wide, len(texts), axis=0), None))
    rows = batches.load(0)
    assert "pooled" not in rows
    assert mx.array_equal(rows["states"].astype(mx.bfloat16), mx.repeat(wide, 4, axis=0))


# --- variants


def test_variants_are_crops_and_flips_of_the_picture_and_all_are_used(data):
    encoder = Encoder()
    batches = make(data, encoder, CUT, with_time_ids=True, rows=6)
    assert len(encoder.pictures) == 18
    shown: dict[int, set[tuple[float, ...]]] = {index: set() for index in range(6)}
    for step in range(30):
        rows = batches.load(step)
        for row, index in enumerate(batches.order.batch(step)):
            made = [prepare(data.read(index), CUT, variant_draws(f"{index}.png", variant)) for variant in range(3)]
            means = [Encoder().encode_pictures(from_pil(Image.fromarray(one)))[0][0] for one in made]
            (variant,) = (number for number, mean in enumerate(means) if mx.array_equal(mean, rows["mean"][row]))
            told = micro_conditioning(data.sizes[index], (16, 16), CUT, variant_draws(f"{index}.png", variant))
            assert rows["time_ids"][row].tolist() == list(told)
            shown[index].add(variant)
    assert all(len(variants) == 3 for variants in shown.values())


def test_variants_of_a_picture_are_spread_evenly():
    draws = np.stack([variant_draws("some/picture.png", variant) for variant in range(64)])
    assert ((draws >= 0) & (draws < 1)).all()
    flips = draws[:, 2] < 0.5
    assert (flips[1:] != flips[:-1]).all()
    for column in range(2):
        assert np.diff(np.sort(draws[:, column])).max() < 5 / 64
    firsts = np.stack([variant_draws(f"{number}", 0) for number in range(1000)])
    assert np.allclose(firsts.mean(axis=0), 0.5, atol=0.04)


def test_variants_that_cannot_differ_are_not_encoded(data):
    encoder = Encoder()
    make(data, encoder, DataSettings(16, variants=5))
    assert len(encoder.pictures) == 6


def test_a_single_random_variant_is_worth_a_warning(data, caplog):
    make(data, Encoder(), DataSettings(16, flip=True))
    assert "data.variants" in caplog.text
    caplog.clear()
    make(data, Encoder(), CUT)
    make(data, Encoder(), SQUARE)
    assert not caplog.records


# --- buckets


def test_buckets(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    for number, (width, height) in enumerate([(40, 20), (20, 40), (30, 30), (31, 30), (22, 40), (40, 22)]):
        (root / f"{number}.png").write_bytes(encoded(number, width, height))
    data, settings = open_data(root), DataSettings(16, buckets=True, bucket_step=4)
    encoder = Encoder()
    batches = make(data, encoder, settings, rows=3, with_time_ids=True, batch_size=2)
    targets = target_sizes(data, settings)
    assert len(set(targets)) > 2
    for step in range(12):
        rows = batches.load(step)
        (target,) = {targets[index] for index in batches.order.batch(step)}
        assert rows["mean"].shape == (3, target[0] // 4, target[1] // 4, 3)
        assert rows["time_ids"][:, 4:].tolist() == [list(target)] * 3
        for row, index in enumerate(batches.order.batch(step)):
            pixels = Image.fromarray(prepare(data.read(index), settings, target=target))
            assert mx.array_equal(rows["mean"][row], Encoder().encode_pictures(from_pil(pixels))[0][0])
    with pytest.raises(UsageError, match="mixes sizes"):
        LatentBatches(
            data, Order(6, 3, 0), settings, encode_pictures=encoder.encode_pictures, picture_model="a",
            encode_prompts=encoder.encode_prompts,
        )  # fmt: skip


# --- once


def test_everything_is_encoded_once(data):
    first, second = Encoder(), Encoder()
    before = make(data, first, CUT)
    assert len(first.pictures) == len(set(first.pictures)) == 18
    assert sorted(first.texts) == ["", "picture 0", "picture 1", "picture 2"]
    after = make(open_data(data.path), second, CUT)
    assert (second.pictures, second.texts) == ([], [])
    assert all(equal(before.load(step), after.load(step)) for step in range(5))


def test_a_second_run_decodes_nothing(data, monkeypatch):
    make(data, Encoder(), CUT)
    monkeypatch.setattr(PictureData, "read", None)
    make(open_data(data.path), Encoder(), CUT).load(0)
    make(open_data(data.path), Encoder(), DataSettings(16, crop="random", flip=True, variants=2)).load(0)
    make(open_data(data.path), Encoder(), CUT).load(0)


@pytest.mark.parametrize("option", ["picture_model", "prompt_model"])
def test_another_model_has_other_features(data, option):
    make(data, Encoder())
    encoder = Encoder()
    make(data, encoder, **{option: "another"})
    expected = (6, 0) if option == "picture_model" else (0, 4)
    assert (len(encoder.pictures), len(encoder.texts)) == expected
    again = Encoder()
    make(data, again)  # the first one's are still there
    assert (again.pictures, again.texts) == ([], [])


def test_only_what_is_new_is_encoded(data):
    make(data, Encoder(), CUT)
    root = data.path
    (root / "2.png").write_bytes(encoded(77, 24, 26))
    (root / "00.png").write_bytes(encoded(78, 24, 26))  # comes before the others: every index moves
    (root / "00.txt").write_text("something new")
    encoder = Encoder()
    changed = open_data(root)
    rows = make(changed, encoder, CUT).load(0)
    assert (len(encoder.pictures), encoder.texts) == (6, ["something new"])
    fresh = make(changed, Encoder(), CUT, root=root.parent / "fresh").load(0)
    assert equal(rows, fresh)


def test_another_size_has_other_features(data):
    assert make(data, Encoder(), SQUARE).load(0)["mean"].shape == (4, 4, 4, 3)
    for size, shape in ((8, (4, 2, 2, 3)), ((8, 32), (4, 2, 8, 3)), ((32, 8), (4, 8, 2, 3)), (16, (4, 4, 4, 3))):
        assert make(data, Encoder(), DataSettings(size)).load(0)["mean"].shape == shape


def test_pictures_are_told_apart_by_their_shape(tmp_path):
    """One colour is the same bytes, however wide."""
    (tmp_path / "d").mkdir()
    for name, size in (("a", (32, 16)), ("b", (16, 32))):
        Image.new("RGB", size, "red").save(tmp_path / "d" / f"{name}.png")
    data, settings = open_data(tmp_path / "d"), DataSettings(24, buckets=True, bucket_step=8)
    batches = make(data, Encoder(), settings, rows=1)
    assert {tuple(batches.load(step)["mean"].shape) for step in range(2)} == {(1, 8, 4, 3), (1, 4, 8, 3)}


def test_the_same_picture_elsewhere_is_known_by_its_pixels(data, tmp_path):
    make(data, Encoder())
    other = tmp_path / "other"
    other.mkdir()
    Image.open(data.path / "3.png").save(other / "same.bmp")
    (other / "same.txt").write_text("picture 1")
    encoder = Encoder()
    make(open_data(other), encoder)
    assert (encoder.pictures, encoder.texts) == ([], [])


def test_more_variants_add_to_those_that_are_there(data):
    make(data, Encoder(), CUT)
    encoder = Encoder()
    make(data, encoder, DataSettings(16, crop="random", flip=True, variants=5))
    assert len(encoder.pictures) == 12


def test_encoding_together_gives_the_same(data, tmp_path):
    one, four = Encoder(), Encoder()
    alone = make(data, one, CUT, root=tmp_path / "1")
    together = make(data, four, CUT, root=tmp_path / "4", batch_size=4)
    assert sorted(one.pictures) == sorted(four.pictures)
    assert all(np.allclose(alone.load(0)[name], together.load(0)[name], atol=1e-6) for name in alone.load(0))


def test_progress_counts_pictures_and_texts(data):
    for _ in range(2):  # also when all is there
        told: list[tuple[int, int, str]] = []
        make(data, Encoder(), CUT, progress=lambda *one, told=told: told.append(one))
        assert [done for done, _, _ in told] == list(range(1, 23))
        assert {total for _, total, _ in told} == {22}
        assert {name for _, _, name in told} >= {"0.png", "5.png", "prompt 'picture 0'"}


# --- interruptions and broken files


def small_shards(monkeypatch, entries: int) -> None:
    monkeypatch.setattr(feature_store, "SHARD_ENTRIES", entries)


def test_an_interrupted_run_goes_on(data, monkeypatch):
    small_shards(monkeypatch, 2)
    broken_off, encoder = Encoder(fail_after=5), Encoder()
    with pytest.raises(KeyboardInterrupt):
        make(data, broken_off)
    assert len(broken_off.pictures) == 5
    rows = make(data, encoder).load(0)
    assert len(encoder.pictures) == 2  # of the fifth picture's file nothing was written yet
    assert equal(rows, make(data, Encoder(), root=data.path.parent / "fresh").load(0))


def test_an_interrupted_run_leaves_nothing_half_written(data, tmp_path, monkeypatch):
    small_shards(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        make(data, Encoder(fail_after=5), root=tmp_path / "r")
    files = sorted(str(path.relative_to(tmp_path / "r")) for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert [name.partition("-")[0] for name in files if not name.startswith("prepared")] == ["latents", "latents"]
    assert all(name.endswith((".safetensors", ".json")) for name in files)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_a_broken_file_is_made_again(data, monkeypatch, damage, caplog, tmp_path):
    small_shards(monkeypatch, 2)
    make(data, Encoder(), root=tmp_path / "r")
    shards = sorted((tmp_path / "r").glob("latents-*/*.safetensors"))
    assert len(shards) == 3
    content = shards[1].read_bytes()
    damaged = {"truncated": content[:-7], "empty": b"", "garbage": b"\xff" * 500}
    if damage == "missing":
        shards[1].unlink()
    else:
        shards[1].write_bytes(damaged[damage])
    encoder = Encoder()
    again = make(data, encoder, root=tmp_path / "r")
    assert len(encoder.pictures) == 2
    assert (str(shards[1]) in caplog.text) == (damage != "missing")
    fresh = make(data, Encoder(), root=tmp_path / "fresh")
    assert all(equal(again.load(step), fresh.load(step)) for step in range(3))


def test_files_of_another_version_are_left_alone(data, tmp_path):
    make(data, Encoder(), root=tmp_path / "r")
    for shard in (tmp_path / "r").glob("*/*.safetensors"):
        shard.write_bytes(shard.read_bytes().replace(b"mlx-cm features 1", b"mlx-cm features 9"))
        shard.rename(shard.with_name("other.safetensors"))
    encoder = Encoder()
    make(data, encoder, root=tmp_path / "r")
    assert (len(encoder.pictures), len(encoder.texts)) == (6, 4)
    assert len([*(tmp_path / "r").glob("*/other.safetensors")]) == 2


def test_features_removed_under_a_run_are_an_error_that_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "OPEN_SHARDS", 0)  # none stays mapped into memory
    batches = make(data, Encoder(), root=tmp_path / "r")
    batches.load(0)
    for shard in (tmp_path / "r").glob("latents-*/*"):
        shard.unlink()
    with pytest.raises(ModelError, match="was removed or damaged") as caught:
        batches.load(1)
    assert "start again" in caught.value.hint


def test_no_features_are_kept_that_are_not_finite(data, tmp_path):
    def overflowing(x: mx.array) -> tuple[mx.array, mx.array]:
        mean, std = Encoder().encode_pictures(x)
        return mx.where(mean > 0.2, mx.inf, mean), std

    with pytest.raises(OutputError, match=r"features of \d\.png: are not finite") as caught:
        LatentBatches(
            data, Order(6, 4, 0), SQUARE, encode_pictures=overflowing, picture_model="a", root=tmp_path / "r",
            encode_prompts=Encoder().encode_prompts,
        )  # fmt: skip
    assert "float32" in caught.value.hint
    assert not [*(tmp_path / "r").glob("*/*.safetensors")]


def test_a_picture_that_breaks_before_it_is_encoded_is_an_error(data):
    (data.path / "3.png").write_bytes(b"gone bad")
    with pytest.raises(ModelError, match=r"3\.png"):
        make(data, Encoder())


def test_a_place_that_cannot_be_written_is_an_error(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        make(data, Encoder(), root=tmp_path / "file")


@pytest.mark.parametrize("options", [{"encode_prompts": None}, {"tokenize": lambda texts: []}])
def test_text_is_encoded_or_tokenised(data, options):
    with pytest.raises(UsageError, match="either"):
        make(data, Encoder(), **options)


# --- the store


def test_a_file_holds_what_its_size_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 3000)
    items = [Item(f"{number:02}", "x", np.zeros((20, 20, 3), np.uint8)) for number in range(5)]  # 1200 bytes each
    texts = [Item(f"t{number:03}", "x", "text") for number in range(feature_store.SHARD_TEXTS + 1)]
    store = FeatureStore(tmp_path / "s")
    store.fill(items, lambda batch: [{"a": np.full(3, int(item.key), np.float32)} for item in batch])
    assert len([*store.folder.iterdir()]) == 2
    store.fill(texts, lambda batch: [{"a": np.zeros(1, np.float16)} for _ in batch], batch_size=9)
    assert len([*store.folder.iterdir()]) == 4
    assert [store.read(item.key)["a"][0] for item in items] == [0, 1, 2, 3, 4]
    again = FeatureStore(tmp_path / "s")
    assert all(item.key in again for item in items + texts)
    assert "05" not in again


def test_batches_are_of_one_shape_and_no_larger_than_asked(tmp_path):
    shapes = [(8, 8, 3), (8, 4, 3), (8, 8, 3), (8, 8, 3), (8, 4, 3)]
    items = [Item(f"{number}", "x", np.zeros(shape, np.uint8)) for number, shape in enumerate(shapes)]
    seen = []

    def compute(batch: list[Item]) -> list[dict[str, np.ndarray]]:
        seen.append([item.key for item in batch])
        return [{"a": np.zeros(1, np.float32)} for _ in batch]

    FeatureStore(tmp_path / "s").fill([*items, items[0]], compute, batch_size=2)
    assert seen == [["1", "4"], ["0", "2"], ["3"]]


# The same as `Encoder`, in a program that loads nothing else.
WORKER = """
import json, sys, time
from pathlib import Path
import mlx_cm
import mlx.core as mx
import numpy as np
from mlx_cm.training import feature_store
from mlx_cm.training.data import DataSettings, open_data
from mlx_cm.training.features import LatentBatches
from mlx_cm.training.order import Order

feature_store.SHARD_ENTRIES, count = 2, 0

def encode_pictures(x):
    global count
    count += len(x)
    time.sleep(0.02)
    blocks = x.reshape(len(x), x.shape[1] // 4, 4, x.shape[2] // 4, 4, 3)
    return blocks.mean(axis=(2, 4)), mx.sqrt(blocks.var(axis=(2, 4)))

data = open_data(Path(sys.argv[1]))
encode_prompts = lambda texts: (mx.zeros((len(texts), 5, 3)), None)
print("ready", flush=True)
sys.stdin.readline()
batches = LatentBatches(
    data, Order(len(data), 4, 0), DataSettings(16), encode_pictures=encode_pictures, encode_prompts=encode_prompts,
    picture_model="a", root=Path(sys.argv[2]),
)
print(json.dumps([count, np.array(batches.load(0)["mean"]).tolist()]))
"""


def start(count: int, *arguments: Path) -> list[subprocess.Popen]:
    """Programs that begin to encode at about the same time."""
    command = [sys.executable, "-c", WORKER, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    programs = [subprocess.Popen(command, **pipes) for _ in range(count)]
    for program in programs:
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    return programs


def test_processes_at_the_same_time_share_the_work(tmp_path):
    root = make_folder(tmp_path / "d", 12)
    programs = start(2, root, tmp_path / "r")
    (first, rows), (second, others) = (json.loads(program.communicate(timeout=60)[0]) for program in programs)
    assert first + second == 12  # none twice
    data = open_data(root)
    expected = make(data, Encoder(), root=tmp_path / "fresh").load(0)["mean"]
    assert rows == others == expected.tolist()


def test_a_killed_process_costs_the_file_it_was_at(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", 40)
    (program,) = start(1, root, tmp_path / "r")
    while len([*tmp_path.glob("r/latents-*/*.safetensors")]) < 3:
        assert program.poll() is None
        time.sleep(0.01)
    program.kill()
    program.communicate(timeout=60)
    folder = next(tmp_path.glob("r/latents-*"))
    (folder / ".x.safetensors.0123abcd.partial").write_bytes(bytes(100))  # as if killed while writing
    written = len([*tmp_path.glob("r/latents-*/*.safetensors")])
    small_shards(monkeypatch, 2)
    encoder = Encoder()
    rows = make(open_data(root), encoder, root=tmp_path / "r").load(0)
    assert len(encoder.pictures) == 40 - 2 * written
    assert not [*folder.glob(".*")]
    assert equal(rows, make(open_data(root), Encoder(), root=tmp_path / "fresh").load(0))
