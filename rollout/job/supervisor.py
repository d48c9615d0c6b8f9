"""The supervisor of one engine process: start, watch, stop (the engine's leader rank)."""

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
from rollcast.rollout.config import CPU_WEIGHTS_VARIABLE, START_METHOD_VARIABLE, RolloutConfig
from rollcast.rollout.errors import EngineError, Failure
from rollcast.rollout.job.world import World, without_torchrun
from rollcast.rollout.protocol.messages import EngineSpec
from rollcast.rollout.protocol.registry import EngineRegistry

OMP_BINDING_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
POLL_S = 0.1
STOP_TIMEOUT_S = 4.0
LOG_LINES = 12
MAX_EXCEPTIONS = 5
# The last line of a traceback, with or without vLLM's log prefix: "(Worker pid=7) ERROR ... [file:1] ValueError: why".
EXCEPTION = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+|.*died unexpectedly.*)")


class EngineProcess:
    """A `rollcast.rollout.engine.server` process with all of vLLM's processes below it, in a session of its own."""

    def __init__(self, spec: EngineSpec, *, environ: dict[str, str], log: Path) -> None:
        self.log = log
        self._engine = spec.engine
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
            # `os.fspath`: a user may give paths as `Path`.
            stdin.write(msgspec.json.encode(spec, enc_hook=os.fspath))

    def wait_ready(self, deadline: Deadline, signals: "Signals") -> str:
        """Wait until the engine serves, and return its address. Raises `EngineError` with one failure otherwise."""
        while not select.select([self._ready], [], [], POLL_S)[0]:
            signals.exit_if_received()
            # Forked workers inherit the pipe: it stays open when the engine process ends.
            if not self.running:
                raise EngineError(failures=[self.failure("ended while starting", phase="start")])
            if deadline.left_s() == 0.0:
                text = f"not ready within {deadline.timeout_s:g} s"
                raise EngineError(failures=[self.failure(text, phase="start")])
        address = self._ready.readline().strip()
        if not address:
            raise EngineError(failures=[self.failure("ended while starting", phase="start")])
        return address

    def failure(self, text: str, *, phase: str) -> Failure:
        """Return a failure of this engine, with the end of its log."""
        return Failure(text=f"{text}\n{self.log_tail()}", engine=self._engine, phase=phase)

    @property
    def running(self) -> bool:
        """Whether the engine process is alive."""
        return self._process.poll() is None

    def log_tail(self) -> str:
        """Return the exceptions in the engine's log, its last lines, and the path of the rest."""
        lines = self.log.read_text(errors="replace").splitlines()
        exceptions = list(dict.fromkeys(match[1] for line in lines if (match := EXCEPTION.search(line))))
        errors = "errors:\n  " + "\n  ".join(exceptions[-MAX_EXCEPTIONS:]) + "\n" if exceptions else ""
        return f"{errors}last lines of {self.log}:\n" + "\n".join(lines[-LOG_LINES:])

    def stop(self) -> None:
        """Stop the engine process and all processes below it. Idempotent."""
        if self.running:
            self._process.terminate()
            deadline = Deadline(STOP_TIMEOUT_S)
            while self.running and deadline.left_s():
                time.sleep(POLL_S)
        # The rest of the session: vLLM's processes survive an engine process that was killed.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ready.close()


def supervise_engine(config: RolloutConfig, world: World, store: dist.Store) -> None:
    """Run this leader's engine until the trainers are done. Publishes its failures instead of raising them.

    The trainers raise them: they know what they were doing, and end the job.
    """
    registry = EngineRegistry(store, engines=world.engines)
    folder = Path(config.log_dir or tempfile.mkdtemp(prefix="rollcast-"))
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"engine-{world.engine}.log"
    spec = EngineSpec(config=config, engine=world.engine, host=reachable_host(world.master_addr))
    with Signals() as signals:
        engine = EngineProcess(spec, environ=engine_environ(config, world), log=log)
        try:
            registry.announce(world.engine, engine.wait_ready(Deadline(config.start_timeout_s), signals))
            _wait(registry, signals, engine)
            if not engine.running:
                registry.report_lost(engine.failure("lost: its process ended", phase="run"))
        except EngineError as error:
            (failure,) = error.failures
            registry.report_lost(failure)
        finally:
            engine.stop()
            registry.report_stopped()
        _wait(registry, signals, None)


def wait_for_job_end(registry: EngineRegistry) -> None:
    """Wait until the trainers are done (the engine's other ranks, whose GPUs its workers use)."""
    with Signals() as signals:
        _wait(registry, signals, None)


def _wait(registry: EngineRegistry, signals: "Signals", engine: EngineProcess | None) -> None:
    """Wait until the trainers are done or the engine has ended."""
    while not registry.done() and (engine is None or engine.running):
        signals.exit_if_received()
        time.sleep(POLL_S)


def engine_environ(config: RolloutConfig, world: World) -> dict[str, str]:
    """Return the engine's environment: none of torchrun's variables, its own GPUs, or its share of the threads."""
    environ = without_torchrun(os.environ)
    environ[CPU_WEIGHTS_VARIABLE] = config.cpu_weights
    if config.resolved_device() == "cuda":
        environ[START_METHOD_VARIABLE] = "spawn"
        first = world.gpu_index
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(gpu) for gpu in range(world.local_world_size)]
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + world.tensor_parallel_size])
        return environ
    if config.enforce_eager:
        # vLLM compiles a few small sampling functions all the same, which takes 20 s on a CPU.
        environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if OMP_BINDING_VARIABLE in environ:
        # vLLM binds the threads of a new interpreter only.
        environ[START_METHOD_VARIABLE] = "spawn"
    else:
        # Twice as fast: torch and vLLM are imported once, not once in each process.
        environ |= {START_METHOD_VARIABLE: "fork", OMP_BINDING_VARIABLE: "nobind"}
        environ["OMP_NUM_THREADS"] = str(_threads_of_a_worker(world))
    return environ


def _threads_of_a_worker(world: World) -> int:
    """Return the size of a worker's even share of the machine's cores.

    One core of a share that has several is left to vLLM's scheduler, which polls all the time.
    """
    first_rank = world.rank - world.local_rank
    workers = first_rank + world.local_world_size - max(first_rank, world.trainers)
    return max(1, len(os.sched_getaffinity(0)) // workers - 1)


class Signals:
    """Records torchrun's SIGTERM and the user's Ctrl-C instead of acting on them.

    The loops of this module check for them, so that no signal interrupts a clean-up.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Self:
        self._before = {signum: signal.signal(signum, self._record) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum

    def exit_if_received(self) -> None:
        """End the process, with the exit code that shells give to this signal."""
        if self.received is not None:
            raise SystemExit(128 + self.received)
