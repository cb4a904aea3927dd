"""The tables of a run: what ``fastcalib diagnose`` and ``fastcalib score`` write and ``fastcalib report`` reads.

A run is a folder: ``run.json`` (a :class:`RunFacts`), the Parquet tables below, and ``state/``, where unfinished work
waits. Prefixes are the inner nodes of the answers' trie, so ``node`` is the key that joins the tables. Every number is
in nats, logits or counts; nothing is rounded.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..storage import whole_file

_KEY = [("node", pa.int64())]

SCHEMAS: dict[str, pa.Schema] = {
    # One row a node of the trie, the root first; `text` is the token alone, `prefix` all tokens from the root decoded.
    "trie": pa.schema(
        [
            *_KEY,
            ("parent", pa.int64()),
            ("depth", pa.int64()),
            ("token", pa.int64()),
            ("text", pa.string()),
            ("prefix", pa.string()),
            ("count", pa.int64()),
        ]
    ),
    # One row a prefix. Recall weighs a token by the answers below it; `token_*` counts tokens alone.
    "order": pa.schema(
        [
            *_KEY,
            ("valid", pa.int64()),
            ("area", pa.float64()),
            ("token_area", pa.float64()),
            ("recall_at_precision", pa.float64()),
            ("token_recall_at_precision", pa.float64()),
            ("r_precision", pa.float64()),
            ("average_precision", pa.float64()),
            ("auroc", pa.float64()),
            ("order_calibrated", pa.bool_()),
        ]
    ),
    # One row a (prefix, valid token); `child` is the node that the token leads to.
    "valid": pa.schema(
        [
            *_KEY,
            ("child", pa.int64()),
            ("n_greater", pa.int64()),
            ("n_equal", pa.int64()),
            ("logit", pa.float64()),
            ("log_prob", pa.float64()),
        ]
    ),
    # The head of the ranking of every prefix, valid and invalid tokens alike; position 0 is the most likely.
    "top": pa.schema(
        [
            *_KEY,
            ("position", pa.int64()),
            ("token", pa.int64()),
            ("text", pa.string()),
            ("logit", pa.float64()),
            ("valid", pa.bool_()),
        ]
    ),
    # One row a (prefix, temperature).
    "shape": pa.schema(
        [
            *_KEY,
            ("temperature", pa.float64()),
            ("kl", pa.float64()),
            ("kl_valid", pa.float64()),
            ("valid_mass", pa.float64()),
            ("evenness", pa.float64()),
            ("entropy", pa.float64()),
            ("expected_distinct", pa.float64()),
        ]
    ),
    # One row a prefix: logit = slope k + intercept up to rank k = `knee`, scale + decay log(k + shift) beyond.
    "fit": pa.schema(
        [
            *_KEY,
            ("knee", pa.int64()),
            ("slope", pa.float64()),
            ("intercept", pa.float64()),
            ("scale", pa.float64()),
            ("decay", pa.float64()),
            ("shift", pa.float64()),
            ("r_squared", pa.float64()),
        ]
    ),
    # One row a (prefix, rule, temperature); rule "none" keeps everything.
    "cutoffs": pa.schema(
        [
            *_KEY,
            ("rule", pa.string()),
            ("temperature", pa.float64()),
            ("kept", pa.int64()),
            ("kept_mass", pa.float64()),
            ("precision", pa.float64()),
            ("recall", pa.float64()),
            ("token_recall", pa.float64()),
        ]
    ),
    # One row a (rule, temperature): whole answers.
    "sequence": pa.schema(
        [
            ("rule", pa.string()),
            ("temperature", pa.float64()),
            ("validity", pa.float64()),
            ("diversity", pa.float64()),
            ("precision", pa.float64()),
            ("recall", pa.float64()),
        ]
    ),
    # One row a (rule, temperature, depth): the factors whose products are the precision and recall of whole answers.
    "compounding": pa.schema(
        [
            ("rule", pa.string()),
            ("temperature", pa.float64()),
            ("depth", pa.int64()),
            ("alpha", pa.float64()),
            ("beta", pa.float64()),
        ]
    ),
    # Token calibration on text (`fastcalib score`): bins of the top token's confidence.
    "reliability": pa.schema(
        [
            ("lower", pa.float64()),
            ("upper", pa.float64()),
            ("count", pa.int64()),
            ("accuracy", pa.float64()),
            ("confidence", pa.float64()),
        ]
    ),
}


@dataclass
class RunFacts:
    """Everything about a run that is not a table.

    Attributes:
        model: name, source, vocab_size, parameters, dtype.
        task: name, prompt, answers (how many), sequences, max_depth, end_token, tokenisation, style. Empty for a run
            of ``score`` alone.
        options: temperatures, rules, order of temperature and rule, precision, draws.
        calibration: scalars of the token calibration (nll, perplexity, accuracy, brier, ece, mce, full_ece,
            mean_entropy, temperature, tokens, text). Empty for a run of ``diagnose`` alone.
        cost: one entry a stage: stage, seconds, and what it covers.
        versions: fastcalib, torch, transformers, python, machine.
    """

    model: dict[str, Any]
    task: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    cost: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)


def write_facts(folder: Path, facts: RunFacts) -> None:
    """Write ``run.json`` whole or not at all."""
    with whole_file(folder / "run.json") as path:
        path.write_text(json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> RunFacts:
    """Read ``run.json``; fields that this version does not know are left out.

    Raises:
        FileNotFoundError: the folder is not a run.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no run.json; `fastcalib diagnose --out {folder}` makes one")
    known = {f.name for f in fields(RunFacts)}
    return RunFacts(**{key: value for key, value in json.loads(path.read_text("utf-8")).items() if key in known})


