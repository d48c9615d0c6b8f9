"""Latency of a weight update of one engine, by rollcast and by other methods, on the same tensors.

    python benchmarks/sync_latency.py --models qwen3-0.6b,qwen3-8b [--json FILE] [--plot FILE.png]

Starts one torchrun job for each model: rank 0 trains, rank 1 runs a vLLM engine. The last line is one JSON document.
On SIGTERM the job is stopped, and the document has the rows measured by then.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from latency.methods import METHODS
from latency.models import SHAPES
from latency.plot import draw
from latency.report import markdown, show
from latency.run import Runner
from latency.stats import with_ratios
from machine_card import commit, versions


def main(argv: list[str] | None = None) -> int:
    """Run the command. Failures are rows of the document; the exit code is 0 if there is a document."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(arguments)
    if options.table_from:
        print(markdown(json.loads(options.table_from.read_text())))
        return 0
    if options.plot_from:
        draw(json.loads(options.plot_from.read_text()), options.plot)
        return 0
    document = measure(options, command=f"python benchmarks/sync_latency.py {shlex.join(arguments)}")
    show(document)
    if options.plot:
        draw(document, options.plot)
    print(json.dumps(document), flush=True)
    return 0


def measure(options: argparse.Namespace, *, command: str) -> dict[str, Any]:
    """Run every model's job; the document grows, and is written, with each of them."""
    runner = Runner(options)
    document: dict[str, Any] = {
        "machine": runner.machine,
        "versions": versions(),
        "commit": commit(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "ceilings": {},
        "engines": [],
        "results": [],
    }
    for model in options.models:
        result = runner.run(model, ceilings=not document["ceilings"])
        document["ceilings"] = document["ceilings"] or result.ceilings
        document["engines"] += result.engines
        document["results"] += with_ratios(result.rows)
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
        if runner.interrupted:
            break
    return document


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line. Exits with a message on unknown names."""
    parser = argparse.ArgumentParser(description="How long an engine takes to get new weights.")
    add = parser.add_argument
    add("--models", type=names(SHAPES), default=["qwen3-0.6b"], metavar="A,B", help=f"of {', '.join(SHAPES)}")
    add("--methods", type=names(METHODS), default=list(METHODS), metavar="A,B", help=f"of {', '.join(METHODS)} (all)")
    add(
        "--repeats",
        type=int,
        default=10,
        metavar="N",
        help="timed updates of each method, after a first one (10)",
    )
    add(
        "--max-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="no repeats of a method after this time (20)",
    )
    add("--decode", type=int, default=256, metavar="N", help="sequences that decode meanwhile; 0: not measured (256)")
    add("--eager", action="store_true", help="engines without torch.compile and CUDA graphs")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: CUDA where there is a GPU")
    add("--json", type=Path, metavar="FILE", help="write the document to this file, after each model")
    add("--plot", type=Path, metavar="FILE.png", help="draw the results")
    add("--plot-from", type=Path, metavar="FILE.json", help="measure nothing: draw this document to --plot")
    add("--table-from", type=Path, metavar="FILE.json", help="measure nothing: print this document as Markdown")
    options = parser.parse_args(arguments)
    if options.plot_from and not options.plot:
        parser.error("--plot-from needs --plot FILE.png")
    if options.repeats < 1 or options.decode < 0 or options.max_seconds <= 0:
        parser.error("--repeats must be at least 1, --decode at least 0, --max-seconds more than 0")
    return options


def names(known: Any) -> Any:
    """Return an argparse type: a comma-separated list of known names."""

    def read(text: str) -> list[str]:
        wanted = [name.strip() for name in text.split(",")]
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return wanted

    return read


if __name__ == "__main__":
    sys.exit(main())
