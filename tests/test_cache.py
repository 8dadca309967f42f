"""The cache of converted models, in a folder of its own per test."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mlx_cm import cache
from mlx_cm.errors import DiskError, ModelError, UsageError
from mlx_cm.storage import atomic_folder, write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_CM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def convert(entry: Path, index: dict | None, size: int = 1000) -> Path:
    """Writes what a conversion leaves."""
    with atomic_folder(entry) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "model.safetensors").write_bytes(bytes(size))
        if index is not None:
            write_json(folder / "model_index.json", index)
    return entry


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MLX_CM_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"MLX_CM_CACHE": "~/models"}, "/home/u/models"),
        ({"MLX_CM_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/mlx-cm"),
        ({"XDG_CACHE_HOME": ""}, "/home/u/.cache/mlx-cm"),
        ({}, "/home/u/.cache/mlx-cm"),
    ],
)
def test_root(monkeypatch, environment, expected):
    for name in ("MLX_CM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/u", **environment}.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_root()) == expected


def test_hub_entries_have_a_folder_each(root):
    plain = cache.hub_entry("owner/name", COMMIT)
    assert plain == root / "models" / "owner--name" / "0123456789ab"
    assert cache.hub_entry("owner/name", COMMIT, "fp16").name == "0123456789ab-fp16"
    assert cache.hub_entry("owner/name", OTHER) != plain
    assert cache.hub_entry("a-/b", COMMIT) != cache.hub_entry("a/b", COMMIT)


@pytest.mark.parametrize(
    "arguments",
    [
        ("../evil", COMMIT),
        ("a/../b", COMMIT),
        ("/abs/x", COMMIT),
        ("a/b/c", COMMIT),
        ("a/..", COMMIT),
        ("a/b", "main"),
        ("a/b", "../" + COMMIT),
        ("a/b", COMMIT, "../x"),
        ("a/b", COMMIT, "fp16/x"),
    ],
)
def test_names_that_lead_elsewhere(arguments):
    with pytest.raises(UsageError):
        cache.hub_entry(*arguments)


# ---- local sources ----


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "My Model (v2)"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "model.safetensors").write_bytes(b"1234")
    return folder


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda folder: None, True),
        (lambda folder: (folder / "unet" / "model.safetensors").read_bytes(), True),
        (lambda folder: (folder / ".DS_Store").write_text("finder was here"), True),
        (lambda folder: touch(folder / "unet" / "model.safetensors"), False),
        (lambda folder: (folder / "unet" / "model.safetensors").write_bytes(b"12345"), False),
        (lambda folder: (folder / "unet" / "config.json").write_text("{}"), False),
        (lambda folder: (folder / "model_index.json").rename(folder / "other.json"), False),
        (lambda folder: (folder / "unet" / "model.safetensors").unlink(), False),
    ],
    ids=["nothing", "read", "hidden file", "mtime", "size", "new file", "renamed", "removed"],
)
def test_a_changed_source_has_another_entry(root, source, change, same):
    before = cache.local_entry(source)
    assert before.parent == root / "local"
    assert before.name.startswith("My_Model_v2_-")
    change(source)
    assert (cache.local_entry(source) == before) == same


def test_a_source_is_its_real_path(source, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source.parent)
    entry = cache.local_entry(source)
    assert cache.local_entry(tmp_path / "link") == entry
    assert cache.local_entry(Path(source.name)) == entry


def test_linked_folders_count_and_loops_end(source, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"1")
    (source / "vae").symlink_to(tmp_path / "vae")
    (source / "unet" / "up").symlink_to(source)
    before = cache.local_entry(source)
    touch(tmp_path / "vae" / "model.safetensors")
    assert cache.local_entry(source) != before


def test_a_single_file_and_what_cannot_be_read(root, source, tmp_path):
    file = source / "unet" / "model.safetensors"
    assert cache.local_entry(file).name.startswith("model-")
    before = cache.local_entry(file)
    touch(file)
    assert cache.local_entry(file) != before
    with pytest.raises(ModelError, match="does not exist"):
        cache.local_entry(tmp_path / "missing")
    (source / "broken.safetensors").symlink_to(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"broken\.safetensors"):
        cache.local_entry(source)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ModelError):
        cache.local_entry(tmp_path / "loop")


# ---- entries ----


def test_entries_of_an_empty_cache(root):
    assert cache.entries() == []
    assert cache.find("owner/name") == []
    assert not root.exists()


def test_entries_tell_what_is_known(root, source):
    index = {"provenance": {"source": "owner/name", "revision": COMMIT, "family": "lcm"}}
    full = convert(cache.hub_entry("owner/name", COMMIT), index)
    bare = convert(cache.hub_entry("owner/name", OTHER, "fp16"), {})
    broken = convert(cache.hub_entry("other/x", OTHER), None)
    wrong = convert(cache.hub_entry("wrong/x", OTHER), {"provenance": {"family": 3, "revision": None}})
    odd = convert(cache.hub_entry("odd/x", OTHER), {"provenance": ["x"]})
    local = convert(cache.local_entry(source), {"provenance": {"source": source.name, "family": "cm"}})
    (root / "models" / "owner--name" / ".0123.0123abcd.partial").mkdir()
    (root / "models" / "owner--name" / "notes.txt").write_text("no folder")

    found = {entry.path: entry for entry in cache.entries()}
    facts = {path: (entry.source, entry.revision, entry.family) for path, entry in found.items()}
    assert facts == {
        full: ("owner/name", COMMIT, "lcm"),
        bare: ("owner/name", None, None),
        broken: ("other/x", None, None),
        odd: ("odd/x", None, None),
        wrong: ("wrong/x", None, None),
        local: (source.name, None, "cm"),
    }
    assert found[broken].size_bytes == 1000
    assert found[full].size_bytes == 1000 + (full / "model_index.json").stat().st_size
    assert abs(found[full].created - time.time()) < 60


def test_find(source):
    index = {"provenance": {"source": "owner/name", "revision": COMMIT}}
    first = convert(cache.hub_entry("owner/name", COMMIT), index)
    second = convert(cache.hub_entry("owner/name", OTHER), {})
    local = convert(cache.local_entry(source), {"provenance": {"source": source.name}})
    for ref, expected in (
        ("owner/name", {first, second}),
        (f"owner/name@{COMMIT}", {first}),
        ("owner/name@0123", {first}),
        ("owner/name@fedcba98", {second}),
        ("owner/name@main", set()),
        ("owner/nam", set()),
        (str(first), {first}),
        (str(source), {local}),
        ("", set()),
    ):
        assert {entry.path for entry in cache.find(ref)} == expected, ref
    touch(source / "model_index.json")
    assert cache.find(str(source)) == []


# ---- removal ----


def test_remove(root):
    index = {"provenance": {"source": "owner/name", "revision": COMMIT}}
    kept = convert(cache.hub_entry("owner/name", OTHER), {})
    convert(cache.hub_entry("owner/name", COMMIT), index, size=5000)
    (entry,) = cache.find("owner/name@0123")
    assert cache.remove(entry) == entry.size_bytes > 5000
    assert [entry.path for entry in cache.entries()] == [kept]
    assert cache.remove(entry) == 0  # gone already
    assert cache.remove(cache.entries()[0]) > 0
    assert list((root / "models").iterdir()) == []


def test_remove_takes_stale_leftovers_along(root):
    convert(cache.hub_entry("owner/name", COMMIT), {})
    leftovers = [root / "models" / "owner--name" / f".{name}.0123abcd.partial" for name in ("stale", "living", "deep")]
    for folder in leftovers:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "model.safetensors").write_bytes(bytes(700))
    hour_ago = time.time() - cache.STALE_SECONDS - 10
    for folder in (leftovers[0], leftovers[2]):
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (hour_ago, hour_ago))
    os.utime(leftovers[2] / "unet" / "model.safetensors")  # still being written, deep inside

    (entry,) = cache.entries()
    assert cache.remove(entry) == entry.size_bytes + 700
    assert [folder.exists() for folder in leftovers] == [False, True, True]


def test_removes_nothing_outside_of_the_cache(root, tmp_path):
    (tmp_path / "precious").mkdir()
    for path in (tmp_path / "precious", root / "models" / ".." / ".." / "precious", root, root / "models"):
        with pytest.raises(UsageError):
            cache.remove(cache.Entry(path, None, None, None, 0, 0.0))
    assert (tmp_path / "precious").is_dir()


def test_a_failed_removal_is_a_disk_error(monkeypatch):
    convert(cache.hub_entry("owner/name", COMMIT), {})
    (entry,) = cache.entries()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache.shutil, "rmtree", refuse)
    with pytest.raises(DiskError, match="permission denied"):
        cache.remove(entry)
    assert cache.entries() == []  # it was out of the way in one step all the same


# ---- locks ----


def convert_once(entry: Path, log: Path, barrier) -> None:
    """What a process does that needs a converted model."""
    barrier.wait(20)
    with cache.conversion_lock(entry):
        if entry.is_dir():
            line = "found"
        else:
            time.sleep(0.2)
            convert(entry, {})
            line = "converted"
        with log.open("a") as file:
            file.write(line + "\n")


def test_one_process_converts_and_the_others_find(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    entry, log = cache.hub_entry("owner/name", COMMIT), tmp_path / "log"
    processes = [context.Process(target=convert_once, args=(entry, log, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(log.read_text().split()) == ["converted", "found", "found"]
    assert len(cache.entries()) == 1


def hold_lock(entry: Path, held) -> None:
    with cache.conversion_lock(entry):
        held.set()
        time.sleep(60)


def test_a_killed_process_holds_no_lock():
    context = multiprocessing.get_context("spawn")
    held, entry = context.Event(), cache.hub_entry("owner/name", COMMIT)
    process = context.Process(target=hold_lock, args=(entry, held))
    process.start()
    assert held.wait(20)
    with cache.conversion_lock(cache.hub_entry("owner/name", OTHER)):
        pass  # another model is not in the way
    process.kill()
    process.join(20)
    with cache.conversion_lock(entry):
        pass


def test_errors_inside_the_lock_stay_themselves(root):
    with pytest.raises(PermissionError), cache.conversion_lock(root / "models" / "a--b" / "x"):
        raise PermissionError(13, "of something else")


def test_a_cache_that_cannot_be_written(root):
    root.write_text("a file in the way")
    with pytest.raises(DiskError), cache.conversion_lock(root / "models" / "a--b" / "x"):
        pass
