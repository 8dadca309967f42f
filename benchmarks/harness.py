"""What the benchmarks share: processes that are timed, the machine they run on, a command line.

Neither MLX nor torch is imported here, so that each side of a comparison has a process to itself: the OpenBLAS that
mlx_cm loads would take over torch's matrix products and make them half as fast.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tables import OURS, THEIRS, Table

PACKAGES = ("mlx", "numpy", "torch", "diffusers", "transformers")
ENVIRONMENT = ("OPENBLAS_", "OMP_", "MKL_", "MLX_")  # prefixes of variables that change the figures
PAGE = os.sysconf("SC_PAGE_SIZE")
SETTLE_S = 0.2  # threads of the other side spin for a while after their last product
SAMPLE_S = 0.005  # between two looks at the memory of a process
LOG_LINES = 8  # of a failed process that are shown
RUNS = 3
# Relative difference above which two sides did not compute the same, by NumPy's kind of number; one level everywhere in
# a picture of 8 bits is about 1e-2.
TOLERANCES = {"f": 1e-3, "u": 1e-2}


class BenchmarkError(Exception):
    """Nothing can be measured, and why."""


# --- a side of a comparison


class Side:
    """A process that computes what it is asked to, one stage at a time, and idles in between.

    Args:
        command: a Python file that calls `serve`, and its arguments.
    """

    def __init__(self, *command: str | Path):
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed by __exit__
        self._name = Path(command[0]).name
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self._memory = self._reply()[1]
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, stage: str, save: Path | None = None, **arguments: Any) -> dict[str, Any]:
        """Runs a stage.

        Args:
            save: an `.npy` file for what the stage returns.
            arguments: of the stage.

        Returns:
            "seconds"; "memory_peak" and "memory_growth" while it ran, bytes, see `memory_kind`, growth at least a page;
            "resident_peak", bytes, mapped files included; and what the stage reports.

        Raises:
            BenchmarkError: the stage failed.
        """
        time.sleep(SETTLE_S)
        before = memory_of(self._process.pid) or self._memory
        request = {"stage": stage, "save": None if save is None else str(save), "arguments": arguments}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure("has ended") from None
        reply, self._memory = self._reply()
        return reply | {
            "memory_peak": self._memory.anonymous,
            "memory_growth": max(self._memory.anonymous - before.anonymous, PAGE),
            "resident_peak": self._memory.resident,
        }

    def _reply(self) -> tuple[dict[str, Any], "Memory"]:
        """The next line of the process, and the greatest memory seen until then."""
        seen = []
        while not select.select([self._process.stdout], [], [], SAMPLE_S)[0]:
            seen.append(memory_of(self._process.pid))
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise self._failure(f"ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")
        reply = json.loads(line)
        if "error" in reply:
            raise self._failure(reply["error"])
        seen.append(memory_of(self._process.pid))
        known = [memory for memory in seen if memory] or [Memory(reply["max_rss"], reply["max_rss"])]
        return reply, Memory(*map(max, zip(*known, strict=True)))

    def _failure(self, why: str) -> BenchmarkError:
        self._log.seek(0)
        tail = "".join(f"\n    {line}" for line in self._log.read().splitlines()[-LOG_LINES:])
        return BenchmarkError(f"{self._name}: {why}" + (f"; it wrote last:{tail}" if tail else ""))


def serve(stages: dict[str, Callable[..., Any]]) -> None:
    """Answers the requests of a `Side` until its end of the pipe closes; never returns before.

    Args:
        stages: functions whose time is taken. Each returns when its result is computed: an array, or a dict of facts
            that are added to the answer.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

    def answer(reply: dict[str, Any]) -> None:
        print(json.dumps(reply | {"max_rss": max_rss()}), file=replies, flush=True)

    answer({})  # ready
    for line in sys.stdin:
        request = json.loads(line)
        try:
            start = time.perf_counter()
            result = stages[request["stage"]](**request["arguments"])
            seconds = time.perf_counter() - start
            if request["save"]:
                np.save(request["save"], np.asarray(result))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{request['stage']}: {type(error).__name__}: {error}"})
            continue
        answer({"seconds": seconds, **(result if isinstance(result, dict) else {})})


class Memory(NamedTuple):
    """Memory of a process, bytes."""

    anonymous: int  # its own: pages of mapped files are not counted
    resident: int  # with those


def memory_of(pid: int) -> Memory | None:
    """What a process occupies now; None where the system does not tell, or the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return Memory(*(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")))
    except (OSError, KeyError):
        return None


def max_rss() -> int:
    """Greatest resident memory of this process since it began, bytes: what there is where there is no /proc."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_kind() -> str:
    """What "memory_peak" and "memory_growth" count; "resident": the peak since the process began."""
    return "anonymous" if memory_of(os.getpid()) else "resident"


def has_openblas() -> bool:
    """Whether OpenBLAS takes the matrix products of this process; NumPy's own copy has another name."""
    try:
        return "/libopenblas" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


class Timed:
    """Stands for a network or a function and adds up what its calls take, from computed inputs to a computed output.

    Args:
        wrapped: what is called.
        evaluate: computes the arrays among its arguments.
    """

    def __init__(self, wrapped: Callable[..., Any], evaluate: Callable[..., None]):
        self._wrapped, self._evaluate = wrapped, evaluate
        self.calls, self.seconds = 0, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._evaluate(*arguments, *options.values())
        start = time.perf_counter()
        result = self._wrapped(*arguments, **options)
        self._evaluate(result)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


# --- comparing


