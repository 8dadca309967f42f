"""Training data: what is found at a path, what of it is usable, how it is cut, and the batches of every step."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import warnings
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from mlx_cm import metadata
from mlx_cm.config import config_from_dict
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.images import from_pil, open_image
from mlx_cm.training import data as data_module
from mlx_cm.training import data_sources
from mlx_cm.training.data import (
    DataSettings,
    PixelBatches,
    augmentation_draws,
    make_order,
    open_data,
    parallel,
    target_sizes,
)
from mlx_cm.training.order import Order
from mlx_cm.training.preparation import (
    bucket_sizes,
    covering_size,
    crop_and_flip,
    crop_corner,
    micro_conditioning,
    nearest_bucket,
    prepare,
)
from mlx_cm.training.remembered import Remembered


def pixels(width: int = 13, height: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(seed: int = 0, format: str = "PNG", **size: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed=seed, **size)).save(file, format)
    return file.getvalue()


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    """Files by name; those without content are pictures, each another one."""
    for number, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((content.encode() if isinstance(content, str) else content) or encoded(number))
    return root


def write_tar(path: Path, files: dict[str, str | bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for number, (name, content) in enumerate(files.items()):
            content = (content.encode() if isinstance(content, str) else content) or encoded(number)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def names(data) -> list[str]:
    return [entry.name for entry in data.entries]


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


# --- folders


def test_a_folder_is_read_at_any_depth_in_the_order_of_names(tmp_path):
    files = ["b.png", "a/z.jpeg", "a/deep/er/x.WEBP", "c.bmp", ".hidden.png", "a/._z.jpeg", ".git/y.png", "notes.md"]
    data = open_data(write(tmp_path / "d", dict.fromkeys(files, "")))
    assert names(data) == ["a/deep/er/x.WEBP", "a/z.jpeg", "b.png", "c.bmp"]
    assert len(data) == 4
    assert data.sizes == ((9, 13),) * 4
    assert data.captions == [None] * 4
    assert (data.labels, data.num_classes, data.class_names, data.skipped) == (None, None, None, [])
    assert data.description == "4 pictures from a folder of images"
    assert np.array_equal(np.asarray(data.read(2)), pixels(seed=0))


def test_links_are_followed_once(tmp_path):
    root = write(tmp_path / "d", {"a.png": ""})
    (root / "loop").symlink_to(root)
    write(tmp_path / "elsewhere", {"b.png": ""})
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    assert names(open_data(root)) == ["a.png", "linked/b.png"]


def test_captions_beside_pictures(tmp_path):
    files = {
        "a.png": "",
        "a.txt": "\ufeffgrüne Äpfel\r\n",
        "x/b.c.jpg": "",
        "x/b.c.txt": "",
        "c.png": "",
        "README.txt": "?",
    }
    root = write(tmp_path / "d", files)
    (root / "x/b.c.txt").write_text(" ")
    data = open_data(root)
    assert dict(zip(names(data), data.captions, strict=True)) == {
        "a.png": "grüne Äpfel",
        "c.png": None,
        "x/b.c.jpg": "",
    }
    assert data.description == "3 pictures from a folder of images with captions beside them, 2 with a caption"


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_in_metadata(tmp_path, key):
    rows = [
        {"file_name": "a.png", key: " one ", "width": 3},
        {"file_name": "./x/b.png", key: None},
        {"file_name": "c.png", "caption": None, key: "three", "_note": 1},
    ]
    root = write(tmp_path / "d", {"a.png": "", "x/b.png": "", "c.png": "", "d.png": "", "metadata.jsonl": lines(*rows)})
    data = open_data(root)
    assert names(data) == ["a.png", "c.png", "d.png", "x/b.png"]
    assert data.captions == ["one", "three", None, None]
    assert "with captions in metadata.jsonl, 2 with a caption" in data.description


def test_metadata_finds_names_whose_accents_are_spelled_otherwise(tmp_path):
    apart = unicodedata.normalize("NFD", "äpfel.png")
    row = {"file_name": unicodedata.normalize("NFC", "äpfel.png"), "text": "apples"}
    data = open_data(write(tmp_path / "d", {apart: "", "metadata.jsonl": lines(row)}))
    assert (data.captions, data.skipped) == (["apples"], [])


def test_what_metadata_lists_in_vain_is_skipped_and_never_looked_for_elsewhere(tmp_path, caplog):
    write(tmp_path, {"outside.png": ""})
    outside = [
        {"file_name": name, "text": "x"} for name in ("../outside.png", str(tmp_path / "outside.png"), "gone.png")
    ]
    root = write(tmp_path / "d", {"a.png": "", "metadata.jsonl": lines(*outside, {"file_name": "a.png", "text": "a"})})
    data = open_data(root)
    assert names(data) == ["a.png"]
    assert data.skipped == sorted([str(tmp_path / "outside.png"), "../outside.png", "gone.png"])
    assert [record.getMessage() for record in caplog.records if "gone.png" in record.getMessage()] == [
        "gone.png is skipped: metadata.jsonl lists it, but it is missing"
    ]
    with pytest.raises(ModelError, match="lists it, but it is missing"):
        open_data(root, strict=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"file_name": "a.png", "text": "x", "prompt": "y"}', "text and prompt, which all mean the caption"),
        ('{"file_name": "a.png", "text": ["x"]}', r"text: expected text, got \['x'\]"),
        ('{"text": "x"}', "file_name: expected text, got None"),
        ('{"file_name": "a.png"}\n\n{"file_name": "./a.png"}', "line 3: a.png was listed before"),
        ('{"file_name": "a.png"', "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "not valid Unicode"),
        ('{"file_name": "a.png", "label": true}', "label: expected a whole number or a name, got True"),
        ('{"file_name": "a.png", "label": 1.5}', "label: expected a whole number or a name"),
        (
            '{"file_name": "a.png", "label": -1}\n{"file_name": "b.png", "label": 1}',
            "has the label -1, expected 0 or more",
        ),
        (
            '{"file_name": "a.png", "label": 1}\n{"file_name": "b.png", "label": "x"}',
            "numbers and labels that are names",
        ),
        ('{"file_name": "b.png", "label": 1}', "a.png has no label"),
    ],
)
def test_metadata_that_is_wrong_is_an_error_that_says_where(tmp_path, content, reason):
    root = write(tmp_path / "d", {"a.png": "", "b.png": "", "metadata.jsonl": content})
    with pytest.raises(ModelError, match=reason):
        open_data(root)


def test_labels_in_metadata(tmp_path):
    rows = [{"file_name": f"{label}/{name}.png", "label": label} for name, label in [("a", "dog"), ("b", "cat")]]
    root = write(tmp_path / "d", {"dog/a.png": "", "cat/b.png": "", "metadata.jsonl": lines(*rows)})
    data = open_data(root)
    assert (names(data), data.labels, data.class_names) == (["cat/b.png", "dog/a.png"], [0, 1], ("cat", "dog"))
    numbers = [row | {"label": number} for row, number in zip(rows, (7, 2), strict=True)]
    (root / "metadata.jsonl").write_text(lines(*numbers))
    data = open_data(root)
    assert (data.labels, data.class_names, data.num_classes) == ([2, 7], None, 8)
    assert open_data(root, classes=False).labels is None


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_other_kinds_of_metadata_are_not_passed_over(tmp_path, name):
    with pytest.raises(ModelError, match=f"{name}: is not read") as caught:
        open_data(write(tmp_path / "d", {"a.png": "", name: "file_name,text"}))
    assert "metadata.jsonl" in caught.value.hint


def test_metadata_in_a_subfolder_is_not_passed_over(tmp_path):
    row = lines({"file_name": "a.png", "text": "x"})
    root = write(tmp_path / "d", {"train/a.png": "", "train/metadata.jsonl": row, "metadata.jsonl.md": "?"})
    with pytest.raises(ModelError, match=r"in a subfolder, train/metadata\.jsonl") as caught:
        open_data(root)
    assert caught.value.hint == f"give {root / 'train'}"
    assert open_data(root / "train").captions == ["x"]


# --- classes


def test_class_folders(tmp_path):
    root = write(
        tmp_path / "d", {"dog/x/1.png": "", "cat/2.png": "", "emu/3.png": b"broken", "cat/4.png": "", "none/x": "?"}
    )
    data = open_data(root)
    assert (names(data), data.labels) == (["cat/2.png", "cat/4.png", "dog/x/1.png"], [0, 0, 1])
    assert (data.class_names, data.num_classes) == (("cat", "dog", "emu"), 3)  # a broken picture moves no label
    assert data.description == "3 pictures from a folder of images in class subfolders, 3 classes, 1 skipped"
    assert open_data(root, classes=False).labels is None


@pytest.mark.parametrize(
    "files",
    [
        {"one/a.png": "", "one/b.png": ""},  # one folder is a place, not a class
        {"one/a.png": "", "two/b.png": "", "c.png": ""},
        {"one/a.png": "", "two/b.png": "", "two/b.txt": "a caption"},
        {"one/a.png": "", "two/b.png": "", "metadata.jsonl": lines({"file_name": "one/a.png", "text": "x"})},
    ],
)
def test_subfolders_are_not_always_classes(tmp_path, files):
    root = write(tmp_path / "d", files)
    assert open_data(root).labels is None
    if "c.png" in files:
        with pytest.raises(ModelError, match=r"c\.png lies in no class subfolder"):
            open_data(root, classes=True)
    else:
        assert open_data(root, classes=True).labels == [int(name.startswith("two")) for name in names(open_data(root))]


# --- what can be understood in two ways, or not at all


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.png": "", "b.tar": b"x"}, r"holds images \(a.png\) and tar files \(b.tar\)"),
        (
            {"a.png": "", "a.txt": "x", "metadata.jsonl": lines({"file_name": "a.png", "text": "y"})},
            "has a caption beside",
        ),
        ({}, "holds no pictures"),
        ({"a.txt": "x"}, "holds no pictures"),
        ({"a.png": b"x"}, "holds no usable picture"),
        ({"a.png": "", "a.txt": b"\xff\xfe\xfa"}, "is not UTF-8 text"),
        ({"a.png": "", "a.txt": b"x" * (1 << 21)}, "too much for a caption"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, files, reason):
    (tmp_path / "d").mkdir()
    with pytest.raises(ModelError, match=reason):
        open_data(write(tmp_path / "d", files))


@pytest.mark.parametrize(
    ("name", "reason"), [("x", "does not exist"), ("a.png", "no kind of"), ("a.tar.gz", "no kind of")]
)
def test_paths_that_are_no_data(tmp_path, name, reason):
    write(tmp_path, {"a.png": "", "a.tar.gz": b"x"})
    with pytest.raises(ModelError, match=reason):
        open_data(tmp_path / name)


# --- pictures as they are


def test_pictures_are_upright_opaque_and_in_their_full_range(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright = pixels(16, 8)
    Image.fromarray(np.rot90(upright)).save(root / "turned.png", exif=exif)
    Image.fromarray(np.full((4, 6, 4), [10, 20, 30, 0], np.uint8)).save(root / "clear.png")
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 2849).save(root / "deep.png")
    Image.fromarray(pixels(), "RGB").quantize(8).save(root / "palette.gif")
    data = open_data(root)
    assert dict(zip(names(data), data.sizes, strict=True)) == {
        "clear.png": (4, 6), "deep.png": (4, 6), "palette.gif": (9, 13), "turned.png": (8, 16),
    }  # fmt: skip
    read = {name: np.asarray(data.read(index)) for index, name in enumerate(names(data))}
    assert np.array_equal(read["turned.png"], upright)
    assert (read["clear.png"] == 255).all()
    assert np.array_equal(read["deep.png"][..., 0].ravel(), (np.arange(24) * 2849 / 257).round())
    for index, name in enumerate(names(data)):  # exactly what the rest of the program makes of them
        assert np.array_equal(np.array(from_pil(data.read(index))), np.array(from_pil(open_image(root / name))))


BROKEN = {
    "empty.png": (b"", "is no image"),
    "cut.jpg": (encoded(3, "JPEG", width=200, height=150)[:-2000], "truncated or corrupt"),
    "text.png": (b"not a picture at all", "is no image"),
    "thin.png": (encoded(width=900, height=3), "is 900x3, too long"),
    "phone.heic": (b"ftypheic", "convert it to PNG or JPEG"),
}


def broken_folder(root: Path) -> Path:
    write(root, {"a.png": "", "z.png": ""} | {name: content for name, (content, _) in BROKEN.items()})
    (root / "empty.png").write_bytes(b"")
    (root / "link.png").symlink_to(root / "nowhere")
    return root


def test_broken_pictures_are_named_skipped_and_counted(tmp_path, caplog):
    data = open_data(broken_folder(tmp_path / "d"))
    assert names(data) == ["a.png", "z.png"]
    assert sorted(data.skipped) == sorted([*BROKEN, "link.png"])
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == len(BROKEN) + 1
    for name, (_, reason) in BROKEN.items():
        (line,) = (one for one in said if one.startswith(f"{name} is skipped: "))
        assert reason in line
        assert "\n" not in line
    assert "6 skipped" in data.description


@pytest.mark.parametrize("name", BROKEN)
def test_strict_data_allow_no_broken_picture(tmp_path, name):
    root = write(tmp_path / "d", {"a.png": ""})
    (root / name).write_bytes(BROKEN[name][0])
    with pytest.raises(ModelError, match=BROKEN[name][1]) as caught:
        open_data(root, strict=True)
    assert caught.value.what == name


def test_progress_counts_every_picture(tmp_path):
    told = []
    open_data(broken_folder(tmp_path / "d"), progress=lambda *one: told.append(one))
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5, 6]  # the link leads nowhere and the format is not read
    assert {total for _, total, _ in told} == {6}
    assert told[0][2] == "a.png"


# --- decoding once


def count_reads(monkeypatch, seconds: float = 0) -> list[Path]:
    opened = []

    def counted(path, file=None):
        opened.append(Path(path))
        time.sleep(seconds)
        return open_image(path, file)

    monkeypatch.setattr(data_sources, "open_image", counted)
    return opened


def test_a_second_opening_decodes_only_what_changed(tmp_path, monkeypatch):
    root, reads = write(tmp_path / "d", {"a.png": "", "b.png": "", "c.png": b"broken"}), count_reads(monkeypatch)
    first = open_data(root)
    assert len(reads) == 3
    reads.clear()
    second = open_data(root)
    assert reads == [root / "c.png"]  # what is broken may only be out of reach
    assert (names(first), first.sizes, first.skipped) == (names(second), second.sizes, second.skipped)
    reads.clear()
    (root / "b.png").write_bytes(encoded(5, width=20, height=30))
    write(root, {"d.png": ""})
    assert open_data(root).sizes == ((9, 13), (30, 20), (9, 13))
    assert sorted(reads) == [root / "b.png", root / "c.png", root / "d.png"]
    reads.clear()
    os.utime(root / "a.png", ns=(1, 1))  # another picture of the same length
    open_data(root)
    assert root / "a.png" in reads


def test_a_lost_or_locked_memory_costs_time_only(tmp_path, monkeypatch):
    root, cache = write(tmp_path / "d", {"a.png": ""}), tmp_path / "cache"
    open_data(root, cache=cache)
    (memory,) = (cache / "checked").iterdir()
    reads = count_reads(monkeypatch)
    for content in ("", "[]", '{"a.png": 3}', '{"a.png": [1, 2, [3, 4]]}', "{" * 9000):
        memory.write_text(content)
        assert open_data(root, cache=cache).sizes == ((9, 13),)
    assert len(reads) == 5
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert open_data(root, cache=blocked).sizes == ((9, 13),)


def test_what_was_decoded_before_an_interruption_is_remembered(tmp_path, monkeypatch):
    root = write(tmp_path / "d", {f"{number:02}.png": "" for number in range(40)})
    reads = count_reads(monkeypatch, seconds=0.01)

    def interrupt(done, total, name):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_data(root, workers=2, progress=interrupt)
    assert len(reads) < 25  # not all are read before the first is taken
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    reads.clear()
    open_data(root)
    assert len(reads) == 30


def test_remembered_values_are_of_one_stamp(tmp_path):
    memory = Remembered(tmp_path / "m.json")
    memory.put("ä\udc80", (3, 4), [1, "x"])
    assert memory.get("ä\udc80", (3, 4)) == [1, "x"]
    memory.save()
    again = Remembered(tmp_path / "m.json")
    assert again.get("ä\udc80", (3, 4)) == [1, "x"]
    assert again.get("ä\udc80", (3, 5)) is None
    before = (tmp_path / "m.json").stat().st_mtime_ns
    again.put("ä\udc80", (3, 4), [1, "x"])
    again.save()
    assert (tmp_path / "m.json").stat().st_mtime_ns == before


def test_pictures_open_at_the_same_time_leave_warnings_as_they_were(tmp_path):
    """Threads leave in another order than they enter."""
    root = write(tmp_path / "d", {f"{number}.png": "" for number in range(16)})
    before = list(warnings.filters)
    first, second = (metadata.opened_image(root / name) for name in ("0.png", "1.png"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert warnings.filters[0][0] == "ignore"
    second.__exit__(None, None, None)
    assert warnings.filters == before
    assert len(open_data(root, workers=8)) == 16
    assert warnings.filters == before


def test_results_come_in_order_and_not_far_ahead():
    started = []

    def slow(number):
        started.append(number)
        time.sleep(0.002 * (number % 3))
        return number * 10

    results = parallel(slow, range(200), workers=3)
    assert [next(results) for _ in range(5)] == [0, 10, 20, 30, 40]
    assert len(started) < 40
    results.close()
    assert [*parallel(slow, range(30), workers=4)] == [number * 10 for number in range(30)]


# --- .npz


def test_npz(tmp_path):
    images = np.stack([pixels(6, 4, seed) for seed in range(5)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([2, 0, 1, 1, 4], np.int64), other=np.arange(3))
    data = open_data(tmp_path / "a.npz")
    assert (len(data), data.sizes, data.labels, data.num_classes) == (5, ((4, 6),) * 5, [2, 0, 1, 1, 4], 5)
    assert all(np.array_equal(np.asarray(data.read(index)), images[index]) for index in range(5))
    assert open_data(tmp_path / "a.npz", classes=False).labels is None
    np.savez_compressed(
        tmp_path / "b.npz", arr_0=images[..., 0], y=np.arange(5)[:, None], captions=np.array(["ä ", *"bcde"])
    )
    data = open_data(tmp_path / "b.npz")
    assert (data.labels, data.captions) == ([0, 1, 2, 3, 4], ["ä", "b", "c", "d", "e"])
    assert np.array_equal(np.asarray(data.read(3)), np.repeat(images[3, :, :, :1], 3, axis=2))
    np.savez(tmp_path / "c.npz", images[..., :1], np.arange(5))  # arr_0 and arr_1
    assert open_data(tmp_path / "c.npz").labels == [0, 1, 2, 3, 4]
    clear = np.concatenate([images, np.zeros_like(images[..., :1])], axis=-1)
    np.savez(tmp_path / "d.npz", images=clear)
    assert (np.asarray(open_data(tmp_path / "d.npz").read(0)) == 255).all()


IMAGES = np.zeros((3, 4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": IMAGES.astype(np.float32)}, "type float32, expected uint8"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"shape \(3, 3, 4, 5\)"),
        ({"images": IMAGES[0, 0]}, r"shape \(5, 3\)"),
        ({"images": IMAGES[:, :0]}, r"shape \(3, 0, 5, 3\)"),
        ({"images": IMAGES[:0]}, "holds no pictures"),
        ({"pictures": IMAGES}, r"holds \['pictures'\], expected pictures under one of images, arr_0"),
        ({"images": IMAGES, "arr_0": IMAGES}, "images and arr_0, which mean the same"),
        ({"images": IMAGES, "labels": np.arange(2)}, r"labels: expected 3 whole numbers, got int64 \(2,\)"),
        ({"images": IMAGES, "labels": np.eye(3)}, "labels: expected 3 whole numbers"),
        ({"images": IMAGES, "labels": np.eye(3, dtype=int)}, "labels: expected 3 whole numbers"),
        ({"images": IMAGES, "labels": np.array([0, -1, 2])}, "has the label -1"),
        ({"images": IMAGES, "captions": np.arange(3)}, "captions: expected 3 texts"),
        ({"images": IMAGES, "captions": np.array(["a", "b"])}, "captions: expected 3 texts"),
        ({"images": IMAGES, "captions": np.array(["a", "b", 3], object)}, "holds objects"),
        ({"images": IMAGES, "captions": np.array(["a", "b", "\ud800"])}, "not valid Unicode"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, reason):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ModelError, match=reason):
        open_data(tmp_path / "a.npz")


def test_npz_without_labels_has_no_classes_to_ask_for(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES)
    assert open_data(tmp_path / "a.npz").labels is None
    with pytest.raises(ModelError, match=r"a\.npz/0 has no label"):
        open_data(tmp_path / "a.npz", classes=True)


def test_broken_npz(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES)
    whole = (tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "one.npy", IMAGES)
    start = whole.index(b"\x93NUMPY")
    for content in (b"", whole[:-30], whole[: len(whole) // 2], (tmp_path / "one.npy").read_bytes(),
                    whole[:start] + b"\0" * 40 + whole[start + 40 :]):  # fmt: skip
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(ModelError, match="truncated or corrupt"):
            open_data(tmp_path / "b.npz")


def test_an_npz_that_announces_too_much_is_an_error(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 999, 999, 3)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(ModelError, match=r"does not fit into memory|truncated or corrupt"):
        open_data(tmp_path / "a.npz")


# --- tar shards


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards(tmp_path, format):
    long = "a/" * 40 + "long"
    write_tar(
        tmp_path / "d" / "1.tar",
        {f"{long}.png": "", f"{long}.txt": "far away", "000002.jpg": encoded(7, "JPEG"), "000002.cls": "3\n"}
        | {f"{long}.cls": b"0", "notes.txt": "?", "000002.json": json.dumps({"caption": "two", "label": 9, "id": 4})}
        | {"3.png": "", "3.txt": "from the text", "3.json": json.dumps({"text": "no", "caption": "no", "label": 2})},
        format=format,
    )
    write_tar(tmp_path / "d" / "0.tar", {"x.seg.png": b"", "x.webp": "", "x.json": '{"text": "x", "label": 1}'}, format)
    data = open_data(tmp_path / "d")
    assert names(data) == ["0.tar/x.webp", f"1.tar/{long}.png", "1.tar/000002.jpg", "1.tar/3.png"]
    assert data.captions == ["x", "far away", "two", "from the text"]
    assert data.labels == [1, 0, 3, 2]
    assert data.num_classes == 4
    assert data.description == "4 pictures from 2 tar shards, 4 with a caption, 4 classes"
    assert np.array_equal(np.asarray(data.read(1)), pixels(seed=0))
    assert np.array_equal(np.asarray(data.read(2)), np.asarray(Image.open(io.BytesIO(encoded(7, "JPEG")))))
    alone = open_data(tmp_path / "d" / "0.tar")
    assert (names(alone), alone.labels, alone.kind) == (["0.tar/x.webp"], [1], "1 tar shard")


def test_names_in_a_tar_file_do_nothing(tmp_path):
    hostile = ["/etc/passwd.png", "../../../../tmp/escape.png", "..//x.png", "a\\b.png", "-rf.png", "C:\\x.png"]
    write_tar(tmp_path / "d.tar", dict.fromkeys(hostile, ""))
    before = sorted(tmp_path.rglob("*"))
    data = open_data(tmp_path / "d.tar")
    assert names(data) == [f"d.tar/{name}" for name in hostile]
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    assert np.array_equal(np.asarray(data.read(1)), pixels(seed=1))


def test_members_that_are_no_plain_files_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("a.png")
        member.size = len(encoded())
        archive.addfile(member, io.BytesIO(encoded()))
    assert names(open_data(tmp_path / "d.tar")) == ["d.tar/a.png"]


def test_a_broken_picture_in_a_shard_is_skipped(tmp_path, caplog):
    write_tar(tmp_path / "d.tar", {"a.png": "", "b.png": b"nothing", "c.jpg": encoded(0, "JPEG", width=99)[:-900]})
    data = open_data(tmp_path / "d.tar")
    assert (names(data), data.skipped) == (["d.tar/a.png"], ["d.tar/b.png", "d.tar/c.jpg"])
    assert [record.getMessage()[:23] for record in caplog.records] == [
        "d.tar/b.png is skipped:",
        "d.tar/c.jpg is skipped:",
    ]


@pytest.mark.parametrize("cut", [700, 5 * 1024 + 100])
def test_of_a_truncated_shard_the_beginning_is_used(tmp_path, caplog, cut):
    root = tmp_path / "d"
    write_tar(root / "a.tar", {f"{number}.png": encoded(number, width=40, height=30) for number in range(6)})
    write_tar(root / "b.tar", {"x.png": ""})
    content = (root / "a.tar").read_bytes()
    (root / "a.tar").write_bytes(content[:cut])
    data = open_data(root)
    assert names(data)[-1] == "b.tar/x.png"
    assert len(data) == 1 + cut // 5000
    assert data.skipped == ["a.tar"]
    assert "a.tar is skipped: is truncated" in caplog.text
    with pytest.raises(ModelError, match=r"a\.tar: is truncated"):
        open_data(root, strict=True)


def test_hostile_headers_end(tmp_path):
    """Sizes below zero, beyond the file or on top of each other: an error, not an endless loop."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    for size in (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"\x80" + b"\0" * 7 + b"\x7f\xff\xff\xff"):
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "d.tar").write_bytes(bytes(header) + bytes(2048))
        with pytest.raises(ModelError, match="holds no"):
            open_data(tmp_path / "d.tar")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.png": "", "a.jpg": ""}, "two pictures, a.png and a.jpg"),
        ({"a.png": "", "a.cls": "one"}, "expected a whole number, got b'one'"),
        ({"a.png": "", "a.json": "{"}, "not valid JSON"),
        ({"a.png": "", "a.json": '{"text": "x", "caption": "y"}'}, "all mean the caption"),
        ({"a.png": "", "b.png": "", "b.cls": "1"}, "d.tar/a.png has no label"),
        ({"a.png": "", "a.txt": b"\xff"}, "not UTF-8"),
        ({"a.png": "", "a.txt": b"x" * (1 << 21)}, "2097152 bytes long"),
        ({"a.txt": "x"}, "holds no pictures"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, files, reason):
    with pytest.raises(ModelError, match=reason):
        open_data(write_tar(tmp_path / "d.tar", files))


