"""What a person sees in the terminal: live progress, tables, and plain lines where there is no terminal.

Progress is read from the run directory, so it is the same for the process that started the run and for `status --follow`.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.progress import track as rich_track
from rich.table import Table

from mistral_dist.files import read_json
from mistral_dist.resampling import is_interval
from mistral_dist.run import RunDirectory

console = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)

PLAIN_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
RECENT = 20
"""Steps behind the speed that is shown."""
NEWS = re.compile(r"note: |going on from |checkpoint-\d+ (is damaged|cannot be read) |step \d+: ")
"""How the lines of the workers' log begin that are shown in the terminal, too."""


def say(line: str, style: str | None = None) -> None:
    """One line as it is: no markup in paths or overrides is obeyed, and nothing is wrapped."""
    console.print(line, style=style, markup=False, soft_wrap=True)


class _Outlasting:
    """A stream that may close, as a terminal does, or a pipe: what is written then is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlast_terminal() -> None:
    """From here on this process goes on where nobody reads what it says: a terminal that closes must not end a training."""
    sys.stdout, sys.stderr = _Outlasting(sys.stdout), _Outlasting(sys.stderr)


def track(items: Iterable[Any], what: str) -> Iterable[Any]:
    """Iterate with a progress bar."""
    return rich_track(items, what, console=console, transient=True) if console.is_terminal else items


@contextmanager
def following(run: RunDirectory) -> Iterator[Callable[[], None]]:
    """A function to call often, which shows how the training of a run goes on."""
    with _live() if console.is_terminal else _plain() as show:
        seen, news = _Metrics(run), _News(run.log)

        def tick() -> None:
            for line in news.lines():
                say(line)
            status = run.status() or {}
            last = seen.last()
            if status.get("state") == "running" and status.get("steps"):
                measures = _measures(last, seen.tokens_per_second(), seen.validation)
                show(status["step"] or 0, status["steps"], measures, seen.seconds_per_step())

        yield tick


@contextmanager
def answering(folder: Path, doing: str) -> Iterator[Callable[[], None]]:
    """A function to call often, which shows how far workers are that note it in a folder."""
    with _live() if console.is_terminal else _plain() as show:

        def tick() -> None:
            progress = read_json(folder / "progress.json")
            if progress is not None:
                show(progress["done"], progress["total"], doing, None)

        yield tick


def evaluation_table(result: dict[str, Any]) -> Table:
    """Base against tuned, one measure a row."""
    table = Table(title=f"{result['n']} held-out examples ({result['split']})", title_justify="left", caption_justify="left")
    for column in ("", "base", "tuned"):
        table.add_column(column, justify="left" if not column else "right")
    _add_measures(table, {name: (base, result["tuned"][name]) for name, base in result["base"].items()})
    for label in result.get("labels", ()):
        f1 = (f"{result[model]['per_class'][label]['f1']:.3f}" for model in ("base", "tuned"))
        table.add_row(escape(f"f1 {label}"), *f1, style="dim")
    table.caption = "[95 % bootstrap interval]"
    if "written" in result["base"]:
        base, tuned = (result[model]["written"] for model in ("base", "tuned"))
        _add_measures(table, {name: (measure, tuned[name]) for name, measure in base.items()})
        table.caption += f"; from exact match on of {base['n']} written answers"
    if "loss" in result["difference"]:  # two intervals may overlap, and the models differ on nearly every example
        table.caption += f"; change of the loss {_interval(result['difference']['loss'])}"
    if "mcnemar" in result["difference"]:
        found = result["difference"]["mcnemar"]
        alone = f"right alone: base {found['only_base_right']}, tuned {found['only_tuned_right']}"
        table.caption += f"; {alone} (McNemar's exact test: p = {found['p_value']:.2g})"
    return table


def _add_measures(table: Table, measures: dict[str, tuple[Any, Any]]) -> None:
    for name, (base, tuned) in measures.items():
        if is_interval(base) and not name.endswith(("_micro", "_weighted")):
            table.add_row(escape(name.replace("_", " ")), _interval(base), _interval(tuned))


def figures_table(rows: Sequence[Sequence[str]]) -> Table:
    """A head, then rows of a name and figures."""
    head, *lines = rows
    table = Table()
    table.add_column(head[0], no_wrap=True)  # where 80 columns are too few, headings take a second line, and no name is cut
    for name in head[1:]:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def probabilities_table(answers: dict[str, dict[str, float]]) -> Table:
    """Each label's probability, by model, the tuned one's likeliest first."""
    table = Table("label", *answers)
    for label, _ in sorted(answers["tuned"].items(), key=lambda item: -item[1]):
        table.add_row(escape(label), *(f"{answers[which][label]:.3f}" for which in answers))
    return table


def ask() -> str | None:
    """The next line of the user; None at the end of input."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def audit_table(manifest: dict[str, Any], path: Path) -> Table:
    """What `prepare` did, in short; audit.md says it at length."""
    left_out = {**manifest["bad"], **manifest["dropped"]}
    rows = [
        ("rows read", f"{manifest['rows']:,}"),
        ("left out", _counted(left_out)),
        ("repaired", _counted(manifest["changed"])),
        ("examples", ", ".join(f"{count:,} {name}" for name, count in manifest["examples"].items())),
        ("tokens", f"{manifest['tokens']['train']:,} in train, {manifest['targets']['train']:,} of them targets"),
        ("leakage", leakage(manifest)),
    ]
    plan = manifest.get("plan")
    if plan is not None:
        rows.append(("an epoch", f"{plan['steps_per_epoch']:,} steps, packs {plan['fill']:.1%} full"))
    rows.append(("in", f"{path} (read audit.md before you pay for GPUs; quarantine.jsonl holds what was left out, and why)"))
    return facts(rows)


