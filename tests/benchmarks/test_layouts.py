"""Layouts of the latency benchmark: their text form, what fits a machine, and which job measures them."""

import json
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from latency import run
from latency.layout_bench import FreshLoad
from latency.layout_run import LayoutRunner
from latency.layouts import LAYOUTS, Layout, by_placement, fitting, parse_layout, parse_layouts
from latency.raw_senders import PIECE_BYTES, share_of
from latency.sharded_weights import expert_owners
from latency.stats import with_ratios
from sync_latency import main, parse
from termination import terminate_when

from rollcast.comm import Manifest, ParamSpec

READ = {
    "1:3": Layout(trainers=1, engines=3),
    "2xfsdp2-bf16:2": Layout(trainers=2, holds="fsdp2-bf16", engines=2),
    "2xfsdp2-fp32:tp2": Layout(trainers=2, holds="fsdp2-fp32", engines=1, tensor_parallel_size=2),
    "2xep:ep2": Layout(trainers=2, holds="ep", engines=1, tensor_parallel_size=2, expert_parallel=True),
    "4xhsdp:2xtp2@shared": Layout(trainers=4, holds="hsdp", engines=2, tensor_parallel_size=2, colocated=True),
}


@pytest.mark.parametrize("text", READ)
def test_a_layout_is_read_and_written(text: str) -> None:
    assert parse_layout(text) == READ[text]
    assert str(READ[text]) == text


