"""Layouts of the latency benchmark on CPU: every method has its row, and engines have what vLLM itself loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sync_latency import main

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "sync_latency.py"
METHODS = ["rollcast", "raw-broadcast", "rollcast-gathered"]


def measure(path: Path, model: str, layouts: str) -> list[dict[str, Any]]:
    flags = ("--device", "cpu", "--models", model, "--layouts", layouts, "--repeats", "2", "--json", path)
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(path.read_text())
    return document["results"]


def check_rows(rows: list[dict[str, Any]], *, nbytes: int) -> None:
    for row in rows:
        assert "error" not in row, row
        assert row.get("correct", row["method"] == "raw-broadcast"), row
        assert 0 < row["min_s"] <= row["p50_s"] <= row["p95_s"] <= row["max_s"] and row["repeats"] == 2
        assert row["bytes"] == nbytes and row["ratio_to_raw"] > 0


def test_float32_masters_into_a_bfloat16_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "layouts.json", tmp_path / "layouts.png"
    rows = measure(path, "tiny-bf16", "2xfsdp2-fp32:1")
    check_rows(rows, nbytes=1706752)
    assert [row["method"] for row in rows] == METHODS
    assert [row["gathered_bytes"] for row in rows] == [0, 0, 2 * 1706752]
    assert all(row["trainers"] == 2 and row["holds"] == "fsdp2-fp32" and row["engines"] == 1 for row in rows)
    assert main(["--plot-from", str(path), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    assert main(["--table-from", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| tiny-bf16 | 2xfsdp2-fp32:1 |") for line in lines) == 3


@pytest.mark.parametrize(
    ("model", "layouts", "nbytes"),
    [
        ("tiny", "2xreplicated:2@shared,2xfsdp2-bf16:2@shared", 3413504),
        ("tiny", "2xtp:tp2", 3413504),
        ("tiny", "4xhsdp:1", 3413504),
        ("tiny-moe", "2xep:ep2@shared,2xfsdp2-bf16:ep2@shared", 5002752),
    ],
)
def test_layouts_of_several_workers(tmp_path: Path, model: str, layouts: str, nbytes: int) -> None:
    rows = measure(tmp_path / "layouts.json", model, layouts)
    check_rows(rows, nbytes=nbytes)
    expected = [(layout, method) for layout in layouts.split(",") for method in METHODS]
    assert [(row["layout"], row["method"]) for row in rows] == [
        (layout, method) for layout, method in expected if not (method.endswith("gathered") and "xep:" in layout)
    ]
