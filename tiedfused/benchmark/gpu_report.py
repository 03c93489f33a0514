"""Everything that can be measured on an NVIDIA GPU, into one folder: ``make gpu-report OUT=folder [PART=1/3]``.

In one part bench measures its quick list, in several the full one; beside the peers, each regime that serves a problem,
so that the plan's choice is compared with what it did not take. max-autotune is left out, since its compilation takes
longer than all the rest; `tiedfused bench --peers max-autotune` measures it.
Each stage, tests, bench, profile, tune, is a process of its own with a time limit: what hangs or takes the GPU down
costs its own stage and no other. torch, Triton and pytest are enough; no network. At most seven files are written:
report.md, tests.txt, the results of bench, the config of tune in a folder of its own, and a trace for each profiled
problem. Where pytest-xdist is installed the tests run in up to twelve processes, and with pytest-timeout one that hangs
costs no other.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tiedfused.benchmark import bench, console, device, profile, report, tune
from tiedfused.benchmark.bench import part_of
from tiedfused.benchmark.shapes import LISTS, Shape, parse_all
from tiedfused.settings import REGIME_NAMES

SECONDS = 510
# What of the time that is left a stage may take, beside the stages after it.
WEIGHT = {"tests": 3.0, "bench": 5.0, "profile": 1.5, "tune": 1.5}
GRACE_SECONDS = 10
OVERRUN = 1.5  # bench leaves out what it has not begun when this much of its budget has passed
MOST_WORKERS = 12  # of the tests: each holds some memory of the GPU
TEST_SECONDS = 90  # for one test
ROOT = Path(__file__).parents[2]


def _tests(options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow"]
    command += ["-q", "-ra", "-p", "no:cacheprovider", "--tb=short"]
    # a test file whose imports are not installed here is an error of its own, and the others run
    command += ["--continue-on-collection-errors", *options.tests]
    for plugin, module, options_of in (
        # most of the time goes into hundreds of kernels, compiled one by one
        ("xdist", "xdist", ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]),
        # what hangs costs its own process; without xdist it would be the only one
        ("timeout", "pytest_timeout", ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]),
    ):
        try:
            importlib.import_module(module)
        except ImportError:
            break
        command += ["-p", plugin, *options_of]
    os.execv(command[0], command)


def _bench(options: argparse.Namespace) -> int:
    problems: list[str] = []
    bench.bench(
        quick=options.part == "1/1",
        shapes=options.shapes or (),
        peers=options.peers or (*bench.QUICK_PEERS, *REGIME_NAMES),
        device=options.device,
        out=options.out,
        budget=options.seconds / OVERRUN,
        part=options.part,
        pictures=False,
        problems=problems,
    )
    return int(bool(problems))


def _tables(out: Path) -> str:
    """Every results file in `out` as a table, from a run that was cut off too."""
    text = ""
    for path in sorted(out.glob("*.json")):
        try:
            results = report.load(path)
        except ValueError:  # not a results file
            continue
        columns, rows = report.full_table(results)
        problems = "".join(f"- {line}\n" for line in results["problems"])
        text += (
            f"{report.title(results)}\n\n{console.markdown(columns, rows, left=3)}\n\n{report.CAPTION}\n\n{problems}"
        )
    return text


def _profile(options: argparse.Namespace) -> int:
    shapes = _in_part(options.shapes or ["headline"], options.part)
    for shape in shapes[: len(LISTS["headline"])]:
        try:
            profile.profile(shape, None, "step", options.device, options.out, pictures=False)
        except (ValueError, RuntimeError) as error:
            print(f"({shape}): {str(error).splitlines()[0]}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    problems: list[str] = []
    shapes = [",".join(map(str, shape)) for shape in _in_part(options.shapes or ["tune"], options.part)]
    out = options.out / "tiles"  # its file is called as bench's is
    tune.tune(shapes=shapes, device=options.device, out=out, budget=0.9 * options.seconds, problems=problems)
    print("\n".join(f"- {line}" for line in problems))
    return int(bool(problems))


STAGES: dict[str, Callable[[argparse.Namespace], int]] = {
    "tests": _tests,
    "bench": _bench,
    "profile": _profile,
    "tune": _tune,
}


def _in_part(names: Sequence[str], part: str) -> list[Shape]:
    k, n = part_of(part)
    return parse_all(names, [])[k - 1 :: n]


def _run_stage(stage: str, arguments: Sequence[str], seconds: float, log: Path) -> str:
    """Run a stage in a process of its own, its output appended to `log`; how it ended."""
    command = [sys.executable, "-m", __spec__.name, "--stage", stage, "--seconds", f"{seconds:.0f}", *arguments]
    begin = time.perf_counter()
    errors = subprocess.STDOUT if stage == "tests" else None
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=errors, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
            ended = "done" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            ended = "cut off: what it had written by then is here"
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with it what it has started: nvidia-smi, compilers
            process.wait()
    return f"{stage}: {ended}, {time.perf_counter() - begin:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make gpu-report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder, made if it is not there")
    parser.add_argument(
        "--part", default="1/1", help="K/N: every N-th problem, from the K-th on; the tests in the first"
    )
    parser.add_argument("--device", default="", help="cpu tries the driver out; the GPU if any")
    parser.add_argument("--shapes", action="append", help="in place of each stage's own list; several times")
    parser.add_argument("--peers", action="append", help="as of `tiedfused bench`; several times")
    parser.add_argument("--tests", action="append", help="in place of all test files; several times")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--stage", choices=STAGES, help="run this one alone, its output to stdout")
    options = parser.parse_args(arguments)
    options.out, options.tests = options.out.resolve(), options.tests or ["tests"]
    try:
        part_of(options.part)
        where = device.resolve(options.device)
    except ValueError as error:
        parser.error(str(error))
    if not options.device and where.type == "cpu":
        parser.error("device: no GPU is present; --device cpu tries the driver out")
    if options.stage is not None:
        console.HAS_RICH = False  # the report is Markdown
        options.out.mkdir(parents=True, exist_ok=True)
        return STAGES[options.stage](options)

    begin = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "report.md"
    about = {**device.describe(where), **device.versions(), "commit": device.commit(), "part": options.part}
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    log.write_text(f"# {about['name']}\n\n{facts}\n")
    passed_on = ["--out", str(options.out), "--part", options.part, "--device", str(where)]
    passed_on += [word for shape in options.shapes or () for word in ("--shapes", shape)]
    passed_on += [word for peer in options.peers or () for word in ("--peers", peer)]
    passed_on += [word for path in options.tests for word in ("--tests", path)]
    stages = [stage for stage in STAGES if stage != "tests" or options.part.startswith("1/")]
    outcomes = []
    for i, stage in enumerate(stages):
        left = options.seconds - (time.perf_counter() - begin)
        seconds = max(5.0, left * WEIGHT[stage] / sum(WEIGHT[later] for later in stages[i:]))
        target = options.out / "tests.txt" if stage == "tests" else log
        with log.open("a") as file:
            file.write(f"\n## {stage}\n\n" + ("tests.txt\n" if stage == "tests" else ""))
        outcomes.append(_run_stage(stage, passed_on, seconds, target))
        if stage == "bench":
            with log.open("a") as file:
                file.write(_tables(options.out))
        console.warn(outcomes[-1])
    with log.open("a") as file:
        file.write("\n## Outcome\n\n" + "\n".join(f"- {outcome}" for outcome in outcomes) + "\n")
    print(log.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
