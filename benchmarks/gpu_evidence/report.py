"""Writes docs/gpu-evidence.md: what is known of the GPU kernels without a GPU.

    python benchmarks/gpu_evidence/report.py --packages DIR [--everything | --results FILE.xml ...] [--aot FILE.json]

DIR holds the peers (peers.py says how to install them); without it their rows say "not installed". The tests of the
ladder are run for the page (``--everything``: also those of ``make prove``), unless junit files of runs of the same
commit are given. ``--aot`` takes what ``aot.py --json`` has printed rather than compiling again. Ends with status 1
where a kernel moves more bytes than a peer and the page has no reason for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_evidence import aot, compare, counting, cubins, ladder, ours, pages, peers
from gpu_evidence.counting import Failure, Row

ROOT = Path(__file__).resolve().parents[2]
VOCABULARIES = (128_256, 50_257)
PUBLISHED = 151_936  # of the figures that others have published
DTYPES = (torch.bfloat16, torch.float32)


def run_peers(rows: int, vocabularies: tuple[int, ...], versions: dict[str, str | None]) -> list[Row | Failure]:
    out: list[Row | Failure] = []
    for package, jobs in peers.PEERS.items():
        if versions[package] is None:
            continue
        for vocab in vocabularies:
            for dtype in DTYPES:
                logits, target = counting.problem(rows, vocab, dtype)
                out += [peers.measure(who, job, run, want, logits, target) for who, job, run, want in jobs()]
    return out


def run_ours(
    rows: int, vocabularies: tuple[int, ...], dtypes: tuple[torch.dtype, ...], alone: bool | None = None
) -> list[Row | Failure]:
    out: list[Row | Failure] = []
    for vocab in vocabularies:
        for dtype in dtypes:
            logits, target = counting.problem(rows, vocab, dtype)
            for task in ours.tasks():
                if alone is None or task.alone == alone:
                    out += [ours.measure(task, backend, logits, target) for backend in task.backends]
    return out


def rows_of(results: list[Row | Failure]) -> list[Row]:
    return [result for result in results if isinstance(result, Row)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder with the peers, as pip install --target made it")
    parser.add_argument("--rows", type=int, default=4, help="rows of logits of each run")
    parser.add_argument("--results", type=Path, nargs="+", help="junit files, instead of running the ladder's tests")
    parser.add_argument("--everything", action="store_true", help="run the ladder's tests marked prove, too")
    parser.add_argument("--aot", type=Path, help="output of aot.py --json, instead of compiling")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu-evidence.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if missing := ladder.missing():
        parser.error(f"the ladder names tests that do not exist: {', '.join(missing)}")
    versions = peers.installed(options.packages)

    theirs = run_peers(options.rows, VOCABULARIES, versions)
    same = run_ours(options.rows, VOCABULARIES, DTYPES, alone=False)
    alone = run_ours(options.rows, VOCABULARIES, (torch.bfloat16,), alone=True)
    published = run_ours(1, (PUBLISHED,), (torch.bfloat16,))
    triton = [aot.from_json(entry) for entry in json.loads(options.aot.read_text())] if options.aot else aot.table()
    cuda = cubins.table() if cubins.extension() else []
    outcomes = ladder.read(options.results) if options.results else ladder.run(options.everything)
    losses = compare.losses(rows_of(same), rows_of(theirs))

    given = " --everything" if options.everything else ""
    given += (" --aot FILE" if options.aot else "") + (" --results FILE ..." if options.results else "")
    page = pages.page(
        given=given, versions=versions, rows=options.rows, theirs=theirs, same=same, alone=alone,
        published=rows_of(published), triton=triton, cuda=cuda, outcomes=outcomes, losses=losses,
    )  # fmt: skip
    options.output.write_text(page)
    print(f"wrote {options.output}")
    unexplained = [loss for loss in losses if loss.reason is None]
    for loss in unexplained:
        print(f"MORE BYTES than {loss.peer.who} ({loss.measure}): {loss.ours}", file=sys.stderr)
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    for name in failed:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if unexplained or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
