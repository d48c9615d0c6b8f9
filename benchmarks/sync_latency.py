"""Latency of a weight update of one engine, by rollcast and by other methods, on the same tensors.

    python benchmarks/sync_latency.py --models qwen3-0.6b,qwen3-8b [--json FILE] [--plot FILE.png]

Starts one torchrun job for each model: rank 0 trains, rank 1 runs a vLLM engine. The last line is one JSON document.
On SIGTERM the job is stopped, and the document has the rows measured by then.

    python benchmarks/sync_latency.py --models qwen3-8b --layouts 2xfsdp2-bf16:2,2xfsdp2-fp32:tp2 [--json FILE]

measures layouts of several trainers and engines instead: here two FSDP2 trainers to two engines, and fp32 masters to
one engine of tensor-parallel size 2.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from latency.layout_plot import draw_layouts
from latency.layout_run import LayoutRunner, measure_layouts
from latency.layout_table import has_layouts
from latency.layouts import GRAMMAR, HOLDS, LAYOUTS, Layout, parse_layouts
from latency.methods import METHODS
from latency.models import SHAPES
from latency.plot import draw
from latency.report import markdown, show
from latency.run import Runner
from latency.stats import with_ratios
from machine_card import commit, versions

EPILOG = f"""layouts: {GRAMMAR}
  HOLDS is {", ".join(HOLDS)}; "1" is one trainer that holds everything.
  --layouts 2xfsdp2-bf16:2,2xfsdp2-fp32:tp2@shared    two trainers with bf16 shards and two engines on GPUs of their
                                                      own; fp32 masters and one engine of two workers on the same GPUs
  --models, --repeats, --max-seconds, --eager, --device, --json and --plot apply; methods and decoding do not."""


def main(argv: list[str] | None = None) -> int:
    """Run the command. Failures are rows of the document; the exit code is 0 if there is a document."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(arguments)
    if options.table_from:
        print(markdown(json.loads(options.table_from.read_text())))
        return 0
    if options.plot_from:
        plot(json.loads(options.plot_from.read_text()), options.plot)
        return 0
    command = f"python benchmarks/sync_latency.py {shlex.join(arguments)}"
    document = (measure if options.layouts is None else measure_in_layouts)(options, command=command)
    show(document)
    if options.plot:
        plot(document, options.plot)
    print(json.dumps(document), flush=True)
    return 0


def measure(options: argparse.Namespace, *, command: str) -> dict[str, Any]:
    """Run every model's job; the document grows, and is written, with each of them."""
    runner = Runner(options)
    document = new_document(runner.machine, command)
    for model in options.models:
        result = runner.run(model, ceilings=not document["ceilings"])
        document["ceilings"] = document["ceilings"] or result.ceilings
        document["engines"] += result.engines
        document["results"] += with_ratios(result.rows)
        save(document, options.json)
        if runner.interrupted:
            break
    return document


def measure_in_layouts(options: argparse.Namespace, *, command: str) -> dict[str, Any]:
    """Run the jobs of all layouts; the document grows, and is written, with each row."""
    runner = LayoutRunner(options)
    try:
        jobs = runner.jobs()
    except ValueError as error:
        raise SystemExit(f"sync_latency.py: {error}") from None
    document = new_document(runner.machine, command)
    return measure_layouts(runner, jobs, document, save=lambda each: save(each, options.json))


def new_document(machine: dict[str, Any], command: str) -> dict[str, Any]:
    """Return a document without results."""
    return {
        "machine": machine,
        "versions": versions(),
        "commit": commit(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "ceilings": {},
        "engines": [],
        "results": [],
    }


def save(document: dict[str, Any], path: Path | None) -> None:
    """Write the document to the file, if there is one; the file is whole at any time."""
    if path is not None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw the document."""
    (draw_layouts if has_layouts(document) else draw)(document, path)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line. Exits with a message on unknown names."""
    parser = argparse.ArgumentParser(
        description="How long an engine takes to get new weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    add(
        "--layouts",
        type=layouts_of,
        nargs="?",
        const=LAYOUTS,
        metavar="A,B",
        help="measure layouts of several trainers and engines (see below); alone: all that the GPUs suffice for",
    )
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


def layouts_of(text: str) -> list[Layout]:
    """Return the layouts of an argument."""
    try:
        return parse_layouts(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
