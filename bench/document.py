"""Write what the documentation shows of the measurements, from the files in bench/results/.

    python bench/document.py          docs/benchmarks.md, its pictures, and the marked parts of README.md
    python bench/document.py --check  say what of these is not what the results say, and change nothing

A file NAME.md beside NAME.json explains the worst ratios of that device in words; it is the only part written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tiedfused.benchmark import plots, report
from tiedfused.benchmark.console import markdown
from tiedfused.benchmark.peers import MEANING
from tiedfused.benchmark.report import Results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
HEADLINE = "cpu"  # README shows the first device of this type
README_PICTURE = "ratios"

# Devices whose absence is worth a line.
WANTED = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
GPU_COMMAND = "make gpu-report OUT=folder"


def load_all() -> dict[str, list[tuple[Path, Results]]]:
    """Device → its files; the parts of a run that was split belong together."""
    found: dict[str, list[tuple[Path, Results]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        results = report.load(path)
        found.setdefault(results["device"]["name"], []).append((path, results))
    return found


def device_section(name: str, files: list[tuple[Path, Results]]) -> str:
    """One device: provenance, table, what is missing, worst ratios, pictures."""
    whole: Results = {**files[0][1], "cells": [cell for _, results in files for cell in results["cells"]]}
    lines = [f"## {name}", ""]
    for path, results in files:
        lines.append(f"{report.title(results)}. `{results['command']}` → [`{path.name}`](../bench/results/{path.name})")
    lines += ["", _device_facts(whole), ""]
    columns, rows = report.full_table(whole)
    lines += [markdown(columns, rows, left=3), "", report.CAPTION, ""]
    missing = [*report.skipped(whole), *(line for _, results in files for line in results["problems"])]
    if missing:
        lines += ["Not measured, or not well, and why:", "", *(f"- {line}" for line in dict.fromkeys(missing)), ""]
    lines += ["### The three worst ratios", ""]
    for row, peer, ratio in report.worst(whole):
        lines.append(f"- ({row.key[0]}) {row.key[1]} {row.key[2]}: {ratio:.2f}× {peer}")
    note = files[0][0].with_suffix(".md")
    if note.is_file():
        lines += ["", note.read_text().strip()]
    for path, _ in files:
        for kind, text in PICTURES.items():
            picture = path.with_name(f"{path.stem}-{kind}.png")
            if picture.is_file():
                lines += ["", f"![{text}](../bench/results/{picture.name})"]
    return "\n".join(lines)


PICTURES = {
    "throughput": "Throughput against d, with the rate of one large product",
    "ratios": "Time of each peer over tiedfused's",
    "memory": "Peak memory of a training step against H",
    "roofline": "Roofline",
}


def _device_facts(results: Results) -> str:
    facts = {key: value for key, value in results["device"].items() if key != "name"}
    facts["products"] = ", ".join(f"{dtype}: {library}" for dtype, library in results["gemm"].items())
    seen: dict[str, list[float]] = {}
    for cell in results["cells"]:
        for quantity, (low, _, high) in cell["clocks"].items():
            seen.setdefault(quantity, []).extend((low, high))
    facts |= {f"{quantity} seen": f"{min(values):.0f} to {max(values):.0f}" for quantity, values in seen.items()}
    return "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items()) + "."


def page() -> str:
    """The whole of docs/benchmarks.md."""
    devices = load_all()
    lines = [
        "<!-- Written by `make docs` from bench/results/*.json. Do not edit. -->",
        "",
        "# Benchmarks",
        "",
        "The layer with relu and both biases; a step is forward and backward with all four gradients. A result is "
        "first compared with float64: where it is wrong there is no time. A device's table names its commit and the "
        "command that reproduces it.",
        "",
        "Beside tiedfused:",
        "",
        *(f"- {peer}: {text}" for peer, text in MEANING.items()),
        "",
        "A column with the name of a [regime](regimes.md) is tiedfused kept to that regime, where it was asked for.",
        "",
    ]
    for name, files in devices.items():
        lines += [device_section(name, files), ""]
    for name in WANTED:
        if name not in devices:
            lines += [f"## {name}", "", f"not measured. `{GPU_COMMAND}` measures it.", ""]
    return "\n".join(lines).rstrip() + "\n"


def headline() -> tuple[Path, Results]:
    """The file that README shows."""
    return next(files[0] for files in load_all().values() if files[0][1]["device"]["type"] == HEADLINE)


def readme() -> str:
    """README.md with its marked parts written anew."""
    path, results = headline()
    columns, rows = report.headline_table(results)
    relative = path.relative_to(ROOT)
    picture = relative.with_name(f"{path.stem}-{README_PICTURE}.png")
    parts = {
        "benchmark table": f"{report.title(results)}; `{results['command']}` → [`{relative}`]({relative})\n\n"
        + markdown(columns, rows, left=3),
        "benchmark picture": f"![{PICTURES[README_PICTURE]}]({picture})",
    }
    text = README.read_text()
    for name, content in parts.items():
        text, found = re.subn(
            rf"(<!-- {name}: make docs -->\n).*?(<!-- end -->)",
            lambda match, content=content: f"{match[1]}{content}\n{match[2]}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        assert found == 1, f"README.md: {found} parts are marked {name!r}"
    return text


def stale() -> list[str]:
    """What is not as the results say: file names, relative to the repository."""
    wrong = [
        str(path.relative_to(ROOT)) for path, text in ((PAGE, page()), (README, readme())) if path.read_text() != text
    ]
    for files in load_all().values():
        for path, results in files:
            for picture in path.parent.glob(f"{path.stem}-*.png"):
                if plots.fingerprint(results).encode() not in picture.read_bytes():
                    wrong.append(str(picture.relative_to(ROOT)))
    return wrong


def main() -> int:
    """Write, or with --check compare."""
    if sys.argv[1:] == ["--check"]:
        for name in stale():
            print(f"{name} does not show bench/results/*.json: run `make docs`")
        return int(bool(stale()))
    for files in load_all().values():
        for path, results in files:
            plots.draw_all(results, path)
    PAGE.write_text(page())
    README.write_text(readme())
    return 0


if __name__ == "__main__":
    sys.exit(main())
