"""Live display and report of a run: `report.json` and `curve.png` (trainer rank 0)."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matplotlib.figure import Figure
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step, over all trainer ranks."""

    step: int
    reward: float
    """Mean reward of the step's samples."""
    logprob_mean_diff: float | None
    """Average difference of engine and trainer log-probabilities before the update, of the engine that differs most.
    Compares samples whose tokens are all of the trainer's version; None if there was none."""
    logprob_max_diff: float | None
    """Largest difference of a token."""
    staleness_max: int
    """Most versions by which a sample was older than the policy that it trained."""
    samples_dropped: int
    """Samples dropped since the last step, because they were too old."""
    policy_version: int
    """Version that the engines serve after the step."""
    tokens: int
    tokens_per_s: float
    """Rate while the step's batch was generated; other batches may have been generated at the same time."""
    loss: float
    phase_s: dict[str, float]
    sync: dict[str, Any]


@dataclass
class RunReport:
    """Collects a run, displays it live, and writes `report.json` and `curve.png` in `folder`.

    with RunReport(folder, config=..., versions=..., steps=40) as report:
        with report.phase("generate"):
            ...
        report.add(StepRecord(...))
    """

    folder: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    steps: int
    console: Console = field(default_factory=Console)
    main: bool = True
    """Whether this rank displays and writes; others only measure time."""
    records: list[StepRecord] = field(default_factory=list)
    phase_s: dict[str, float] = field(default_factory=dict)
    """Seconds of the step under way, by phase."""
    final: dict[str, Any] = field(default_factory=dict)
    _phase: str = ""

    def __enter__(self) -> Self:
        self._progress = Progress(
            TextColumn("[bold]step"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("steps", total=self.steps)
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=8, transient=True)
        if self.main and self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if not self.main:
            return
        self.write(status="ok" if error is None else f"{type(error).__name__}: {error}")
        if self.records:
            self.console.print(self.summary())
        self.console.print(f"report: {self.folder / 'report.json'}   curve: {self.folder / 'curve.png'}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Display `name` as the current phase, and add its seconds to the step."""
        self._phase, start = name, time.perf_counter()
        try:
            yield
        finally:
            self.phase_s[name] = self.phase_s.get(name, 0.0) + time.perf_counter() - start
            self._phase = ""

    def add(self, record: StepRecord) -> None:
        """Record a finished step."""
        self.records.append(record)
        self.phase_s = {}
        self._progress.advance(self._task)
        if self.main and not self.console.is_terminal:
            self.console.print(
                f"step {record.step:3d}  reward {record.reward:.3f}  {record.tokens_per_s:6.0f} tokens/s  "
                f"sync {1e3 * record.sync['phases_s']['total']:.0f} ms  version {record.policy_version}",
                highlight=False,
            )

    @property
    def staleness_max(self) -> int:
        """Most versions by which a sample of the run was older than the policy that it trained."""
        return max((record.staleness_max for record in self.records), default=0)

    @property
    def samples_dropped(self) -> int:
        """Samples of the run that were dropped because they were too old."""
        return sum(record.samples_dropped for record in self.records)

    def write(self, *, status: str) -> None:
        """Write `report.json`, and `curve.png` if there is a step to draw."""
        self.folder.mkdir(parents=True, exist_ok=True)
        report = {
            "status": status,
            "config": self.config,
            "versions": self.versions,
            "mode": self.config["mode"],
            "staleness_max": self.staleness_max,
            "samples_dropped": self.samples_dropped,
            "steps": [asdict(record) for record in self.records],
            "final": self.final,
        }
        (self.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        if self.records:
            draw_curve(self.records, self.folder / "curve.png")

    def summary(self) -> Table:
        """Return a summary of the run."""
        rewards = [record.reward for record in self.records]
        syncs = sorted(record.sync["phases_s"]["total"] for record in self.records)
        rates = [record.tokens_per_s for record in self.records]
        difference = max(record.logprob_max_diff or 0.0 for record in self.records)
        table = Table(title=f"{len(self.records)} steps", show_header=False)
        rows = {
            "reward, first 5 steps": f"{_mean(rewards[:5]):.3f}",
            "reward, last 5 steps": f"{_mean(rewards[-5:]):.3f}",
            "syncs": f"{len(syncs)}, median {1e3 * syncs[len(syncs) // 2]:.1f} ms, slowest {1e3 * syncs[-1]:.1f} ms",
            "tokens/s while generating": f"{_mean(rates):.0f}",
            "policy version": str(self.records[-1].policy_version),
            "mode": self.config["mode"],
            "staleness of samples": self._staleness(),
            "largest logprob difference, engine to trainer": f"{difference:.1e}",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    def _staleness(self) -> str:
        return f"at most {self.staleness_max} versions, {self.samples_dropped} dropped"

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 3))
        last = self.records[-1] if self.records else None
        table.add_row("phase", f"[cyan]{self._phase or '...'}")
        if last:
            table.add_row("reward", f"[green]{last.reward:.3f}[/]  {spark([r.reward for r in self.records[-40:]])}")
            table.add_row("tokens/s", f"{last.tokens_per_s:.0f}")
            table.add_row("sync", f"{1e3 * last.sync['phases_s']['total']:.1f} ms")
            table.add_row("policy version", str(last.policy_version))
            table.add_row("staleness", f"{self._staleness()} ({self.config['mode']})")
        return Panel(Group(table, self._progress), title="rollcast GRPO", border_style="blue")


def spark(values: list[float]) -> str:
    """Return values in [0, 1] as a line of bars."""
    heights = [min(max(value, 0.0), 1.0) if value == value else 0.0 for value in values]
    return "".join(SPARKS[min(int(height * len(SPARKS)), len(SPARKS) - 1)] for height in heights)


def draw_curve(records: list[StepRecord], path: Path) -> None:
    """Draw reward and sync time over steps, one above the other."""
    steps = [record.step for record in records]
    figure = Figure(figsize=(7, 5))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    top.plot(steps, [record.reward for record in records], color="tab:green")
    top.set_ylabel("mean reward")
    top.grid(alpha=0.3)
    bottom.plot(steps, [1e3 * record.sync["phases_s"]["total"] for record in records], color="tab:blue")
    bottom.set_ylabel("sync (ms)")
    bottom.set_xlabel("step")
    bottom.set_ylim(bottom=0)
    bottom.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
