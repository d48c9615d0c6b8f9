"""A process with vLLM that lands weights for tests, one case at a time: importing vLLM takes longer than a case."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from torchrun import SEARCH_PATH, TESTS, job_script

Row = dict[str, Any]


class LandingProcess:
    """Runs `landing_server.py` with linear weights in one layout of vLLM's on CPU ("plain" or "packed").

    `folder` is where it keeps models and its log. A process that has died is started anew for the next case.
    """

    def __init__(self, layout: str, folder: Path) -> None:
        self._layout = layout
        self._folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._process: subprocess.Popen[str] | None = None
        self._answers: TextIO | None = None

    def start(self) -> None:
        """Start the process, if it is not running, without waiting until it has imported vLLM."""
        if self._process is not None and self._process.poll() is None:
            return
        settings = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        settings |= {"ROLLCAST_CPU_WEIGHTS": self._layout}
        settings["PYTHONPATH"] = os.pathsep.join([SEARCH_PATH, str(TESTS.parent / "benchmarks")])
        # A pipe of its own: vLLM may print.
        answers, server_end = os.pipe()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, job_script("landing_server.py"), self._folder, str(server_end)],
                env=os.environ | settings,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[server_end],
                text=True,
            )
        os.close(server_end)
        self._answers = os.fdopen(answers)

    def submit(self, job: str, **arguments: Any) -> "Future[Row]":
        """Run a job of the server after those that were submitted before; its row has "error" if it raised."""
        return self._thread.submit(self._run, job, arguments)

    def run(self, job: str, **arguments: Any) -> Row:
        """Run a job and wait for its row."""
        return self.submit(job, **arguments).result()

    def close(self) -> None:
        """Kill the process."""
        self._stop()
        self._thread.shutdown(cancel_futures=True)

    @property
    def _log(self) -> Path:
        return self._folder / "log.txt"

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _run(self, job: str, arguments: Row) -> Row:
        self.start()
        assert self._process is not None and self._process.stdin is not None and self._answers is not None
        self._process.stdin.write(json.dumps([job, arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._answers.readline()
        if not answer:
            self._stop()
        assert answer, f"the process ended in {job} {arguments}:\n{self._log.read_text(errors='replace')[-4000:]}"
        return json.loads(answer)
