"""The benchmarks on tiny models: they run, compare, report, name what fails, and leave nothing behind."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mlx_cm.models.unet2d import IMAGENET_64
from mlx_cm.storage import NUMPY_DTYPES, TensorSource

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import checkpoints  # noqa: E402
import conversion  # noqa: E402
import decode_memory  # noqa: E402
import harness  # noqa: E402
import kill_and_resume  # noqa: E402
import latent  # noqa: E402
import lora_step  # noqa: E402
import mlx_side  # noqa: E402
import pixel  # noqa: E402
import tables  # noqa: E402
from harness import BenchmarkError, Side  # noqa: E402

# script => rows of each of its tables
SCRIPTS = {
    "conversion": {"conversion": 6},
    "pixel": {"comparison": 1, "memory": 1, "overhead": 2},
    "latent": {"comparison": 4, "memory": 1, "overhead": 2},
    "decode_memory": {"decoding": 3},
    "lora_step": {"lora_step": 2},
    "kill_and_resume": {"kills": 1},
}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # tiny models gain nothing from more
COMPARING = ("pixel", "latent")


def command(script: str, *options: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / f"{script}.py"), *options]


def run(script: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(script, *options), capture_output=True, text=True, timeout=300, env=ONE_THREAD)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict]:
    """What each script prints with --quick --json; they run at the same time, since their figures mean nothing."""
    running = {}
    for script in SCRIPTS:
        temp = tmp_path_factory.mktemp(script)
        arguments = command(script, "--quick", "--json", "--temp", str(temp))
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        running[script] = process, temp
    found = {}
    for script, (process, temp) in running.items():
        output, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages
        assert list(temp.iterdir()) == []
        found[script] = json.loads(output)  # stdout carries nothing else
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_reports_its_tables(reports, script):
    report = reports[script]
    assert {name: len(rows) for name, rows in report["tables"].items()} == SCRIPTS[script]
    numbers = [value for rows in report["tables"].values() for row in rows for value in row.values()]
    numbers = [value for value in numbers if isinstance(value, float)]
    assert len(numbers) > len(SCRIPTS[script])
    assert all(0 <= value < np.inf for value in numbers)
    assert report["machine"]["mlx"]
    assert report["machine"]["cores"] == os.cpu_count()
    assert report["machine"]["environment"]["OMP_NUM_THREADS"] == "1"
    assert report["command"].startswith(f"python benchmarks/{script}.py --quick")


@pytest.mark.parametrize("script", COMPARING)
def test_both_sides_computed_the_same(reports, script):
    for row in reports[script]["tables"]["comparison"]:
        assert 0 < row["relative_difference"] <= 1e-3  # two implementations never agree to the last bit
        assert row["ratio_low"] <= row["ratio_high"]


def test_conversion_is_in_units_of_file_and_tensor(reports):
    for row in reports["conversion"]["tables"]["conversion"]:
        assert row["parameters"] * 4 / tables.MIB == pytest.approx(row["file_mib"], rel=0.02)
        assert row["growth_by_largest"] == pytest.approx(row["growth_mib"] / row["largest_tensor_mib"])
        assert row["growth_mib"] < row["peak_mib"]
        if row["memory"] == "anonymous":
            assert row["growth_by_file"] < 0.5  # the file is not held in memory


def test_tiles_take_less_memory_than_the_whole(reports):
    whole, tiled, _ = reports["decode_memory"]["tables"]["decoding"]
    assert (whole["tile"], whole["memory_ratio"], whole["mlx_ratio"], whole["time_ratio"]) == (None, 1, 1, 1)
    assert (tiled["size"], tiled["tile"]) == (whole["size"], 8)
    assert tiled["mlx_ratio"] < 0.9


def test_recomputed_blocks_take_less_memory_for_the_same_step(reports):
    kept, recomputed = reports["lora_step"]["tables"]["lora_step"]
    assert (kept["recompute"], kept["peak_ratio"], kept["time_ratio"]) == (False, 1, 1)
    assert recomputed["recompute"]
    assert recomputed["peak_ratio"] < 1
    assert recomputed["state_mib"] == kept["state_mib"]
    assert kept["state_mib"] < kept["peak_mib"] < kept["memory_mib"]


def test_ours_only_needs_no_other_side():
    result = run("pixel", "--quick", "--ours-only", "--markdown")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("`python benchmarks/pixel.py --quick --ours-only`: medians of 1 on ")
    assert "| what | ours, s |" in result.stdout
    assert "diffusers, s" not in result.stdout
    assert "run 1 of 1: backbone, ours" in result.stderr


def test_a_table_is_printed_as_text_and_as_markdown():
    table = tables.Table("a", {"what": "{what}", "ratio": "{ratio:.1f}"}, [{"what": "x" * 6, "ratio": 2, "n": 1}])
    assert table.plain() == "what    ratio\nxxxxxx  2.0"
    assert table.markdown() == "| what | ratio |\n| --- | --- |\n| xxxxxx | 2.0 |"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_cleans_up(tmp_path, number, code):
    process = subprocess.Popen(
        command("pixel", "--quick", "--ours-only", "--runs", "1000000", "--temp", str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stderr:
            if line.startswith("run 3 of"):
                break
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == code
        assert "Traceback" not in rest
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # the side is gone too
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--temp", "/no/such/folder"], 1, "error: .*/no/such/folder"),
        (["--runs", "0"], 2, "expected at least 1, got 0"),
        (["--json", "--markdown"], 2, "not allowed with"),
    ],
)
def test_a_wrong_setting_is_named(options, code, message):
    result = run("conversion", "--quick", *options)
    assert result.returncode == code
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("size", ["100", "0", "1088"])
def test_a_size_that_one_side_would_tile_is_refused(size):
    result = run("latent", "--size", size)
    assert result.returncode == 2
    assert "expected a multiple of 64, at most 1024" in result.stderr


# --- a side


SIDE = f"""
import mmap, sys, time
sys.path.append({str(BENCHMARKS)!r})
import harness
import numpy as np

