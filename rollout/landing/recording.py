"""One run of vLLM's loader, on meta tensors, as data (worker)."""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rollcast.comm import Manifest, ParamSpec
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.explain import explain
from rollcast.rollout.landing.recorder import Recorder
from rollcast.rollout.landing.tape import Op

Loader = Callable[[Iterator[tuple[str, torch.Tensor]]], Any]


@dataclass(frozen=True)
class Recording:
    """What the loader did."""

    ops: tuple[Op, ...]
    values: tuple[torch.Tensor, ...]

    @cached_property
    def writers(self) -> dict[tuple[str, int | str], list[int]]:
        """Tensor (kind, key) -> the operations that make or change it, in order."""
        writers: dict[tuple[str, int | str], list[int]] = defaultdict(list)
        for index, op in enumerate(self.ops):
            for ref in (op.target, *op.results):
                if ref is not None:
                    writers[ref.kind, ref.key].append(index)
        return writers

    def producers(self, live: Iterable[str]) -> list[Op]:
        """Return the operations that the values of these live tensors come from, in order."""
        chosen: set[int] = set()
        wanted: list[tuple[str, int | str, int]] = [("live", name, len(self.ops)) for name in live]
        while wanted:
            kind, key, end = wanted.pop()
            for index in self.writers.get((kind, key), ()):
                if index < end and index not in chosen:
                    chosen.add(index)
                    wanted += [("temp", ref.key, index) for ref in self.ops[index].reads() if ref.kind == "temp"]
        return [self.ops[index] for index in sorted(chosen)]

    def landing_dtypes(self) -> dict[int, set[torch.dtype]]:
        """Return the dtypes of the live tensors that get each parameter's values, or what is computed of them."""
        dtypes: dict[int, set[torch.dtype]] = defaultdict(set)
        # Tensor that an operation has made or changed -> the parameters that it has values of.
        origins: dict[tuple[str, int | str], set[int]] = defaultdict(set)
        for op in self.ops:
            params: set[int] = set()
            for ref in op.reads():
                params |= {int(ref.key)} if ref.kind == "source" else origins[ref.kind, ref.key]
            for ref in (op.target, *op.results):
                if ref is not None:
                    origins[ref.kind, ref.key] |= params
            if op.target is not None and op.target.kind == "live":
                for param in params:
                    dtypes[param].add(op.target.region.dtype)
        return dtypes


def record(load_weights: Loader, targets: Mapping[str, torch.Tensor], manifest: Manifest) -> Recording:
    """Run the loader on meta sources; `targets` (meta, by vLLM's name) are what it may write.

    Raises `LandingError` with the parameter that the loader was given last when it did what cannot be recorded.
    """
    sources: list[torch.Tensor] = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in manifest.specs]
    recorder = Recorder(sources, targets)
    last: ParamSpec | None = None

    def feed() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal last
        for index, spec in enumerate(manifest.specs):
            recorder.current, last = f"parameter {spec}", spec
            yield spec.name, sources[index]
        recorder.current += ", the last one, or one that it had put aside"
        last = None

    try:
        with torch.no_grad(), recorder:
            load_weights(feed())
    except Exception as error:
        why = explain(error, last, targets)
        raise LandingError(f"vLLM's loader does not take {recorder.current}: {why}") from error
    sources.clear()
    if any(recorder.still_referenced()):
        gc.collect()
    for kept in recorder.still_referenced():
        what = f"parameter {manifest.specs[kept]}" if isinstance(kept, int) else f"what it makes of {kept}"
        raise LandingError(f"vLLM's loader holds on to {what}, where only copies into parameters can be repeated")
    return Recording(tuple(recorder.ops), tuple(recorder.values))
