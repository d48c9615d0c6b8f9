"""Jobs that tests share. Trainer rank 0 is the pytest process: tests call the pool and the broadcaster themselves.

The other ranks are its children, with torchrun's variables. One job is alive at a time.
"""

import itertools
import os
import pickle
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pytest import TempPathFactory
from shapes import MODELS, SHAPES, Shape
from torch import distributed as dist
from torchrun import MARKER, SEARCH_PATH, TESTS, processes_of
from trainer import FAULT_FILE, Trainer

import rollcast.rollout as rollcast
from rollcast.rollout.job import job as job_module

ANSWER_S = 200.0
# They take 5 s on a quiet machine.
END_S = 60.0


class SharedJob:
    """A job under way, seen from its trainer rank 0."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.folder = folder
        self.marker = uuid.uuid4().hex
        self.trainer: Trainer
        self._peers: list[Connection] = []
        self._stack = ExitStack()
        (folder / "fault").write_text("")
        config, address = shape.config(folder), str(folder / "trainers")
        (folder / "config").write_bytes(pickle.dumps(config))
        variables = {FAULT_FILE: str(folder / "fault"), "OMP_NUM_THREADS": "1"} | torchrun_variables(shape)
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)
        listener.listen()
        listener.settimeout(ANSWER_S)
        self._children = [self._start_rank(rank, shape, variables, address) for rank in range(1, shape.ranks)]
        self._stack.enter_context(mock.patch.dict(os.environ, variables))
        self._stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        # Each rank counts its joins; the children, new processes, are at their first.
        self._stack.enter_context(mock.patch.object(job_module, "JOINS", itertools.count()))
        try:
            job = self._stack.enter_context(rollcast.join(config))
            # Other ranks may have connected before.
            self._peers = [Connection(listener.accept()[0].detach()) for _ in range(1, shape.trainers)]
            self._peers.sort(key=lambda peer: peer.recv())
            self.trainer = Trainer(job, MODELS[shape.model]())
        except BaseException:
            self.abandon()
            raise

    def on_trainers(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(trainer, *arguments)` on every trainer rank at once; results by rank.

        Other ranks import it by its module's name: it stands beside the tests, not in a test module.
        """
        for peer in self._peers:
            peer.send((function, arguments))
        results = [function(self.trainer, *arguments)]
        for peer in self._peers:
            assert peer.poll(ANSWER_S), "a trainer rank does not answer"
            result, problem = peer.recv()
            assert problem is None, problem
            results.append(result)
        return results

    def close(self) -> None:
        """End the job as a program does that comes to its end."""
        self.trainer.close()
        for peer in self._peers:
            peer.send(None)
        self._stack.close()
        codes = self._wait()
        assert codes == [0] * len(codes), f"exit codes {codes}, logs in {self.folder}"

    def abandon(self) -> None:
        """End the job as an error of the trainers does, whatever state it is in; no process may be left."""
        for peer in self._peers:
            # It may be gone.
            with suppress(OSError):
                peer.send("abandon")
        if dist.is_initialized():
            dist.destroy_process_group()
        problem = RuntimeError("the job is abandoned")
        try:
            self._stack.__exit__(RuntimeError, problem, None)
        except RuntimeError as error:
            assert error is problem, error
        self._wait()

    def _start_rank(
        self, rank: int, shape: Shape, variables: dict[str, str], address: str
    ) -> "subprocess.Popen[bytes]":
        environ = os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank), MARKER: self.marker}
        arguments: tuple[str | Path, ...] = ("engine_rank.py", self.folder / "config")
        if rank < shape.trainers:
            arguments = ("trainer_rank.py", self.folder / "config", shape.model, address)
        with (self.folder / f"rank-{rank}.log").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, TESTS / "support" / arguments[0], *arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ | {"PYTHONPATH": SEARCH_PATH},
                # Ctrl-C is pytest's alone, which ends the job.
                start_new_session=True,
            )

    def _wait(self) -> list[int]:
        """Wait for the children's ends; fails, and kills them, if a process of the job is left after a while."""
        end = time.monotonic() + END_S
        while (left := processes_of(self.marker)) and time.monotonic() < end:
            time.sleep(0.1)
        for process in left:
            process.kill()
        codes = [child.wait() for child in self._children]
        assert not left, f"left behind: {[process.info['cmdline'] for process in left]}, logs in {self.folder}"
        return codes


class Jobs:
    """The job that is alive, if any: opening one of another shape closes it."""

    def __init__(self, folders: TempPathFactory) -> None:
        self._folders = folders
        self._name = ""
        self._job: SharedJob | None = None

    def open(self, name: str) -> SharedJob:
        """The job of this shape, with initial weights in trainers and engines."""
        if self._name != name:
            self.close()
        if self._job is None:
            self._job, self._name = SharedJob(SHAPES[name], self._folders.mktemp(name)), name
        try:
            self._job.on_trainers(Trainer.reset)
        except BaseException:
            self.abandon()
            raise
        return self._job

    def close(self) -> None:
        """End the job, if there is one."""
        if (job := self._take()) is not None:
            job.close()

    def abandon(self) -> None:
        """End a job that a test has broken; the next test gets a new one."""
        if (job := self._take()) is not None:
            job.abandon()

    def _take(self) -> SharedJob | None:
        job, self._job, self._name = self._job, None, ""
        return job


def torchrun_variables(shape: Shape) -> dict[str, str]:
    """What torchrun sets on rank 0 of one machine. There is no store of its agent's: rank 0 hosts one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(shape.ranks)
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
