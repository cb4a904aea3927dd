"""Benchmark of fastcalib against eager PyTorch, torch.compile and its peers, beside what the machine's memory allows.

    python benchmarks/run.py                  every row (half an hour or more)
    python benchmarks/run.py --quick          seven rows, about a minute
    python benchmarks/run.py --targets        the table of figures to reach, with pass or FAIL
    python benchmarks/run.py --scaling        time and memory against V, N, K and M, with fitted slopes
    python benchmarks/run.py --overhead       microseconds per call on tiny logits
    python benchmarks/run.py --scale          order, cutoffs and shape of 10,000 prefixes, V = 151,936 (3 minutes)
    python benchmarks/run.py --only 'ranks.*bf16' --json out.json --plot out.png --markdown out.md
    python benchmarks/run.py --device cuda    the rows on a GPU, with the peers that have GPU kernels

Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench import gpu, gpu_peers, gpu_suite, scale
from bench.cases import QUICK, SHORT, Case, all_cases
from bench.machine import describe
from bench.memory import RETAINED_HEAP
from bench.overhead import run_overhead
from bench.peers import survey
from bench.plot import draw
from bench.problem import SHAPES
from bench.report import describe_machine, format_overhead, format_row, format_scaling, markdown
from bench.scaling import run_scaling
from bench.suite import SCHEMA, Settings, run_cases, validate
from bench.target_runs import retained_run, run_targets
from bench.targets import format_table

# Samples of each competitor by device: in full, and with --quick.
ROUNDS = {"cpu": (9, 3), "cuda": (50, 20)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the rows are measured (default: %(default)s)")
    add("--quick", action="store_true", help="seven rows and short sampling")
    add("--targets", action="store_true", help="only the table of figures to reach")
    add("--scaling", action="store_true", help="only the growth of time and memory")
    add("--overhead", action="store_true", help="only the cost of a call")
    add("--scale", action="store_true", help="only the diagnostics of many prefixes, beside plain PyTorch on a few")
    add("--prefixes", type=int, metavar="N", default=scale.PREFIXES, help="of --scale (default: %(default)s)")
    add("--all", action="store_true", help="rows, targets, scaling, overhead and scale")
    add("--only", metavar="REGEX", help="only rows whose name matches, e.g. 'statistics K=1 .*fp32.*fwd$'")
    add("--shapes", type=shapes, default=None, metavar="NxV[,NxV]",
        help="other sizes than the table's (the figures to reach are defined at 256x128256 only)")  # fmt: skip
    add("--list", action="store_true", help="print the names of the rows and stop")
    heaps = "gradients in fresh memory, in a child process that keeps its heap, or both (default, unless --quick)"
    add("--heap", choices=("fresh", "retained", "both"), default=None, help=heaps)
    add("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s, as torch")
    add("--rounds", type=int, default=None, help="samples of each competitor (default 9, quick 3, on a GPU 50 and 20)")
    add("--budget", type=float, default=None, help="seconds of sampling per row (default 20, quick 5)")
    add("--no-wait", action="store_true", help="do not wait for the rest of the machine to be idle (to try things out)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--json", metavar="FILE", help="write everything measured")
    add("--plot", metavar="FILE.png", help="write a picture of the rows")
    add("--markdown", metavar="FILE.md", help="write the tables, with the machine described")
    earlier = "measure nothing: tables and picture from earlier --json; later files add to the first"
    add("--from-json", metavar="FILE", nargs="+", help=earlier)
    add("--retained-child", metavar="FILE", help=argparse.SUPPRESS)
    add("--backward-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        for name in ("targets", "scaling", "overhead", "scale", "all", "heap"):
            if getattr(options, name):
                parser.error(f"--{name} is of the CPU; with --device cuda leave it out")
    options.shapes_given, options.shapes = options.shapes is not None, options.shapes or default_shapes(options)
    return options


def default_shapes(options: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    return gpu_suite.SHAPES if options.device == "cuda" else SHAPES


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """ "256x128256,1x262144" -> ((256, 128256), (1, 262144))."""
    pairs = [part.split("x") for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected sizes such as 256x128256, separated by commas, got {text!r}")
    return tuple((int(n), int(v)) for n, v in pairs)


def choose(options: argparse.Namespace) -> list[Case]:
    """The rows asked for."""
    cases = list(all_cases(options.shapes))
    if options.quick and not options.only:
        quick = {f"{op} {dtype} {direction}" for op, dtype, direction in QUICK}
        first = (cases[0].n, cases[0].v)
        cases = [c for c in cases if (c.n, c.v) == first and f"{c.op} {SHORT[c.dtype]} {c.direction}" in quick]
    if options.only:
        cases = [c for c in cases if re.search(options.only, c.name)]
    if options.backward_only:
        cases = [c for c in cases if c.direction == "fwd+bwd"]
    return cases


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(
        threads=options.threads,
        rounds=options.rounds or ROUNDS[options.device][options.quick],
        budget=options.budget or (5.0 if options.quick else 20.0),
        quiet=0.0 if options.no_wait else 1.0,
        compile=not options.no_compile,
        target_shape=options.shapes[0],
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )


def child_arguments(options: argparse.Namespace, settings: Settings) -> list[str]:
    """Options that make a child process measure as we do."""
    arguments: list[object] = ["--threads", settings.threads, "--rounds", settings.rounds, "--budget", settings.budget]
    arguments += ["--shapes", ",".join(f"{n}x{v}" for n, v in options.shapes)] if options.shapes_given else []
    arguments += ([] if settings.compile else ["--no-compile"]) + (["--no-wait"] if options.no_wait else [])
    return [str(a) for a in arguments]


def retained_rows(options: argparse.Namespace, settings: Settings) -> list[dict[str, Any]]:
    """The rows with a gradient once more, in a child process whose heap keeps what is freed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(Path(__file__).resolve()), *child_arguments(options, settings)]
        command += ["--heap", "fresh", "--backward-only", "--json", str(out)]
        command += ["--quick"] if options.quick else []
        command += ["--only", options.only] if options.only else []
        done = subprocess.run(command, env={**os.environ, **RETAINED_HEAP}, stdout=subprocess.DEVNULL, check=False)
        if done.returncode or not out.exists():
            print("rows with a retained heap: the child process failed, left out", file=sys.stderr)
            return []
        rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return rows