def facts_before(folder: Path) -> RunFacts | None:
    """The facts of the run that is in a folder, or None.

    Raises:
        UserError: there is a ``run.json`` that is none of ours.
    """
    try:
        return read_facts(folder)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--out {folder}: its run.json cannot be read ({error}); take another folder") from None


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A place for the tables and the facts of a new run, which take the place of those in ``folder`` all together.

    The old run is whole until the new one is: an error or Ctrl-C before the end leaves it as it was. What ``fastcalib
    score`` wrote stays.
    """
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as name:
        yield Path(name)
        new = {path.name: path for path in Path(name).iterdir()}
        (folder / "run.json").unlink(missing_ok=True)  # no run while tables of two stand side by side
        for table in SCHEMAS:
            if table != "reliability" and f"{table}.parquet" not in new:
                (folder / f"{table}.parquet").unlink(missing_ok=True)
        for file in sorted(new, key=lambda file: file == "run.json"):
            os.replace(new[file], folder / file)


def write_table(folder: Path, name: str, columns: dict[str, Any]) -> None:
    """Write one table whole or not at all, as ``NAME.parquet``.

    Args:
        folder: the run.
        name: a key of :data:`SCHEMAS`.
        columns: one array (of numpy, pyarrow) or list for each column of the schema.

    Raises:
        KeyError: an unknown table, or columns that are not the schema's.
    """
    schema = SCHEMAS[name]
    if set(columns) != set(schema.names):
        raise KeyError(f"table {name} has columns {schema.names}, got {sorted(columns)}")
    arrays = {
        key: values if isinstance(values, pa.Array) else pa.array(values, schema.field(key).type)
        for key, values in columns.items()
    }
    table = pa.table({key: arrays[key] for key in schema.names}, schema=schema)
    with whole_file(folder / f"{name}.parquet") as path:
        pq.write_table(table, path, compression="zstd")


def read_table(folder: Path, name: str) -> pa.Table | None:
    """The table, or None where the run has none of that name.

    Raises:
        ValueError: the file lacks a column (another version wrote it).
    """
    path = folder / f"{name}.parquet"
    if not path.is_file():
        return None
    table = pq.read_table(path)
    missing = [key for key in SCHEMAS[name].names if key not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: run `fastcalib diagnose` again with this version")
    return table.select(SCHEMAS[name].names)
