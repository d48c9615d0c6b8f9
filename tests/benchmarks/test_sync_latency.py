"""The command of the latency benchmark, with a stub in place of its torchrun job."""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from latency import run
from sync_latency import main
from termination import terminate_when

# Writes a row, as a job does that has measured one method, and then goes on until it is terminated.
STUB = """
import json, pathlib, signal, sys, time

def end(*_):
    (folder / "terminated").touch()
    sys.exit(0)

folder = pathlib.Path(sys.argv[2])
signal.signal(signal.SIGTERM, end)
spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
row = {"model": spec["model"], "method": spec["methods"][0], "bytes": 8, "tensors": 1, "p50_s": 1.0}
row |= {"p95_s": 1.0, "max_s": 1.0, "min_s": 1.0, "repeats": 1, "phases_s": {}, "gb_per_s": 8e-9, "correct": True}
with open(spec["results"], "a") as results:
    results.write(json.dumps({"kind": "row", "content": row}) + "\\n")
(folder / "measured").touch()
time.sleep(60)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which the stub leaves its marks."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    monkeypatch.setattr(run, "torchrun", lambda *job, ranks: [sys.executable, str(script), job[-1], str(tmp_path)])
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def test_rows_measured_before_sigterm_are_kept(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = stub / "cut.json"
    flags = [
        "--device",
        "cpu",
        "--models",
        "tiny,tiny-moe",
        "--methods",
        "rollcast,rpc-per-tensor",
        "--json",
        str(path),
    ]
    threading.Thread(target=terminate_when, args=(stub / "measured",), daemon=True).start()
    start = time.monotonic()
    assert main([*flags, "--json", str(path)]) == 0
    assert time.monotonic() - start < 30 and (stub / "terminated").exists(), "the job must be stopped"
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    measured, missing = document["results"]
    assert measured["method"] == "rollcast" and measured["p50_s"] > 0
    assert missing["method"] == "rpc-per-tensor" and "was interrupted" in missing["error"]
    assert json.loads(path.read_text()) == document


@pytest.mark.parametrize(("flag", "known"), [("--models", "qwen3-8b"), ("--methods", "raw-broadcast")])
def test_unknown_names_are_refused(flag: str, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([flag, "no-such-name"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "unknown no-such-name; known are" in error and known in error
