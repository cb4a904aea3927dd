"""What the examples' command lines share: choosing by name, a bar that counts, and how they end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from fastcalib.errors import UserError
from fastcalib.runner.bars import progress

Losses = Annotated[list[str] | None, typer.Option(help="A loss to train with; may be repeated.")]


def chosen(option: str, asked: Iterable[str], known: Iterable[str]) -> list[str]:
    """What was asked for, once each; typer's error, with the option's name, for what there is not."""
    names, known = list(dict.fromkeys(asked)), list(known)
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"unknown {name!r}; there are {', '.join(known)}", param_hint=option)
    return names


@dataclass
class Counter:
    """Moves a bar on by one result, and counts those that an earlier run had left on disk."""

    bars: Progress
    bar: TaskID
    reused: int = 0

    def __call__(self, was_there: bool) -> None:
        self.reused += was_there
        self.bars.advance(self.bar)


@contextmanager
def counting(what: str, total: int, console: Console) -> Iterator[Counter]:
    """A bar of ``total`` results, while they are being made."""
    with progress(console) as bars:
        yield Counter(bars, bars.add_task(what, total=total))


def command(run: Callable[..., None]) -> None:
    """``run`` as a command line. Ctrl-C, and what the user can put right, end it in a sentence."""

    @functools.wraps(run)
    def work(**options: object) -> None:
        # Inside: typer has a way of its own with Ctrl-C, and says nothing.
        try:
            run(**options)
        except KeyboardInterrupt:
            typer.echo("Stopped. The same command goes on from there.", err=True)
            raise typer.Exit(130) from None
        except UserError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None

    typer.run(work)
