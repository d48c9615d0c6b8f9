"""Lands what simulated trainer ranks hold in vLLM's model, and compares with a fresh load (in landing_server.py).

A case is an architecture, with @2 for both ranks of two and +ep for expert parallel, as in architecture_matrix.py.
"""

import random
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from architecture_matrix import Tensors, different, snapshot
from architectures import build, perturb, save
from loaded_models import LoadedModels
from local_transfer import LocalTransfer
from rank_layouts import LAYOUTS
from ranks import CPU, Ranks, all_results, receive, send

from rollcast.comm import (
    Holders,
    Manifest,
    TransferPlan,
    WeightBroadcaster,
    WeightReceiver,
    WeightSource,
    build_transfer,
)
from rollcast.rollout.landing import LandingPlan
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing

MOST_RANKS = 4
BUCKET_BYTES = (4096, 1 << 16, 1 << 20)


@dataclass
class Trial:
    """One layout of one number of trainer ranks."""

    name: str
    sources: list[WeightSource]
    holders: Holders
    plan: TransferPlan = field(init=False)
    stale: int = 0
    """Tensors of all workers that were to change."""


@dataclass
class Worker:
    """One rank of the engine: the model that is to change, and what it is compared with."""

    rank: int
    model: Any
    expected: Tensors
    plans: dict[str, LandingPlan] = field(default_factory=dict)
    """By digest of the manifest."""


@dataclass(frozen=True)
class Engine:
    """vLLM's models of both checkpoints, "base" and "perturbed", as an engine of so many workers has them."""

    models: LoadedModels
    folder: Path
    size: int

    def as_rank(self, rank: int) -> AbstractContextManager[Any]:
        return self.models.as_rank(self.folder / "base", rank=rank, size=self.size)

    def workers(self, manifests: Sequence[Manifest]) -> list[Worker]:
        """Load both models for every rank, and compile landings for all manifests."""
        workers: list[Worker] = []
        for rank in range(self.size):
            load = partial(self.models.load, rank=rank, size=self.size)
            worker = Worker(rank, load(self.folder / "base"), snapshot(load(self.folder / "perturbed")))
            with self.as_rank(rank), torch.no_grad():
                for manifest in {each.digest: each for each in manifests}.values():
                    worker.plans[manifest.digest] = compile_landing(worker.model, manifest, dtype=torch.float32)
            workers.append(worker)
        return workers


def compare(models: LoadedModels, case: str, folder: Path, trainers: Sequence[int]) -> dict[str, Any]:
    """Return the tensors that differ from a fresh load's, by trial, and the trials that had little to do."""
    try:
        return _compare(models, case, folder, trainers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare(models: LoadedModels, case: str, folder: Path, trainers: Sequence[int]) -> dict[str, Any]:
    name, *tags = case.split("+")
    architecture, _, size = name.partition("@")
    model = build(architecture, seed=0)
    base = save(architecture, model, folder / "base")
    perturb(model)
    perturbed = save(architecture, model, folder / "perturbed")
    rng = random.Random(case)
    trials = [_trial(layout, perturbed, ranks, rng) for ranks in trainers for layout in LAYOUTS]
    whole = WeightSource(base).manifest
    engine = Engine(models.with_settings(enable_expert_parallel="ep" in tags), folder, int(size or 1))
    workers = engine.workers([whole, *(trial.holders.manifest for trial in trials)])
    for trial in trials:
        _plan(trial, workers, bucket_bytes=rng.choice(BUCKET_BYTES))
    wrong: dict[str, list[str]] = {}
    for worker in workers:
        with engine.as_rank(worker.rank), torch.no_grad():
            landing = LiveLanding(worker.plans[whole.digest], worker.model, dtype=torch.float32)
            reset = LocalTransfer(landing, list(base.values()))
            for trial in trials:
                reset.apply()
                trial.stale += len(different(worker.expected, snapshot(worker.model)))
                _sync(trial, worker)
                if names := different(worker.expected, snapshot(worker.model)):
                    wrong[f"{trial.name}, worker {worker.rank}"] = names
    return {
        "trials": len(trials),
        "different": wrong,
        "idle": [trial.name for trial in trials if trial.stale <= len(base) / 4],
        "senders": {trial.name: len({lane.sender for lane in trial.plan.lanes}) for trial in trials},
    }


def _trial(layout: str, weights: Tensors, ranks: int, rng: random.Random) -> Trial:
    states = LAYOUTS[layout](weights, ranks, rng)
    sources = [WeightSource(state, dtype=torch.float32) for state in states]
    return Trial(f"{layout} x {ranks}", sources, Holders.of([source.statement for source in sources]))


def _plan(trial: Trial, workers: Sequence[Worker], *, bucket_bytes: int) -> None:
    plans = [worker.plans[trial.holders.manifest.digest] for worker in workers]
    landings = {plan.digest: plan.moves for plan in plans}
    digests = [plan.digest for plan in plans]
    trial.plan = build_transfer(trial.holders, landings, digests, bucket_bytes=bucket_bytes)


@cache
def _groups() -> Ranks:
    """One lane from each trainer rank to the worker whose turn it is."""
    return Ranks(*[[0]] * MOST_RANKS)


def _sync(trial: Trial, worker: Worker) -> None:
    """Send one worker what it gets, with checksums."""
    lanes = trial.plan.lanes_of(worker.rank)
    groups = _groups()
    senders = {lane.index: groups.senders[lane.sender] for lane in lanes}
    received = {lane.index: groups.lanes_of[0][lane.sender] for lane in lanes}
    landing = LiveLanding(worker.plans[trial.holders.manifest.digest], worker.model, dtype=torch.float32)
    receiver = WeightReceiver(lanes, landing, device=CPU)
    sent = [
        groups.start(
            send,
            WeightBroadcaster(source, replace(trial.plan, lanes=lanes), rank=rank, device=CPU),
            senders,
            checksums=True,
        )
        for rank, source in enumerate(trial.sources)
    ]
    receive(receiver, received, checksums=True)
    all_results(*sent)