def test_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ModelError, match="no usable"):
        open_data(tmp_path / "d.tar")


# --- settings


def test_settings_come_from_a_config():
    settings = config_from_dict(
        DataSettings, {"size": [48, 64], "crop": "random", "flip": True, "variants": 3}, "run.toml"
    )
    assert settings == DataSettings(size=(48, 64), crop="random", flip=True, variants=3)
    assert settings.target == (48, 64)
    assert DataSettings(32).target == (32, 32)


@pytest.mark.parametrize(
    "values",
    [
        *({"size": size} for size in (-1, 3.5, [3], [3, 0], [3, 4, 5], [])),
        *({"crop": "left"}, {"flip": 1}, {"bucket_step": 0}, {"variants": 0}, {"workers": -1}, {"sizes": 3}),
    ],
)
def test_wrong_settings_are_refused(values):
    with pytest.raises(ModelError, match=r"run\.toml"):
        config_from_dict(DataSettings, values, "run.toml")


def test_the_models_size_has_to_be_filled_in():
    with pytest.raises(UsageError, match=r"data\.size 0"):
        _ = DataSettings().target


# --- one picture


@pytest.mark.parametrize(
    ("width", "height", "target"), [(64, 48, (24, 24)), (40, 80, (20, 40)), (32, 32, (64, 64)), (9, 12, (12, 9))]
)
def test_centre_crops_are_those_of_diffusers(width, height, target):
    image = Image.fromarray(pixels(width, height))
    theirs = VaeImageProcessor(resample="lanczos").resize(image, target[0], target[1], resize_mode="crop")
    assert np.array_equal(prepare(image, DataSettings(target)), np.asarray(theirs))