def allocate(mib):
    block = bytearray(b"x") * (mib << 20)
    time.sleep(0.2)  # the memory is looked at from outside, every few milliseconds
    return {{"kept": len(block)}}

def read_mapped(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return {{"total": sum(data[:: mmap.PAGESIZE])}}

def fail():
    print("it was the disk", file=sys.stderr)
    raise OSError("disk on fire")

def scaled(by):
    print("this is no answer")
    return np.array([1.0, 2.0]) * by

def wait(seconds):
    time.sleep(seconds)

def end(code):
    raise SystemExit(code)

stages = (allocate, read_mapped, fail, scaled, wait, end)
harness.serve({{stage.__name__: stage for stage in stages}})
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("side") / "side.py"
    path.write_text(SIDE)
    return path


@pytest.fixture(scope="module")
def side(script):
    with Side(script) as running:
        yield running


def test_a_side_returns_arrays_and_facts(side, tmp_path):
    reply = side.ask("scaled", save=tmp_path / "array.npy", by=3)
    assert np.load(tmp_path / "array.npy").tolist() == [3.0, 6.0]
    assert "kept" not in reply
    assert side.ask("allocate", mib=1)["kept"] == 2**20


def test_time_is_that_of_the_stage(side):
    assert 0.3 <= side.ask("wait", seconds=0.3)["seconds"] < 0.3 + harness.SETTLE_S


def test_memory_is_what_a_stage_adds_at_its_peak(side):
    grown = side.ask("allocate", mib=96)
    assert 90 * tables.MIB < grown["memory_growth"] < 110 * tables.MIB
    assert grown["memory_peak"] > grown["memory_growth"]
    assert grown["resident_peak"] >= grown["memory_growth"]
    assert side.ask("allocate", mib=0)["memory_growth"] < 10 * tables.MIB  # given back, and not counted again


@pytest.mark.skipif(harness.memory_kind() != "anonymous", reason="this system does not tell the two kinds apart")
def test_a_mapped_file_is_no_memory_of_the_process(side, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\1" * (64 * tables.MIB))
    reply = side.ask("read_mapped", path=str(path))
    assert reply["total"] >= 64 * tables.MIB // 65536
    assert reply["memory_growth"] < 16 * tables.MIB


def test_a_failure_names_the_stage_and_what_was_written(side):
    with pytest.raises(BenchmarkError, match=r"side.py: fail: OSError: disk on fire") as caught:
        side.ask("fail")
    assert "it was the disk" in str(caught.value)
    assert side.ask("allocate", mib=0)["kept"] == 0  # it goes on


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", "ended with exit code 1.*(\n.*)*No module named 'no_such_module'"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended with SIGKILL"),
    ],
)
def test_a_side_that_dies_is_an_error(tmp_path, source, message):
    (tmp_path / "dies.py").write_text(source)
    with pytest.raises(BenchmarkError, match=message):
        Side(tmp_path / "dies.py")


def test_a_side_that_ends_is_an_error(script):
    with Side(script) as side:
        with pytest.raises(BenchmarkError, match="ended with exit code 3"):
            side.ask("end", code=3)
        with pytest.raises(BenchmarkError, match=r"has ended|ended with"):
            side.ask("wait", seconds=0)


# --- comparing


class Recorded:
    """Stands for a `Side`: answers with given times and arrays, and remembers the order."""

    def __init__(self, name: str, order: list[str], seconds: list[float], array: list[float]):
        self.name, self.order, self.seconds, self.array = name, order, iter(seconds), array

    def ask(self, stage: str, save: Path | None = None) -> dict:
        self.order.append(f"{self.name} {stage}")
        if save:
            np.save(save, np.array(self.array))
        return {"seconds": next(self.seconds)}


def recorded(theirs: list[float]) -> tuple[dict[str, Recorded], list[str]]:
    order: list[str] = []
    ours = Recorded("ours", order, [2, 4, 6, 8], [1.0, 2.0])
    return {"ours": ours, "diffusers": Recorded("diffusers", order, [1, 1, 1, 2], theirs)}, order