def show(row: dict[str, Any]) -> None:
    print("\n" + format_row(row), flush=True)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Runs what was asked for and prints it on the way."""
    torch.set_num_threads(options.threads)
    settings = settings_of(options)
    machine = describe(options.threads)
    print("\n".join(describe_machine(machine)))
    if machine["fastcalib"].get("backend") != "cpp":
        print("NOTE: the C++ kernels are not live; rows called fastcalib are its eager reference")
    everything = not (options.targets or options.scaling or options.overhead or options.scale)
    document: dict[str, Any] = {"schema": SCHEMA, "machine": machine, "peers": [asdict(p) for p in survey()]}
    document |= {"rows": [], "targets": None, "scaling": None, "overhead": None, "scale": None}
    if everything or options.all:
        heap = options.heap or ("fresh" if options.quick else "both")
        cases = choose(options)
        if heap in ("fresh", "both"):
            document["rows"] += run_cases(cases, settings, show)
        if heap in ("retained", "both") and any(c.direction == "fwd+bwd" for c in cases):
            for row in retained_rows(options, settings):
                show(row)
                document["rows"].append(row)
    if options.targets or options.all:
        document["targets"] = run_targets(settings, child_arguments(options, settings))
        print("\n" + format_table(document["targets"]["table"]))
    if options.scaling or options.all:
        document["scaling"] = run_scaling(settings, options.quick)
        print("\n" + format_scaling(document["scaling"]))
    if options.overhead or options.all:
        document["overhead"] = run_overhead(settings)
        print("\n" + format_overhead(document["overhead"]))
    if options.scale or options.all:
        document["scale"] = scale.run_scale(machine, options.prefixes, (torch.float32, torch.bfloat16))
        print("\n" + "\n".join(map(scale.describe, document["scale"])))
    return document


def read_earlier(files: list[str]) -> dict[str, Any]:
    """Documents of several runs as one: the machine of the first, rows of all, of the other parts the last measured."""
    first, *more = (json.loads(Path(file).read_text()) for file in files)
    document: dict[str, Any] = first
    for other in more:
        document["rows"] += other["rows"]
        for part in ("targets", "scaling", "overhead", "scale"):
            document[part] = other.get(part) or document.get(part)
    return document


def measure_on(device: gpu.Gpu, options: argparse.Namespace) -> dict[str, Any]:
    """The rows on a GPU, printed on the way."""
    settings = settings_of(options)
    machine = {**describe(options.threads), "gpu": device.describe()}
    print("\n".join(describe_machine(machine)))
    rows = gpu_suite.run_cases(choose(options), settings, device, show)
    document: dict[str, Any] = {"schema": SCHEMA, "machine": machine, "rows": rows}
    document["peers"] = [asdict(p) for p in gpu_peers.survey()]
    return document | {"targets": None, "scaling": None, "overhead": None}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(case.name for case in choose(options)))
        return 0
    if options.retained_child:
        torch.set_num_threads(options.threads)
        Path(options.retained_child).write_text(json.dumps(retained_run(settings_of(options)).times()))
        return 0
    if options.from_json:
        document = read_earlier(options.from_json)
    elif options.device == "cuda":
        if why := gpu.why_not():
            print(why, file=sys.stderr)
            return 2
        document = measure_on(gpu.Gpu(gpu.live_backends()), options)
    else:
        document = measure_all(options)
    validate(document)
    for target in (options.json, options.plot, options.markdown):
        if target:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.markdown:
        Path(options.markdown).write_text(markdown(document))
    if options.plot and not draw(document, options.plot):
        print("nothing to draw: no row has a competitor", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
