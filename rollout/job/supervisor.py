"""Starts, watches and stops one engine process (the engine's leader rank)."""

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Self

import msgspec
from torch import distributed as dist

from rollcast.comm import Deadline
from rollcast.comm.transport.rendezvous import reachable_host
from rollcast.rollout.config import CPU_WEIGHTS_VARIABLE, RolloutConfig
from rollcast.rollout.errors import EngineError
from rollcast.rollout.job.world import World, without_torchrun
from rollcast.rollout.protocol.messages import Launch
from rollcast.rollout.protocol.registry import Roster

POLL_S = 0.1
STOP_S = 4.0
LOG_LINES = 12
CAUSES = 5
# The last line of a traceback, with or without vLLM's log prefix: "(Worker pid=7) ERROR ... [file:1] ValueError: why".
EXCEPTION = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+|.*died unexpectedly.*)")


class EngineProcess:
    """A `rollcast.rollout.engine.server` process with all of vLLM's processes below it, in a session of its own."""

    def __init__(self, launch: Launch, *, environ: dict[str, str], log: Path) -> None:
        self.log = log
        read_fd, write_fd = os.pipe()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollcast.rollout.engine.server", str(write_fd)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                pass_fds=(write_fd,),
                start_new_session=True,
            )
        os.close(write_fd)
        self._ready = os.fdopen(read_fd)
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(msgspec.json.encode(launch))

    def wait_ready(self, deadline: Deadline, signals: "Signals") -> str:
        """The address of the service, once it serves. Raises `EngineError` with the log's end if it never does."""
        while not select.select([self._ready], [], [], POLL_S)[0]:
            signals.exit_if_received()
            if deadline.left_s() == 0.0:
                raise EngineError(f"not ready within {deadline.timeout_s:g} s\n{self.last_words()}")
        address = self._ready.readline().strip()
        if not address:
            raise EngineError(f"ended while starting\n{self.last_words()}")
        return address

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """The end of the engine's log, and where the rest is."""
        lines = self.log.read_text(errors="replace").splitlines()
        causes = list(dict.fromkeys(match[1] for line in lines if (match := EXCEPTION.search(line))))
        told = "errors:\n  " + "\n  ".join(causes[-CAUSES:]) + "\n" if causes else ""
        return f"{told}last lines of {self.log}:\n" + "\n".join(lines[-LOG_LINES:])

    def stop(self) -> None:
        """Stop the service and everything below it. Idempotent."""
        if self.running:
            self._process.terminate()
            deadline = time.monotonic() + STOP_S
            while self.running and time.monotonic() < deadline:
                time.sleep(POLL_S)
        # Whatever is left of the session: vLLM's processes survive a service that was killed.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ready.close()


def lead(config: RolloutConfig, world: World, store: dist.Store) -> None:
    """Run this leader's engine until the trainers are done. Engine trouble is published, not raised here.

    The trainers raise it: they know what they were doing, and end the job.
    """
    roster = Roster(store, engines=world.engines)
    folder = Path(config.log_dir or tempfile.mkdtemp(prefix="rollcast-"))
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"engine-{world.engine}.log"
    with Signals() as signals:
        engine = EngineProcess(_launch(config, world), environ=engine_environ(config, world), log=log)
        try:
            roster.announce(world.engine, engine.wait_ready(Deadline(config.start_timeout_s), signals))
            _wait(roster, signals, engine)
            if not engine.running:
                roster.report_lost(world.engine, f"its process ended\n{engine.last_words()}")
        except EngineError as error:
            roster.report_lost(world.engine, str(error))
        finally:
            engine.stop()
            roster.leave()
        _wait(roster, signals, None)


def idle(roster: Roster) -> None:
    """Wait until the trainers are done (the engine's other ranks, which only lend it their GPUs)."""
    with Signals() as signals:
        _wait(roster, signals, None)


def _wait(roster: Roster, signals: "Signals", engine: EngineProcess | None) -> None:
    """Until the trainers are done or the engine has ended."""
    while not roster.done() and (engine is None or engine.running):
        signals.exit_if_received()
        time.sleep(POLL_S)


def engine_environ(config: RolloutConfig, world: World) -> dict[str, str]:
    """The engine's environment: no torchrun, this package importable, its own GPUs or cores."""
    environ = without_torchrun(os.environ)
    environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    environ[CPU_WEIGHTS_VARIABLE] = config.cpu_weights
    if config.resolved_device() == "cuda":
        first = world.gpu_index
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(gpu) for gpu in range(world.local_world_size)]
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + world.tensor_parallel_size])
        return environ
    if config.enforce_eager:
        # vLLM compiles a few small sampling functions all the same, which takes 20 s on a CPU.
        environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cpu_binding(world))
    return environ


def _cpu_binding(world: World) -> str:
    """Cores for each worker of this engine: this machine's, shared out evenly among its engine ranks.

    One of each share that has more is left to vLLM's scheduler, which never rests, as vLLM itself does.
    """
    cores = sorted(os.sched_getaffinity(0))
    first_rank = world.rank - world.local_rank
    engine_ranks = range(max(first_rank, world.trainers), first_rank + world.local_world_size)
    shares = [
        cores[index :: len(engine_ranks)] or [cores[index % len(cores)]]
        for index, rank in enumerate(engine_ranks)
        if rank in world.engine_ranks(world.engine)
    ]
    return "|".join(",".join(map(str, share[1:] or share)) for share in shares)


def _launch(config: RolloutConfig, world: World) -> Launch:
    return Launch(
        engine=world.engine,
        host=reachable_host(world.master_addr),
        device=config.resolved_device(),
        dtype=config.resolved_dtype(),
        model=config.model,
        max_model_len=config.resolved_max_model_len(),
        tensor_parallel_size=config.tensor_parallel_size,
        worker_extension_cls=config.worker_extension_cls,
        load_format=config.load_format,
        seed=config.seed,
        eos_token_ids=config.eos_token_ids(),
        enforce_eager=config.enforce_eager,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_num_seqs=config.max_num_seqs,
        sync_asleep=config.sync_asleep,
        deterministic=config.deterministic,
        openai_port=config.openai_port and config.openai_port + world.engine,
        openai_flags=tuple(config.openai_flags),
        lora_rank=config.lora_rank,
        lora_versions=config.lora_versions,
        engine_args=dict(config.engine_args),
    )


class Signals:
    """Notes torchrun's SIGTERM and the user's Ctrl-C instead of acting on them.

    The loops of this module look; so no signal can cut a clean-up short.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Self:
        self._before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum

    def exit_if_received(self) -> None:
        """End the process, with the exit code that shells give to this signal."""
        if self.received is not None:
            raise SystemExit(128 + self.received)