def test_a_picture_of_the_right_size_is_left_alone():
    image = Image.fromarray(pixels(9, 7))
    assert np.array_equal(prepare(image, DataSettings((7, 9))), pixels(9, 7))
    grey = prepare(image, DataSettings((7, 9)), channels=1)
    assert grey.shape == (7, 9, 1)
    assert np.array_equal(grey[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("size", [(1, 1), (7, 999), (1000, 51), (33, 32), (511, 513)])
@pytest.mark.parametrize("target", [(1, 1), (32, 32), (24, 40)])
def test_the_covering_size_covers_and_is_the_smallest(size, target):
    height, width = covering_size(size, target)
    assert height >= target[0]
    assert width >= target[1]
    assert height == target[0] or width == target[1]
    assert abs(height * size[1] - width * size[0]) <= max(size)  # the aspect ratio, but for rounding


def test_cuts_flips_and_what_sdxl_is_told_agree():
    """Pixels that carry their own place show what was cut."""
    height, width = 20, 30
    place = np.stack([*np.mgrid[:height, :width], np.zeros((height, width), int)], axis=-1).astype(np.uint8)
    settings = DataSettings((20, 16), crop="random", flip=True)
    seen = set()
    for draws in np.random.default_rng(0).random((200, 3)):
        top, left = crop_corner((height, width), (20, 16), settings, draws)
        shown = crop_and_flip(place, (20, 16), settings, draws)
        flipped = draws[2] < 0.5
        columns = np.arange(left, left + 16)
        assert np.array_equal(shown[0, :, 1], width - 1 - columns if flipped else columns)
        assert (shown[:, 0, 0] == np.arange(20)).all()
        assert micro_conditioning((height, width), (20, 16), settings, draws) == (20, 30, top, left, 20, 16)
        assert micro_conditioning((60, 90), (20, 16), settings, draws) == (60, 90, top, left, 20, 16)
        seen.add(left)
    assert seen == set(range(15))  # every place a cut can be at
    corners = {crop_corner((20, 18), (17, 16), settings, draws) for draws in np.random.default_rng(1).random((500, 3))}
    assert corners == {(top, left) for top in range(4) for left in range(3)}
    assert crop_corner((20, 30), (17, 16), DataSettings((17, 16)), (0.9, 0.9)) == (1, 7)


# --- buckets


@pytest.mark.parametrize(("side", "step"), [(512, 64), (1024, 64), (768, 64), (64, 8), (100, 32)])
def test_buckets_are_the_sizes_that_cannot_grow_in_one_direction(side, step):
    def fits(height: int, width: int) -> bool:
        return height * width <= side * side and max(height, width) <= 2 * min(height, width)

    sides = range(step, 2 * side + 1, step)
    every = {(height, width) for height in sides for width in sides if height * width <= side * side}
    largest = {(h, w) for h, w in every if (h + step, w) not in every or (h, w + step) not in every}
    found = bucket_sizes((side, side), step)
    assert sorted(found) == sorted(size for size in largest if fits(*size))
    assert (side // step * step, side // step * step) in found
    assert [width / height for height, width in found] == sorted(width / height for height, width in found)


def test_buckets_of_a_known_size():
    assert bucket_sizes((512, 512), 64) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    with pytest.raises(UsageError, match="no bucket"):
        bucket_sizes((32, 32), 64)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 100), (512, 512)),
        ((1000, 10), (640, 384)),
        ((300, 400), (448, 576)),
        ((4000, 3000), (576, 448)),
        ((1, 9), (384, 640)),
    ],
)
def test_pictures_go_to_the_bucket_of_the_nearest_aspect_ratio(size, expected):
    assert nearest_bucket(size, bucket_sizes((512, 512), 64)) == expected


