"""The results as one dict, and that dict as JSON, CSV and a table on the terminal. Figures are in ``figures``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastcalib.calibration import CalibrationState

from ..storage import whole_file
from .tokens import TokenResult

N_BINS = 15


def token_report(result: TokenResult) -> dict[str, Any]:
    """Part (a) as plain numbers; NLL, entropy and gap in nats."""
    fit, held_out = result.fit, result.held_out
    before, after = (held_out.temperatures.index(t) for t in (1.0, fit.temperature))
    every = result.all_tokens
    return {
        "n_tokens": int(every.n_tokens),
        "n_undefined": int(every.n_undefined),
        "temperature_fit": {
            "temperature": fit.temperature,
            "at_bound": fit.at_bound,
            "fit_half_nll_before": fit.nll_before,
            "fit_half_nll": fit.nll,
            "held_out_nll_before": held_out.nll[before].item(),
            "held_out_nll": held_out.nll[after].item(),
        },
        "all_tokens": measures(every),
        "fit_half": measures(result.fit_half),
        "held_out": measures(held_out),
        "reliability_held_out": {
            "before": _diagram(held_out, before),
            "after": _diagram(held_out, after),
        },
        "target_ranks": _ranks(every),
    }


def measures(state: CalibrationState) -> list[dict[str, float]]:
    """One dict a temperature, in increasing order of temperature."""
    adaptive = state.adaptive_ece(N_BINS)
    columns = {
        "nll": state.nll,
        "perplexity": state.perplexity,
        "accuracy": state.accuracy,
        "entropy": state.entropy,
        "entropy_gap": state.entropy_gap,
        "brier": state.brier,
        "ece": state.ece(N_BINS),
        "mce": state.mce(N_BINS),
        "rmsce": state.rmsce(N_BINS),
        "adaptive_ece": adaptive.value,
        "adaptive_ece_bound": adaptive.bound,
    }
    rows = [
        {"temperature": t, **{name: x[i].item() for name, x in columns.items()}}
        for i, t in enumerate(state.temperatures)
    ]
    return sorted(rows, key=lambda row: row["temperature"])


def _diagram(state: CalibrationState, k: int) -> dict[str, Any]:
    diagram = state.reliability(N_BINS)
    full = diagram.count[k] > 0

    def listed(values: Any) -> list[float | None]:  # JSON has no NaN
        return [v if ok else None for v, ok in zip(values[k].tolist(), full.tolist(), strict=True)]

    return {
        "temperature": state.temperatures[k],
        "ece": state.ece(N_BINS)[k].item(),
        "count": diagram.count[k].tolist(),
        "accuracy": listed(diagram.accuracy),
        "confidence": listed(diagram.confidence),
    }


def _ranks(state: CalibrationState) -> dict[str, Any]:
    count = state.rank_count.tolist()
    last = max((i for i, c in enumerate(count) if c), default=0) + 1
    return {
        "bins": ["1", "2", *(f"{2 ** (i - 1) + 1}-{2**i}" for i in range(2, last))][:last],
        "count": count[:last],
        "top_k_accuracy": {str(2**i): state.top_k_accuracy(2**i).item() for i in range(last)},
        "ties": int(state.ties),
    }


def write_json(report: dict[str, Any], path: Path) -> None:
    """The whole report."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_tables(report: dict[str, Any], out: Path) -> None:
    """The same as CSV files: temperatures, reliability, target_ranks, valid_tokens, cutoffs, cost."""
    tokens = report["tokens"]
    _csv(
        out / "temperatures.csv",
        ({"tokens": part, **row} for part in ("all_tokens", "fit_half", "held_out") for row in tokens[part]),
    )
    diagrams = tokens["reliability_held_out"].values()
    _csv(
        out / "reliability.csv",
        (
            {
                "temperature": d["temperature"],
                "above": i / N_BINS,
                "up_to": (i + 1) / N_BINS,
                **{c: d[c][i] for c in ("count", "confidence", "accuracy")},
            }
            for d in diagrams
            for i in range(N_BINS)
        ),
    )
    ranks = tokens["target_ranks"]
    _csv(out / "target_ranks.csv", ({"rank": b, "tokens": c} for b, c in zip(ranks["bins"], ranks["count"])))
    _csv(
        out / "valid_tokens.csv",
        (
            {
                "task": task["name"],
                **{c: row[c] for c in ("token", "id", "answers", "rank", "ties")},
                **{f"p_T{t:g}": p for t, p in zip(task["temperatures"], row["probability"])},
            }
            for task in report["valid"]
            for row in task["tokens"]
        ),
    )
    _csv(out / "cutoffs.csv", ({"task": task["name"], **row} for task in report["valid"] for row in task["cutoffs"]))
    _csv(
        out / "cost.csv",
        ({c: v for c, v in job.items() if c != "differences"} for job in report["cost"]["jobs"]),
    )


