"""The few numbers that the page opens with, each with a sentence for somebody who has not read the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .data import Run, number

# A setting counts as reliable when so many of its samples are valid.
RELIABLE = 0.8


def percent(value: float | None, digits: int = 1) -> str:
    """A share; below 1% with two digits that count, however small it is.

    >>> percent(0.123), percent(0.0000444), percent(1e-9), percent(None), percent(1.0), percent(0.9999)
    ('12.3%', '0.0044%', '< 0.000001%', '–', '100%', '> 99.9%')
    """
    if value is None:
        return "–"
    if 1 - 0.5 * 10 ** -(digits + 2) <= value < 1:
        return f"> {100 - 10**-digits:g}%"
    if 0 < value < 0.01:
        if value < 1e-8:
            return "< 0.000001%"
        digits = 1 - math.floor(math.log10(100 * value))
        return f"{100 * value:.{digits}f}".rstrip("0").rstrip(".") + "%"
    return f"{100 * value:.{digits}f}".removesuffix("." + "0" * digits) + "%"


def out_of(share: float) -> str:
    """How many of how many: the smallest round number of which there is at least one.

    >>> out_of(0.009)
    'Of 1,000 answers drawn, about 9 are valid.'
    >>> out_of(0.0000444)
    'Of 100,000 answers drawn, about 4 are valid.'
    """
    if share < 1e-12:
        return "None is ever valid." if share == 0 else "Hardly ever is one valid."
    of = 1000
    while of * share < 1:
        of *= 10
    return f"Of {of:,} answers drawn, about {of * share:,.0f} are valid."


def plain(value: float | None) -> str:
    """
    >>> plain(12345.6), plain(3.14159), plain(0.00123), plain(None), plain(7.0), plain(0.9999)
    ('12,346', '3.14', '0.00123', '–', '7', '> 0.999')
    """
    if value is None:
        return "–"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0.9995 <= value < 1:
        return "> 0.999"
    return f"{value:.3g}"


@dataclass(frozen=True)
class _Found:
    """What the page has worked out of one run; None where the run lacks the table."""

    run: Run
    sequence: list[dict[str, Any]] | None
    order: dict[str, Any] | None
    shape: dict[str, Any] | None

    def plain_samples(self) -> dict[str, Any] | None:
        """Validity and diversity at temperature 1 without a cutoff."""
        for entry in self.sequence or ():
            if entry["rule"] == "none" and 1 in entry["temperature"]:
                i = entry["temperature"].index(1)
                return {key: entry[key][i] for key in ("validity", "diversity")}
        return None

    def all_prefixes(self) -> dict[str, Any] | None:
        """The measures of order, means over all prefixes."""
        return None if self.order is None else self.order["rows"][0]

    def first_token(self, key: str) -> str:
        """One of them where the answer begins: most prefixes stand near its end, and the mean is theirs."""
        rows = self.order["rows"] if self.order else []
        first = next((row[key] for row in rows if row["depth"] == 0), None)
        return "" if first is None or len(rows) < 3 else f"At the first token alone: {percent(first)}."


def headlines(runs: Sequence[Run], payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Each: a label, a sentence that explains it, and a value (text, and what it means) for every run.

    Args:
        runs: the runs.
        payload: what :func:`fastcalib.report.page.collect` has worked out of them.
    """
    each = [_Found(*one) for one in zip(runs, payload["sequence"], payload["order"], payload["shape"])]
    made = [_validity, _variety, _reliable, _recall, _oracle, _calibrated, _evenness, _ece]
    found = []
    for make in made:
        values = [make(one) for one in each]
        first = next((value for value in values if value is not None), None)
        if first is not None:
            empty = {"value": "–", "sentence": "not measured in this run"}
            found.append(
                {"label": first["label"], "explain": first["explain"]}
                | {"values": [{"value": v["value"], "sentence": v["sentence"]} if v else empty for v in values]}
            )
    return found


def _validity(found: _Found) -> dict[str, Any] | None:
    at = found.plain_samples()
    if at is None or at["validity"] is None:
        return None
    return {
        "label": "Valid samples",
        "explain": "The chance that an answer drawn from the model as it is (temperature 1, every token allowed) is "
        "one of the valid answers.",
        "value": percent(at["validity"]),
        "sentence": out_of(at["validity"]),
    }


def _variety(found: _Found) -> dict[str, Any] | None:
    at, answers = found.plain_samples(), found.run.answers
    if at is None or at["diversity"] is None or not answers:
        return None
    effective = at["diversity"] * answers
    return {
        "label": "Variety of the valid ones",
        "explain": "Diversity: how many equally likely answers would be as varied, as a share of all valid answers.",
        "value": percent(at["diversity"]),
        "sentence": f"As varied as {plain(number(effective, 3))} equally likely answers out of {answers:,}.",
    }