def test_an_order_of_buckets_has_batches_of_one_size(tmp_path):
    shapes = [(30, 60), (60, 30), (50, 50), (33, 64), (48, 52), (52, 26), (40, 41)]
    root = write(tmp_path / "d", {f"{n}.png": encoded(n, height=h, width=w) for n, (h, w) in enumerate(shapes)})
    data, settings = open_data(root), DataSettings(64, buckets=True, bucket_step=8)
    targets = target_sizes(data, settings)
    assert len(set(targets)) > 2
    order = make_order(data, settings, 3, 0)
    for step in range(20):
        assert len({targets[index] for index in order.batch(step)}) == 1
    assert make_order(data, DataSettings(64), 3, 0).batch(5) == Order(7, 3, 0).batch(5)


# --- batches


@pytest.fixture
def shapes(tmp_path) -> data_module.PictureData:
    return open_data(write(tmp_path / "d", {f"{n % 3}/{n}.png": encoded(n, height=12 + n, width=20) for n in range(7)}))


def test_a_batch_is_its_pictures(shapes):
    batches = PixelBatches(shapes, Order(7, 4, 1), DataSettings((10, 14)))
    for step in (0, 3):
        rows = batches.load(step)
        indices = Order(7, 4, 1).batch(step)
        expected = [from_pil(Image.fromarray(prepare(shapes.read(index), DataSettings((10, 14))))) for index in indices]
        assert rows["x0"].dtype == mx.float32
        assert mx.array_equal(rows["x0"], mx.concatenate(expected))
        assert rows["class_labels"].dtype == mx.int32
        assert rows["class_labels"].tolist() == [shapes.labels[index] for index in indices]


