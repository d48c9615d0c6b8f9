"""The latency benchmark on CPU: every method has its row, and the rows are consistent."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sync_latency import main

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(280)]

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "sync_latency.py"
METHODS = ("rollcast", "rollcast-shadow", "raw-broadcast", "rpc-per-tensor", "vllm-native-packed")
# Methods that cannot be measured on CPU.
REASONS = {"vllm-native-packed": "vLLM's weight transfer is NCCL only: it needs CUDA"}
DECODING = [method for method in METHODS if method.startswith("rollcast") and method not in REASONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latency")


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    flags = ("--device", "cpu", "--models", "tiny", "--methods", ",".join(METHODS))
    command = [sys.executable, SCRIPT, *flags, "--repeats", "3", "--decode", "2", "--json", folder / "latency.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=270)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads((folder / "latency.json").read_text())
    return document


def test_the_document_has_machine_versions_and_command(document: dict[str, Any]) -> None:
    assert document["machine"]["cpu"] and document["versions"]["vllm"]
    assert len(document["commit"].partition(",")[0]) == 40
    assert document["command"].startswith("python benchmarks/sync_latency.py --device cpu")
    assert all(row["gb_per_s"] > 0 for row in document["ceilings"]["raw_broadcast"])
    assert document["ceilings"]["device_copy_gb_per_s"] > 0
    assert [engine["model"] for engine in document["engines"]] == ["tiny"]


def test_every_method_is_measured_or_has_a_reason(document: dict[str, Any]) -> None:
    rows = document["results"]
    assert {row["method"] for row in rows} == set(METHODS)
    assert all(row["bytes"] == 3413504 and row["tensors"] == 47 for row in rows)
    assert {row["method"]: row["error"] for row in rows if "error" in row} == REASONS


def test_times_are_consistent(document: dict[str, Any]) -> None:
    for row in timed(document):
        assert 0 < row["min_s"] <= row["p50_s"] <= row["p95_s"] <= row["max_s"], row
        assert 1 <= row["repeats"] <= 3
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / 1e9 / row["p50_s"])
        assert row["ratio_to_raw"] > 0
        assert row.get("correct", row["method"] == "raw-broadcast") is True, row
    (idle, *_) = (row for row in timed(document) if row["method"] == "rollcast")
    assert idle["phases_s"]["total"] <= idle["max_s"] and "wire" in idle["phases_s"]


def test_decoding_is_measured(document: dict[str, Any]) -> None:
    rows = [row for row in timed(document) if "decoding" in row]
    assert [row["method"] for row in rows] == DECODING
    for row in rows:
        assert row["decoding"] == 2 and row["decode_step_s"] > 0
        assert 0 <= row["decode_stop_s"] <= row["decode_stop_max_s"]
        assert row["tokens_per_s"]["before"] > 0


def test_it_draws_and_writes_tables(document: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = folder / "latency.png"
    assert main(["--plot-from", f"{folder}/latency.json", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    assert main(["--table-from", f"{folder}/latency.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| tiny |") for line in lines) == len(document["results"])


def timed(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["results"] if "error" not in row]
