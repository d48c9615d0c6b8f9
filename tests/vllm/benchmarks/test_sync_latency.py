"""The latency benchmark, on CPU: every method has its row, and the rows hold together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(280)]

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "sync_latency.py"
METHODS = ("rollcast", "rollcast-shadow", "raw-broadcast", "rpc-per-tensor", "vllm-native-packed")
# What has no numbers here.
REASONS = {"vllm-native-packed": "vLLM's weight transfer is NCCL only: it needs CUDA"}
DECODING = [method for method in METHODS if method.startswith("rollcast") and method not in REASONS]


def run(*arguments: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=270)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latency")


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    flags = ("--device", "cpu", "--models", "tiny", "--methods", ",".join(METHODS))
    done = run(*flags, "--repeats", 3, "--decode", 2, "--json", folder / "latency.json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads((folder / "latency.json").read_text())
    return document


def test_the_document_says_what_it_was_measured_on(document: dict[str, Any]) -> None:
    assert document["machine"]["cpu"] and document["versions"]["vllm"]
    assert len(document["commit"].partition(",")[0]) == 40
    assert document["command"].startswith("python benchmarks/sync_latency.py --device cpu")
    assert all(row["gb_per_s"] > 0 for row in document["ceilings"]["raw_broadcast"])
    assert document["ceilings"]["device_copy_gb_per_s"] > 0
    assert [engine["model"] for engine in document["engines"]] == ["tiny"]


def test_every_method_is_measured_or_says_why_not(document: dict[str, Any]) -> None:
    rows = document["results"]
    assert {row["method"] for row in rows} == set(METHODS)
    assert all(row["bytes"] == 3413504 and row["tensors"] == 47 for row in rows)
    assert {row["method"]: row["error"] for row in rows if "error" in row} == REASONS


def test_what_is_measured_by_the_time_it_is_told_to_end_is_not_lost(folder: Path) -> None:
    flags = ("--device", "cpu", "--models", "tiny,tiny-moe", "--methods", "rollcast,rpc-per-tensor", "--decode", "0")
    path = folder / "cut.json"
    command = [sys.executable, SCRIPT, *flags, "--repeats", "20", "--max-seconds", "2", "--json", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if "tiny, rollcast" in line:
                process.terminate()
                break
        document = json.loads(process.stdout.read().splitlines()[-1])
    assert process.returncode == 0
    measured, missing = document["results"]
    assert measured["method"] == "rollcast" and measured["p50_s"] > 0
    assert missing["method"] == "rpc-per-tensor" and "told to end" in missing["error"]
    assert json.loads(path.read_text()) == document


def test_times_hold_together(document: dict[str, Any]) -> None:
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


def test_it_draws_and_writes_tables(document: dict[str, Any], folder: Path) -> None:
    plot = folder / "latency.png"
    done = run("--plot-from", folder / "latency.json", "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    lines = run("--table-from", folder / "latency.json").stdout.splitlines()
    assert sum(line.startswith("| tiny |") for line in lines) == len(document["results"])


@pytest.mark.parametrize(("flag", "known"), [("--models", "qwen3-8b"), ("--methods", "raw-broadcast")])
def test_unknown_names_are_refused(flag: str, known: str) -> None:
    done = run(flag, "no-such-name")
    assert done.returncode == 2
    assert "unknown no-such-name; known are" in done.stderr and known in done.stderr


def timed(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["results"] if "error" not in row]