def leakage(manifest: dict[str, Any]) -> str:
    """What stands in two splits at once, in words."""
    found = _counted({f"{what} on two sides": count for what, count in manifest["leakage"].items() if count})
    return (
        f"{found} between what is held out; streamed train data are not compared"
        if manifest["streaming"]
        else f"{found} between the splits"
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items()) or "none"


def facts(rows: Iterable[tuple[str, Any]], title: str = "") -> Table:
    """Names and values, side by side."""
    table = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(f"[dim]{name}[/dim]", escape(str(value)))
    return table


def minutes(seconds: float) -> str:
    """A duration for people."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s" if rest >= 60 else f"{rest} s"


class _News:
    """What the log says from now on that its reader should know at once."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = log.stat().st_size if log.is_file() else 0

    def lines(self) -> list[str]:
        if not self._log.is_file() or self._log.stat().st_size <= self._read:
            return []
        with open(self._log, "rb") as stream:
            stream.seek(self._read)
            whole = stream.read().rpartition(b"\n")
        self._read += len(whole[0] + whole[1])
        return [line for line in whole[0].decode("utf-8", "replace").splitlines() if NEWS.match(line)]


class _Metrics:
    """The last steps of a run, read twice a second."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._recent: list[dict[str, Any]] = []
        self.validation: dict[str, Any] | None = None
        self._looked = 0.0

    def last(self) -> dict[str, Any] | None:
        if time.monotonic() - self._looked > 0.5:
            self._recent, self.validation = self._run.recent_metrics(RECENT), self._run.last_validation()
            self._looked = time.monotonic()
        return self._recent[-1] if self._recent else None

    def seconds_per_step(self) -> float | None:
        # the first step of a launch warms up caches and says nothing about the next
        seconds = sorted(entry["seconds"] for entry in self._timed())
        return seconds[len(seconds) // 2] if seconds else None

    def tokens_per_second(self) -> float | None:
        seconds = sum(entry["seconds"] for entry in self._timed())
        return sum(entry["tokens"] for entry in self._timed()) / seconds if seconds else None

    def _timed(self) -> list[dict[str, Any]]:
        """Those that say something about speed: a step that is passed over takes no time."""
        return [entry for entry in self._recent if entry["tokens_per_second"] is not None]


def eta(run: RunDirectory) -> str | None:
    """How long a run in training will still take, in words; None where that cannot be told yet."""
    status, seen = run.status() or {}, _Metrics(run)
    if seen.last() is None or not status.get("steps"):
        return None
    seconds = seen.seconds_per_step()
    return minutes((status["steps"] - status["step"]) * seconds) if seconds else None


def _measures(last: dict[str, Any] | None, speed: float | None, validation: dict[str, Any] | None) -> str:
    if not last:
        return "loading the model"
    told = "not trained" if last["loss"] is None else f"loss {last['loss']:.4f}"
    validated = f"  validation {validation_words(validation)}" if validation else ""
    return f"{told}{validated}{f'  {speed:,.0f} tokens/s' if speed else ''}"


def validation_words(found: dict[str, Any]) -> str:
    """What the metrics hold of a validation, in short."""
    value = "not finite" if found["loss"] is None else f"{found['loss']:.4f}"
    best = "the best" if found["best_step"] == found["step"] else f"the best at {found['best_step'] or 'none'}"
    return f"{value} at {found['step']} ({best})"


def _interval(measure: dict[str, float]) -> str:
    return f"{measure['value']:.3f} [dim]\\[{measure['low']:.3f}, {measure['high']:.3f}][/dim]"


Show = Callable[[int, int, str, float | None], None]


@contextmanager
def _live() -> Iterator[Show]:
    columns = (
        SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.description}"), TextColumn("ETA {task.fields[eta]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, eta="-")

        def show(done: int, total: int, what: str, seconds: float | None) -> None:
            eta = minutes((total - done) * seconds) if seconds else "-"
            progress.update(task, completed=done, total=total, description=what, eta=eta)

        yield show


@contextmanager
def _plain() -> Iterator[Show]:
    said = time.monotonic()

    def show(done: int, total: int, what: str, seconds: float | None) -> None:
        nonlocal said
        if time.monotonic() - said >= PLAIN_EVERY:
            said = time.monotonic()
            eta = f"  ETA {minutes((total - done) * seconds)}" if seconds else ""
            console.print(f"{done}/{total}  {what}{eta}")

    yield show