def _csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(report: dict[str, Any], console: Console) -> None:
    """Three tables."""
    for table in (_temperature_table(report), _valid_table(report), _cost_table(report)):
        console.print(table)


def _temperature_table(report: dict[str, Any]) -> Table:
    tokens = report["tokens"]
    fitted = tokens["temperature_fit"]["temperature"]
    n = sum(tokens["reliability_held_out"]["after"]["count"])
    table = _table(f"Calibration of {report['model']} on {n:,} held-out tokens", "T")
    _numbers(table, "NLL", "perplexity", "accuracy", "entropy", "H - NLL", "Brier", "ECE")
    wanted = {0.5, 0.8, 1.0, 2.0, fitted}
    for row in tokens["held_out"]:
        t = row["temperature"]
        if t in wanted or abs(t - 4 / 3) < 1e-9:
            table.add_row(
                f"{t:.3f} fitted" if t == fitted else f"{t:.2f}",
                f"{row['nll']:.4f}",
                f"{row['perplexity']:.2f}",
                f"{row['accuracy']:.1%}",
                f"{row['entropy']:.3f}",
                f"{row['entropy_gap']:+.3f}",
                f"{row['brier']:.4f}",
                f"{row['ece']:.2%}",
                style="bold" if t == fitted else None,
            )
    table.caption = "T fitted on the other half of the text; NLL, entropy and H - NLL (their gap) in nats per token"
    if tokens["temperature_fit"]["at_bound"]:
        table.caption = "NLL still falls at the end of the temperature range: no minimum was found"
    return table


def _valid_table(report: dict[str, Any]) -> Table:
    table = _table(f"Valid first tokens ({report['prompt_style']} prompts)", "task")
    _numbers(table, "tokens", "best", "median", "worst", "prec@10", "rec@10", "rec@100", "mass", "at T=2")
    for task in report["valid"]:
        at = {row["k"]: row for row in task["cutoffs"]}
        mass = dict(zip(task["temperatures"], task["valid_mass"]))
        table.add_row(
            task["name"],
            str(task["valid_tokens"]),
            *(f"{task[c]:,.0f}" for c in ("best_rank", "median_rank", "worst_rank")),
            f"{at[10]['precision']:.0%}",
            f"{at[10]['recall']:.0%}",
            f"{at[100]['recall']:.0%}",
            f"{mass[1.0]:.1%}",
            f"{mass[2.0]:.1%}",
        )
    table.caption = "ranks of the valid tokens; precision and recall of top-k; mass: probability of all valid tokens"
    return table


def _cost_table(report: dict[str, Any]) -> Table:
    cost = report["cost"]
    logits = f"{cost['rows']} x {cost['vocabulary']:,} {cost['dtype']} logits ({cost['logits_bytes'] / 1e6:.0f} MB)"
    table = _table(f"Cost on {logits}, {cost['threads']} threads, backend {report['backend']}", "job")
    _numbers(table, "ours", "eager", "ratio", "memory", "eager's", "max diff")
    for job in cost["jobs"]:
        table.add_row(
            job["job"],
            f"{job['ours_seconds'] * 1e3:,.0f} ms",
            f"{job['eager_seconds'] * 1e3:,.0f} ms",
            f"{job['speedup']:.0f}x",
            megabytes(job["ours_peak_bytes"]),
            megabytes(job["eager_peak_bytes"]),
            f"{max(job['differences'].values()):.1e}",
        )
    errors = cost["errors_against_float64"].values()
    ours, eager = (max(error[who] for error in errors) for who in ("ours", "eager"))
    table.caption = f"memory: peak beyond the logits; largest error against float64: ours {ours:.1e}, eager {eager:.1e}"
    return table


def megabytes(n: int | None) -> str:
    """For people."""
    return "unknown" if n is None else f"{n / 1e6:.1f} MB"


def _numbers(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", padding=(0, 0))
    table.add_column(first, no_wrap=True)
    return table