def test_greyscale_batches_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.stack([pixels(8, 8, seed)[..., 0] for seed in range(3)]))
    data = open_data(tmp_path / "a.npz")
    batches = PixelBatches(data, Order(3, 3, 0), DataSettings(8), channels=1)
    rows = batches.load(2)
    assert set(rows) == {"x0"}
    expected = np.stack([pixels(8, 8, seed)[..., :1] for seed in Order(3, 3, 0).batch(2)])
    assert np.array_equal(np.array(rows["x0"]), expected.astype(np.float32) / 127.5 - 1)


AUGMENTED = DataSettings((10, 14), crop="random", flip=True)


@pytest.mark.parametrize("workers", [1, 3])
def test_slices_of_a_batch_make_up_the_whole(shapes, workers):
    settings = DataSettings((10, 14), crop="random", flip=True, workers=workers)
    whole, parts = (PixelBatches(shapes, Order(7, 6, 0), settings, seed=5) for _ in range(2))
    for step in range(4):
        rows = whole.load(step)
        for name in rows:
            pieces = [parts.load(step, start, stop)[name] for start, stop in ((0, 1), (1, 4), (4, None))]
            assert mx.array_equal(mx.concatenate(pieces), rows[name])


def test_a_step_does_not_depend_on_the_steps_before(shapes):
    def load(*steps):
        batches = PixelBatches(shapes, Order(7, 5, 0), AUGMENTED, seed=5)
        return [batches.load(step)["x0"] for step in steps][-1]

    assert mx.array_equal(load(0, 1, 2, 9), load(9))
    assert mx.array_equal(load(9, 3, 3), load(3))