def test_sides_take_turns(tmp_path):
    sides, order = recorded([1.0, 2.0001])
    seconds, differences = harness.alternate(sides, ["a", "b"], 2, tmp_path)
    assert order == ["ours a", "diffusers a", "ours b", "diffusers b"] * 2
    assert seconds["ours", "a"] == [2, 6]
    assert seconds["diffusers", "b"] == [1, 2]
    assert differences["a"] == pytest.approx(1e-4 / 5**0.5, rel=1e-3)


@pytest.mark.parametrize("theirs", [[1.0, 2.01], [1.0, 2.0, 3.0], [1.0, np.nan]])
def test_times_of_different_work_are_not_compared(tmp_path, theirs):
    with pytest.raises(BenchmarkError, match=r"a: the results differ by .*ours and diffusers did not compute the same"):
        harness.alternate(recorded(theirs)[0], ["a"], 1, tmp_path)


def test_a_ratio_is_that_of_medians():
    found = tables.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    assert found == {"ratio": 2.0, "ratio_low": 2.0, "ratio_high": 3.0}
    assert tables.per_run([1, 2, 3, 4, 5, 6], 3) == [6, 15]


def test_calls_are_timed_from_computed_inputs_to_a_computed_output():
    evaluated = []
    timed = harness.Timed(lambda x, by: evaluated.append("call") or x * by, lambda *values: evaluated.append(values))
    assert timed(2, by=3) == 6
    assert evaluated == [(2, 3), "call", (6,)]
    assert timed.calls == 1
    assert timed.seconds > 0
    assert harness.Timed(Path("a"), print).name == "a"


def test_a_pipeline_that_calls_its_network_too_often_is_an_error():
    class Pipeline:
        def __init__(self):
            self.backbone = abs

        def decode(self, x: int) -> int:
            return x

    pipeline = Pipeline()
    generate = lambda: pipeline.decode(pipeline.backbone(-1) + pipeline.backbone(-2))  # noqa: E731
    assert mlx_side.watched(pipeline, {"backbone": 2, "decode": 1}, generate)()["inside"] > 0
    with pytest.raises(BenchmarkError, match="'backbone': 2"):
        mlx_side.watched(pipeline, {"backbone": 1, "decode": 1}, generate)()
    assert vars(pipeline) == {"backbone": abs}  # as it was


def published_tables() -> list[tables.Table]:
    compared = [{"a": 1.0}, {"seconds": 1.0, "inside": 1.0, "resident_peak": 1}]
    seconds = {("ours", "a"): [1.0], ("diffusers", "a"): [1.0]}
    return [
        tables.Table("conversion", conversion.COLUMNS, []),
        tables.Table("decoding", decode_memory.COLUMNS, []),
        tables.Table("kills", kill_and_resume.COLUMNS, []),
        tables.Table("lora_step", lora_step.COLUMNS, []),
        tables.comparison({"a": "A"}, seconds, compared[0]),
        tables.memory("A", {"ours": compared[1], "diffusers": compared[1]}),
        *(tables.overhead(parts, [1.0], [1.0], [compared[1]]) for parts in (pixel.PARTS_TITLE, latent.PARTS_TITLE)),
    ]


@pytest.mark.parametrize("table", published_tables(), ids=lambda table: table.name)
def test_the_readme_has_the_tables_that_are_printed(table):
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert "\n".join(table.markdown().splitlines()[:2]) in readme


@pytest.mark.parametrize("module", ["harness", "tables", "diffusers_side"])
def test_the_other_side_has_its_process_to_itself(module):
    tree = ast.parse((BENCHMARKS / f"{module}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] in ("mlx", "mlx_cm", "checkpoints", "mlx_side")}


# --- checkpoints


def test_the_format_of_torch_save_is_written_without_torch(tmp_path):
    arrays = {
        "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "b": np.float32([1.5]),
        "ü" * 300: np.zeros((70_000, 1), np.float32),
    }
    sources = [TensorSource(name, "F32", value.shape, lambda value=value: value) for name, value in arrays.items()]
    checkpoints.write_torch(tmp_path / "a.pt", sources)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(loaded) == list(arrays)
    for name, value in arrays.items():
        assert loaded[name].is_contiguous()
        np.testing.assert_array_equal(loaded[name].numpy(), value)


def test_the_converted_model_has_the_published_size():
    tensors = checkpoints.openai_tensors(IMAGENET_64)
    assert sum(tensor.nbytes for tensor in tensors) == 4 * 295_899_267


def test_random_values_depend_on_the_name_alone():
    values = checkpoints.random_values("a.weight", (64, 32, 3, 3))
    np.testing.assert_array_equal(values, checkpoints.random_values("a.weight", (64, 32, 3, 3)))
    assert not np.array_equal(values, checkpoints.random_values("b.weight", (64, 32, 3, 3)))
    assert values.dtype == NUMPY_DTYPES["F32"]
    assert values.std() == pytest.approx((32 * 9) ** -0.5, rel=0.02)
    assert checkpoints.random_values("norm.weight", (1000,)).mean() == pytest.approx(1, abs=0.01)