def _reliable(found: _Found) -> dict[str, Any] | None:
    entries = found.sequence
    if entries is None:
        return None
    points = [
        (diversity, validity, entry["label"], temperature)
        for entry in entries
        if entry["rule"] != "size_oracle"
        for temperature, validity, diversity in zip(entry["temperature"], entry["validity"], entry["diversity"])
        if validity is not None and diversity is not None and validity >= RELIABLE
    ]
    label = f"Most variety at {RELIABLE:.0%} validity"
    explain = (
        f"The most diverse of all temperatures and cutoff rules tried that still give a valid answer at least "
        f"{RELIABLE * 100:.0f} times in 100 (the size oracle, which no sampler can be, is left out)."
    )
    if not points:
        best = max(
            (v for e in entries if e["rule"] != "size_oracle" for v in e["validity"] if v is not None), default=None
        )
        return {
            "label": label,
            "explain": explain,
            "value": "none",
            "sentence": f"No setting tried is that reliable; the best is valid {percent(best)} of the time.",
        }
    diversity, validity, rule, temperature = max(points)
    return {
        "label": label,
        "explain": explain,
        "value": percent(diversity),
        "sentence": f"With {rule} at temperature {temperature:g}: valid {percent(validity)} of the time.",
    }


def _recall(found: _Found) -> dict[str, Any] | None:
    row = found.all_prefixes()
    if row is None:
        return None
    precision = found.run.facts.options.get("precision", 0.8)
    return {
        "label": f"Recall at precision {precision:g}",
        "explain": f"Cut the model's ranking as late as possible while at least {percent(precision)} of the kept "
        "tokens are valid: the share of the answers that is then still within reach. Mean over prefixes; a perfect "
        "order has 100%.",
        "value": percent(row["recall_at_precision"]),
        "sentence": found.first_token("recall_at_precision")
        or f"{percent(row['token_recall_at_precision'])} where valid tokens are counted rather than answers.",
    }


def _oracle(found: _Found) -> dict[str, Any] | None:
    row = found.all_prefixes()
    if row is None:
        return None
    return {
        "label": "Size oracle",
        "explain": "A cutoff that is told how many tokens are valid at each step and keeps exactly so many from the "
        "top: the share of them that are valid. What is missing to 100% is the model's order, not the rule.",
        "value": percent(row["r_precision"]),
        "sentence": found.first_token("r_precision")
        or f"{percent(1 - row['r_precision'])} of the tokens it keeps are invalid all the same.",
    }


def _calibrated(found: _Found) -> dict[str, Any] | None:
    row = found.all_prefixes()
    if row is None:
        return None
    return {
        "label": "Order-calibrated prefixes",
        "explain": "Prefixes at which every valid token stands at or above every invalid one, so that some cutoff "
        "separates them without loss.",
        "value": percent(row["order_calibrated"]),
        "sentence": f"{row['order_calibrated'] * row['prefixes']:,.0f} of {row['prefixes']:,} prefixes.",
    }


def _evenness(found: _Found) -> dict[str, Any] | None:
    shape = found.shape
    if shape is None or 1 not in shape["temperatures"]:
        return None
    i = shape["temperatures"].index(1)
    kl, evenness = (shape["measures"][key]["mean"][i] for key in ("kl_valid", "evenness"))
    if kl is None:
        return None
    return {
        "label": "Shape: distance from the target",
        "explain": "KL divergence, in nats, from the ideal distribution over the valid tokens (each in proportion to "
        "the answers below it) to the model's own, invalid tokens set aside. 0 is perfect. Temperature 1, mean over "
        "the prefixes that leave a choice, those with several valid tokens.",
        "value": plain(kl),
        "sentence": f"Spread as over {percent(evenness)} of the valid tokens; {shape['choices']:,} of "
        f"{shape['prefixes']:,} prefixes leave a choice.",
    }


def _ece(found: _Found) -> dict[str, Any] | None:
    scalars = found.run.facts.calibration
    if scalars.get("ece") is None:
        return None
    return {
        "label": "Calibration error on text",
        "explain": "How far the model's confidence in its most likely next token is from how often it is right "
        "(expected calibration error, ordinary text). 0 is perfect.",
        "value": percent(scalars["ece"]),
        "sentence": f"Right {percent(scalars.get('accuracy'))} of the time over {plain(scalars.get('tokens'))} tokens; "
        f"negative log-likelihood {plain(scalars.get('nll'))} nats.",
    }