def test_trainers_without_holds_are_replicated() -> None:
    assert str(parse_layout("2:2")) == "2xreplicated:2"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("2:", "cannot read the layout '2:': write TRAINERS"),
        ("2xfsdp1:2", "unknown 'fsdp1', expected one of replicated, fsdp2-bf16"),
        ("0:1", "all numbers must be positive"),
        ("1xtp:1", "a single trainer has no shards: write 1:1"),
        ("2xhsdp:2", "it needs 4, 6, 8, ... trainers"),
        ("2xtp:1@shared", "@shared needs as many trainers as workers, got 1 workers"),
    ],
)
def test_what_cannot_be_measured_is_refused(text: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--layouts", f"1:1,{text}"])
    assert end.value.code == 2 and problem in capsys.readouterr().err


def test_layouts_need_gpus_for_their_ranks() -> None:
    assert [str(layout) for layout in fitting(LAYOUTS, gpus=1)] == ["1:1@shared"]
    two = [str(layout) for layout in fitting(LAYOUTS, gpus=2)]
    assert "1:1" in two and "2xep:ep2@shared" in two and "1:2" not in two
    four = fitting(LAYOUTS, gpus=4)
    assert parse_layout("2xfsdp2-fp32:tp2") in four and parse_layout("4xhsdp:2") not in four
    assert fitting(LAYOUTS, gpus=None) == LAYOUTS
    assert len(set(LAYOUTS)) == len(LAYOUTS) and all(parse_layout(str(layout)) == layout for layout in LAYOUTS)


def test_layouts_of_one_placement_share_a_job() -> None:
    layouts = parse_layouts("2xfsdp2-bf16:2,1:1,2xreplicated:2,2xtp:tp2,2xfsdp2-bf16:2")
    groups = [[str(layout) for layout in group] for group in by_placement(layouts)]
    assert groups == [["2xfsdp2-bf16:2", "2xreplicated:2"], ["1:1"], ["2xtp:tp2"]]


def runner(*flags: str, gpus: int | None = None) -> LayoutRunner:
    made = LayoutRunner.__new__(LayoutRunner)
    made._options, made._gpus = parse(["--device", "cpu", *flags]), gpus
    return made


def test_layouts_with_experts_are_for_models_with_experts() -> None:
    jobs = runner("--models", "tiny,tiny-moe", "--layouts", "1:1,2xep:ep2").jobs()
    assert [(model, list(map(str, layouts))) for model, layouts in jobs] == [
        ("tiny", ["1:1"]),
        ("tiny-moe", ["1:1"]),
        ("tiny-moe", ["2xep:ep2"]),
    ]
    with pytest.raises(ValueError, match="layouts with ep need a mixture-of-experts model"):
        runner("--models", "tiny", "--layouts", "2xep:ep2").jobs()


def test_layouts_alone_are_those_that_fit_and_named_ones_must_fit() -> None:
    (job,) = runner("--models", "tiny", "--layouts", gpus=1).jobs()
    assert [str(layout) for layout in job[1]] == ["1:1@shared"]
    with pytest.raises(ValueError, match="1:3: more GPUs than the 2 of this machine"):
        runner("--models", "tiny", "--layouts", "1:1,1:3", gpus=2).jobs()


def test_senders_share_all_bytes_in_pieces() -> None:
    nbytes = 5 * PIECE_BYTES + 3
    shares = [share_of(nbytes, sender, 3) for sender in range(3)]
    assert sum(map(sum, shares)) == nbytes
    assert max(map(sum, shares)) - min(map(sum, shares)) <= 1
    assert all(0 < size <= PIECE_BYTES for share in shares for size in share)


def test_every_rank_has_whole_experts_of_its_own() -> None:
    names = [f"model.layers.0.mlp.experts.{expert}.{part}.weight" for expert in range(5) for part in ("up", "down")]
    specs = [ParamSpec(name, (2, 2), torch.float32) for name in [*names, "model.norm.weight"]]
    owners = expert_owners(Manifest(tuple(specs)), 2)
    assert list(owners) == names
    assert [owners[name] for name in names[::2]] == [0, 0, 0, 1, 1]


def test_ratios_are_to_the_raw_broadcast_of_the_layout() -> None:
    head = {"model": "tiny", "layout": "1:1"}
    rows = [
        head | {"method": "rollcast", "p50_s": 3.0},
        head | {"method": "raw-broadcast", "p50_s": 2.0},
        head | {"method": "rollcast", "p50_s": 3.0, "layout": "1:2"},
        head | {"method": "rollcast", "layout": "1:3", "error": "no"},
    ]
    assert [row.get("ratio_to_raw") for row in with_ratios(rows)] == [1.5, 1.0, None, None]


# Writes a row, as a job does that has measured one method, and then goes on until it is terminated.
STUB = """
import json, pathlib, sys, time

spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
row = {"model": spec["model"], "layout": "1:1", "method": "rollcast", "gathered_bytes": 0, "correct": True}
row |= {"p50_s": 1.0, "p95_s": 1.0, "max_s": 1.0, "gb_per_s": 1.0, "repeats": 1}
with open(spec["results"], "a") as results:
    results.write(json.dumps({"kind": "row", "content": row}) + "\\n")
time.sleep(60)
"""


def test_rows_are_saved_while_the_job_runs_and_kept_when_it_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script, path = tmp_path / "stub.py", tmp_path / "cut.json"
    script.write_text(STUB)
    monkeypatch.setattr(run, "torchrun", lambda *job, ranks: [sys.executable, str(script), job[-1]])
    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate_when, args=(path,), daemon=True).start()
    try:
        assert main(["--device", "cpu", "--models", "tiny", "--layouts", "1:1,1:2", "--json", str(path)]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    measured = json.loads(path.read_text())["results"]
    assert [row["layout"] for row in measured] == ["1:1"] and measured[0]["p50_s"] == 1.0
    assert main(["--table-from", str(path)]) == 0
    assert "| tiny | 1:1 | rollcast | 1000.00 |" in capfd.readouterr().out


def fresh_load(*states: dict[str, int]) -> FreshLoad:
    """A fresh load of an engine with one worker, whose tensors are in these states one after the other."""
    fingerprints = iter(states)
    replies = {"bench_fingerprint": lambda: next(fingerprints), "bench_loaded": lambda: ["weight"]}
    pool = SimpleNamespace(call_workers=lambda method, deadline: [[replies[method]()]])
    return FreshLoad(SimpleNamespace(pool=pool))  # pyright: ignore[reportArgumentType]


def test_engines_are_compared_with_a_fresh_load() -> None:
    fresh, other, lost = {"weight": 1, "scale": 2}, {"weight": 3, "scale": 2}, {"weight": 1}
    load = fresh_load(fresh, fresh, other, fresh, other, lost)
    assert load.stale_tensors() == ["weight (worker 0 of engine 0)"], "the scale is not vLLM's loader's"
    assert load.stale_tensors() == load.wrong_tensors() == []
    assert load.wrong_tensors() == ["weight (worker 0 of engine 0)"]
    assert load.wrong_tensors() == ["scale (worker 0 of engine 0)"]
