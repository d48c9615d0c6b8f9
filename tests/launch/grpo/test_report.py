"""What a job leaves behind: the run's report and curve, and the figures of a sync."""

import json
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from rollcast.comm import PhaseTimer, SyncReport
from rollcast.comm.report import WorkerReport
from rollcast.launch.grpo.report import RunReport, StepRecord, spark


def sync_report(total_s: float = 0.5, *, version: int = 1) -> SyncReport:
    phases_s = {"plan": 0.1, "wire": 0.2, "total": total_s}
    workers = (
        WorkerReport(1, {"wire": 0.2, "apply": 0.1}),
        WorkerReport(2, {"wire": 0.1, "apply": 0.3}),
        WorkerReport(3, {"wire": 0.3}),
    )
    return SyncReport(version, 3_000_000_000, phases_s, workers)


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        reward=0.1 * step,
        logprob_mean_diff=1e-7 * (step + 1),
        logprob_max_diff=1e-6 * (step + 1),
        staleness_max=step % 2,
        samples_dropped=16 * (step % 2),
        policy_version=step + 1,
        tokens=64,
        tokens_per_s=100.0 + step,
        loss=-0.5,
        phase_s={"generate": 0.3, "sync": 0.1},
        sync=sync_report(0.01 * (step + 1), version=step + 1).to_dict(),
    )


def run_report(folder: Path, *, main: bool = True, terminal: bool = False) -> tuple[RunReport, StringIO]:
    """A report and what it prints."""
    shown = StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100)
    return RunReport(folder, {"steps": 3, "mode": "async"}, {"torch": "2.x"}, 3, console, main), shown


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_report_holds_config_versions_and_every_step(tmp_path: Path, terminal: bool) -> None:
    report, shown = run_report(tmp_path / "new", terminal=terminal)
    with report:
        for step in range(3):
            report.add(record(step))
        report.final = {"reward": 0.9}
    written = read(tmp_path / "new")
    assert (written["status"], written["final"]) == ("ok", {"reward": 0.9})
    assert (written["config"], written["versions"]) == ({"steps": 3, "mode": "async"}, {"torch": "2.x"})
    assert [step["step"] for step in written["steps"]] == [0, 1, 2]
    last = written["steps"][2]
    assert last["reward"] == pytest.approx(0.2)
    assert last["logprob_max_diff"] == pytest.approx(3e-6)
    assert last["logprob_mean_diff"] == pytest.approx(3e-7)
    assert (last["staleness_max"], last["policy_version"], last["tokens"]) == (0, 3, 64)
    assert last["phase_s"] == {"generate": 0.3, "sync": 0.1}
    assert last["sync"]["version"] == 3
    assert last["sync"]["phases_s"]["total"] == pytest.approx(0.03)
    assert (written["mode"], written["staleness_max"], written["samples_dropped"]) == ("async", 1, 16)
    assert "report.json" in shown.getvalue().replace("\n", "")
    assert "at most 1 versions, 16 dropped" in shown.getvalue()


def test_a_step_without_a_sample_of_the_newest_version_compares_nothing(tmp_path: Path) -> None:
    report, shown = run_report(tmp_path)
    with report:
        report.add(replace(record(0), logprob_mean_diff=None, logprob_max_diff=None))
        report.add(record(1))
    assert [step["logprob_max_diff"] for step in read(tmp_path)["steps"]] == [None, 2e-6]
    assert "2.0e-06" in shown.getvalue()


def test_every_step_is_one_line_of_a_log(tmp_path: Path) -> None:
    report, shown = run_report(tmp_path)
    with report:
        report.add(record(0))
        report.add(record(1))
        lines = [line for line in shown.getvalue().splitlines() if line.startswith("step")]
    assert len(lines) == 2
    assert lines[1].split() == ["step", "1", "reward", "0.100", "101", "tokens/s", "sync", "20", "ms", "version", "2"]