@contextlib.contextmanager
def both(script: str, benchmark: str, folder: Path, ours_only: bool) -> Iterator[dict[str, Side]]:
    """Our side, which is the script itself, and diffusers'; both are ended on leaving.

    Args:
        benchmark: of diffusers_side.py.
        folder: what both read.
    """
    with contextlib.ExitStack() as stack:
        progress("loading")
        sides = {OURS: stack.enter_context(Side(script, "--side", folder))}
        if not ours_only:
            sides[THEIRS] = stack.enter_context(Side(Path(__file__).with_name("diffusers_side.py"), benchmark, folder))
        yield sides


def alternate(
    sides: dict[str, Side], stages: Iterable[str], runs: int, folder: Path
) -> tuple[dict[tuple[str, str], list[float]], dict[str, float]]:
    """Times each stage on each side in turn, so that what slows the machine down meets all of them.

    Args:
        stages: in order; one that is listed several times is timed as often per run.
        folder: for results, which are compared in the first run.

    Returns:
        Seconds by (side, stage), and the relative difference of the two sides by stage.

    Raises:
        BenchmarkError: a stage failed, or two sides did not compute the same.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    differences: dict[str, float] = {}
    for run in range(runs):
        for stage in stages:
            compare = len(sides) == 2 and stage not in differences
            files = {side: folder / f"{side}-{stage}.npy" for side in sides} if compare else {}
            for name, side in sides.items():
                progress(f"run {run + 1} of {runs}: {stage}, {name}")
                seconds.setdefault((name, stage), []).append(side.ask(stage, save=files.get(name))["seconds"])
            if compare:
                results = [np.load(file) for file in files.values()]
                differences[stage] = relative_difference(*results)
                limit = TOLERANCES[results[0].dtype.kind]
                if not differences[stage] <= limit:  # true for NaN too
                    raise BenchmarkError(
                        f"{stage}: the results differ by {differences[stage]:.1e}, expected at most {limit:.0e}: "
                        f"{' and '.join(sides)} did not compute the same"
                    )
    return seconds, differences


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||; infinite where the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- the machine


def machine(device: str | None) -> dict[str, Any]:
    """What the figures depend on.

    Args:
        device: MLX's, where it matters.
    """
    total = PAGE * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES if is_installed(name)},
        "device": device,
        "openblas": has_openblas(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)},
        "load": round(os.getloadavg()[0], 1),  # processes that wanted to run in the minute before
    }


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def describe(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {facts[name]}" for name in PACKAGES if name in facts)
    variables = "".join(f", {name}={value}" for name, value in facts["environment"].items())
    device = f"MLX on {facts['device']}, " if facts["device"] else ""
    blas = "with OpenBLAS" if facts["openblas"] else "without OpenBLAS"
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']:g} GiB, {facts['system']}; "
        f"{device}{blas}; Python {facts['python']}, {versions}{variables}; load {facts['load']:g}"
    )


# --- reporting


Measure = Callable[[argparse.Namespace, Path], list[Table]]


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=positive, help=f"measurements of each kind, the median counts (default: {RUNS})")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that it works, measures nothing")
    parser.add_argument("--temp", type=Path, help="folder for temporary files (default: the system's)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--markdown", action="store_true", help="print what goes into benchmarks/README.md")
    parser.add_argument("--side", type=Path, nargs="?", const=Path(), help=argparse.SUPPRESS)  # runs as one side
    return parser


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks that compare with diffusers."""
    parser.add_argument("--ours-only", action="store_true", help="no comparison: torch and diffusers are not needed")


def check_comparison(arguments: argparse.Namespace) -> None:
    """Says what is missing before anything is computed.

    Raises:
        BenchmarkError: the other side cannot run.
    """
    missing = [name for name in ("torch", "diffusers", "transformers") if not is_installed(name)]
    if missing and not arguments.ours_only:
        raise BenchmarkError(f"{', '.join(missing)} missing; pip install -e '.[test]', or pass --ours-only")


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse wants it."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number


def progress(text: str) -> None:
    """Says on stderr what is being measured."""
    print(text, file=sys.stderr, flush=True)


def run(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, measure: Measure, device: str | None = None
) -> None:
    """Measures in a temporary folder and prints the tables; ends the process on an error.

    Args:
        measure: (arguments, folder) => tables.
        device: MLX's, where it matters.
    """
    arguments.runs = arguments.runs or (1 if arguments.quick else RUNS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of the clean-up
    facts = machine(device)
    if facts["load"] > facts["cores"] / 2:
        progress(f"the machine is busy (load {facts['load']:g} on {facts['cores']} cores): the figures will be too")
    if sys.platform == "linux" and not facts["openblas"]:
        progress("without OpenBLAS MLX is many times slower on a CPU: apt-get install libopenblas0-pthread")
    try:
        with tempfile.TemporaryDirectory(prefix="mlx-cm-benchmark-", dir=arguments.temp) as folder:
            tables = measure(arguments, Path(folder))
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, "interrupted\n")
    except (BenchmarkError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    shown = [word for word in sys.argv[1:] if word not in ("--json", "--markdown")]
    command = shlex.join(["python", f"benchmarks/{Path(parser.prog).name}", *shown])
    if arguments.json:
        by_name = {table.name: table.rows for table in tables}
        print(json.dumps({"command": command, "runs": arguments.runs, "machine": facts, "tables": by_name}))
        return
    before, after, render = ("`", "`", Table.markdown) if arguments.markdown else ("", "", Table.plain)
    print(f"{before}{command}{after}: medians of {arguments.runs} on {describe(facts)}")
    for table in tables:
        print("\n" + render(table))