def test_crops_and_flips_differ_from_step_to_step_row_to_row_and_seed_to_seed(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(20, 10)[None])  # one picture, so that nothing else can differ
    data = open_data(tmp_path / "a.npz")

    def rows(settings: DataSettings, seed: int, step: int) -> list[bytes]:
        loaded = PixelBatches(data, Order(1, 200, 0), settings, seed=seed).load(step)["x0"]
        return [row.tobytes() for row in np.array(loaded)]

    cut = DataSettings(10, crop="random", flip=True)
    batches = [rows(cut, seed, step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert all(len(set(batch)) == 11 * 2 for batch in batches)  # every place, flipped or not
    assert len({tuple(batch) for batch in batches}) == 3
    flips = rows(DataSettings((10, 20), flip=True), 0, 0)
    assert len(set(flips)) == 2
    assert 70 < flips.count(flips[0]) < 130


def test_draws_are_uniform_and_a_rows_do_not_depend_on_the_others():
    draws = augmentation_draws(3, 7, 1000)
    assert np.array_equal(augmentation_draws(3, 7, 10), draws[:10])
    assert 0 <= draws.min() < 0.01
    assert 0.99 < draws.max() < 1
    assert np.allclose(draws.mean(axis=0), 0.5, atol=0.04)
    assert np.allclose(np.corrcoef(draws.T), np.eye(3), atol=0.1)
    assert not np.array_equal(augmentation_draws(3, 8, 10), draws[:10])


def test_what_is_kept_in_memory_is_not_decoded_again(shapes, monkeypatch):
    read = []
    original = data_module.PictureData.read
    monkeypatch.setattr(
        data_module.PictureData, "read", lambda self, index: read.append(index) or original(self, index)
    )
    settings = DataSettings((10, 14), workers=1)
    kept = PixelBatches(shapes, Order(7, 7, 0), settings)
    first = [kept.load(step)["x0"] for step in range(4)]
    assert sorted(read) == list(range(7))
    read.clear()
    monkeypatch.setattr(data_module, "KEPT_BYTES", 3 * 10 * 20 * 3)  # a few of them
    some = PixelBatches(shapes, Order(7, 7, 0), settings)
    second = [some.load(step)["x0"] for step in range(4)]
    some.close()
    assert len(read) > 7 + 3 * 3
    assert all(mx.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_the_next_step_is_prepared_while_this_one_is_computed(shapes, monkeypatch):
    read = threading.Event()
    batches = PixelBatches(shapes, Order(7, 2, 0), DataSettings((10, 14)))
    following = set(Order(7, 2, 0).batch(1)) - set(Order(7, 2, 0).batch(0))
    original = data_module.PictureData.read

    def noted(self, index):
        if index in following:
            read.set()
        return original(self, index)

    monkeypatch.setattr(data_module.PictureData, "read", noted)
    batches.load(0)
    assert read.wait(30)


def test_a_picture_that_breaks_meanwhile_is_an_error_of_the_step_that_needs_it(shapes):
    order = Order(7, 2, 0)
    bad = order.batch(2)[0]
    steps_without = [step for step in range(2) if bad not in order.batch(step)]
    batches = PixelBatches(shapes, order, DataSettings((10, 14)))
    (shapes.path / shapes.entries[bad].name).write_bytes(b"gone bad")
    for step in steps_without:
        batches.load(step)
    for _ in range(2):  # again when asked again
        with pytest.raises(ModelError, match=shapes.entries[bad].name):
            batches.load(2)


def test_many_threads_keep_no_picture_twice(shapes, monkeypatch):
    original = data_module.PictureData.read
    monkeypatch.setattr(data_module.PictureData, "read", lambda self, index: time.sleep(0.01) or original(self, index))
    batches = PixelBatches(shapes, Order(7, 70, 0), DataSettings((10, 14), workers=8))
    batches.load(0)
    assert batches._kept_bytes == sum(kept.nbytes for kept in batches._kept.values())
    assert len(batches._kept) == 7


@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        (DataSettings(8, buckets=True, bucket_step=2), {}, r"data\.buckets: is for latent models"),
        (DataSettings(8, variants=2), {}, r"data\.variants: is for latent models"),
        (DataSettings(8), {"channels": 4}, "channels 4"),
        (DataSettings(), {}, r"data\.size 0"),
    ],
)
def test_settings_without_use_are_refused(shapes, settings, options, reason):
    with pytest.raises(UsageError, match=reason):
        PixelBatches(shapes, Order(7, 2, 0), settings, **options)


def test_an_order_of_other_pictures_is_refused(shapes):
    with pytest.raises(UsageError, match="is of 8 pictures, the data has 7"):
        PixelBatches(shapes, Order(8, 2, 0), DataSettings(8))


# --- the end

LOADING = """
import sys, time
from pathlib import Path
from mlx_cm.training.data import DataSettings, PixelBatches, make_order, open_data

data = open_data(Path(sys.argv[1]))
settings = DataSettings(256, workers=2)
batches = PixelBatches(data, make_order(data, settings, 8, 0), settings)
batches.load(0)
print("loaded", flush=True)
if sys.argv[2] == "wait":
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.1)  # a signal that comes just before a sleep is answered only after it
"""


@pytest.mark.parametrize("how", ["return", "wait"])
def test_a_program_ends_while_threads_are_at_work(tmp_path, how):
    root = write(tmp_path / "d", {f"{n}.png": encoded(n, width=600, height=500) for n in range(24)})
    command = [sys.executable, "-c", LOADING, str(root), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "loaded\n"
        if how == "wait":
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=45)  # less than the program would wait
    if how == "wait":
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert said.count("Traceback") == 1
    else:
        assert (process.returncode, said) == (0, "")