def test_curve_is_a_picture_of_the_run(tmp_path: Path) -> None:
    report, _ = run_report(tmp_path)
    with report:
        for step in range(3):
            report.add(record(step))
    with Image.open(tmp_path / "curve.png") as image:
        image.verify()
    with Image.open(tmp_path / "curve.png") as image:
        pixels = image.convert("RGB")
        assert min(pixels.size) >= 300
        colours = {colour for _, colour in pixels.getcolors(maxcolors=1 << 24) or []}
    # The reward is drawn in green and the sync time in blue; grey and white would be an empty frame.
    assert any(g > r + 40 and g > b + 40 for r, g, b in colours)  # pyright: ignore[reportGeneralTypeIssues]
    assert any(b > r + 40 and b > g + 20 for r, g, b in colours)  # pyright: ignore[reportGeneralTypeIssues]


@pytest.mark.parametrize("steps", [0, 2])
def test_an_error_is_named_and_the_steps_so_far_are_kept(tmp_path: Path, steps: int) -> None:
    report, _ = run_report(tmp_path)
    with pytest.raises(ArithmeticError, match="too hot"), report:
        for step in range(steps):
            report.add(record(step))
        raise ArithmeticError("too hot")
    written = read(tmp_path)
    assert written["status"] == "ArithmeticError: too hot"
    assert len(written["steps"]) == steps
    assert (tmp_path / "curve.png").exists() is (steps > 0)


def test_other_ranks_write_and_show_nothing(tmp_path: Path) -> None:
    report, shown = run_report(tmp_path, main=False)
    with report:
        with report.phase("train"):
            time.sleep(0.01)
        assert report.phase_s["train"] >= 0.01
        report.add(record(0))
    assert list(tmp_path.iterdir()) == []
    assert shown.getvalue() == ""


def test_phases_add_up_within_a_step_and_start_again_with_the_next(tmp_path: Path) -> None:
    report, _ = run_report(tmp_path)
    with report:
        for _ in range(2):
            with report.phase("train"):
                time.sleep(0.01)
        with report.phase("sync"):
            pass
        assert 0.02 <= report.phase_s["train"] < 1.0
        assert set(report.phase_s) == {"train", "sync"}
        report.add(record(0))
        assert report.phase_s == {}


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([0.124, 0.126, 0.999], "▁▂█"),
        ([-2.0, 7.0], "▁█"),
        ([index / 8 for index in range(8)], "▁▂▃▄▅▆▇█"),
    ],
)
def test_spark(values: list[float], bars: str) -> None:
    assert spark(values) == bars


def test_sync_report_in_figures() -> None:
    figures = sync_report(0.5).to_dict()
    # Decimal gigabytes over the whole sync: 3e9 bytes in half a second.
    assert figures["gb_per_s"] == pytest.approx(6.0)
    # Rank 2 took 0.4 s, rank 1 and rank 3 took 0.3 s.
    assert figures["slowest_rank"] == 2
    assert (figures["version"], figures["nbytes"]) == (1, 3_000_000_000)
    assert figures["workers"][1] == {"rank": 2, "phases_s": {"wire": 0.1, "apply": 0.3}}
    assert json.loads(json.dumps(figures))["phases_s"] == {"plan": 0.1, "wire": 0.2, "total": 0.5}


def test_without_workers_the_sender_is_the_slowest() -> None:
    assert SyncReport(1, 0, {"total": 1.0}).slowest_rank == 0


def test_timer_adds_up_by_phase_even_when_a_phase_fails() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        with timer("pack"):
            time.sleep(0.01)
    with pytest.raises(ArithmeticError), timer("wire"):
        time.sleep(0.01)
        raise ArithmeticError
    assert set(timer.phases_s) == {"pack", "wire"}
    assert 0.02 <= timer.phases_s["pack"] <= timer.total_s() - 0.01
    assert 0.01 <= timer.phases_s["wire"] <= timer.total_s() - 0.02
