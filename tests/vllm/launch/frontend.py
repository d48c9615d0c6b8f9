"""The serving program, with OpenAI's own client as its user while weights are updated (torchrun: rank 0, two engines).

frontend.py MODEL_FOLDER REPORT.json PORT

Serves until it is interrupted, like the program.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import openai
from frontend_facts import Answer, Asleep, Conversation, Disconnect, Facts, Health, Refusals
from frontend_requests import (
    TURNS,
    connect,
    error_of,
    refusal,
    samples,
    stop,
    streamed,
    structured,
    template_argument,
    tool_call,
    tool_history,
    top_logprobs,
    whole,
)
from prometheus_client import CollectorRegistry
from transformers import AutoModelForCausalLM
from updates import Updates

import rollcast.rollout as rollcast
from rollcast.launch.serve import __main__ as program
from rollcast.launch.serve.frontend import ENGINE_HEADER, Frontend, serve_app

SYNCS = 4
STEP_S = 0.05


def main() -> int:
    folder, report, port = sys.argv[1:]
    sys.argv[1:] = ["--model", folder, "--port", port, "--enforce-eager", "--served-model-name", "tiny"]
    sys.argv += ["--openai-flags=--enable-auto-tool-choice --tool-call-parser pythonic"]
    sys.argv += ["--log-dir", str(Path(report).parent)]
    program.rollout_config = partial(slow_rollout_config, program.rollout_config)
    program.serve = partial(serve_and_measure, program.serve, Path(report))
    return program.main()


def slow_rollout_config(original: Callable[..., rollcast.RolloutConfig], options: Any) -> rollcast.RolloutConfig:
    """The program's settings, with workers that can be slowed down."""
    return replace(original(options), worker_extension_cls="steered_worker.SteeredWorker")


def serve_and_measure(original: Callable[..., None], report: Path, job: rollcast.Job, options: Any) -> None:
    """Serve as the program does, and measure on a thread."""
    address = f"http://127.0.0.1:{options.port}"
    threading.Thread(target=measure, args=(job, options.model, address, report), daemon=True).start()
    original(job, options)


def measure(job: rollcast.Job, folder: str, address: str, report: Path) -> None:
    """Write the facts once the server answers; end the job if that fails."""
    try:
        wait_until_served(address)
        addresses = [str(engine.openai) for engine in job.pool.describe()]
        report.write_bytes(msgspec.json.encode(facts(job, folder, address, addresses)))
        print("the facts are written", flush=True)
    except Exception:
        traceback.print_exc()
        os.kill(os.getpid(), signal.SIGINT)


def wait_until_served(address: str) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


def facts(job: rollcast.Job, folder: str, address: str, addresses: list[str]) -> Facts:
    client = connect(address)
    return Facts(
        models=[model.id for model in client.models.list()],
        whole=whole(client, temperature=0.0, max_tokens=12),
        direct=[whole(connect(own.removesuffix("/v1")), temperature=0.0, max_tokens=12) for own in addresses],
        streamed=streamed(client, temperature=0.0, max_tokens=12),
        samples=samples(client),
        tool_call=tool_call(client),
        tool_history=tool_history(client),
        stop=stop(client),
        template_argument=template_argument(client),
        top_logprobs=top_logprobs(client),
        structured=structured(client),
        response=client.responses.create(model="tiny", input="abc", max_output_tokens=12).output_text,
        refusals=Refusals(no_tokens=refusal(client, max_tokens=0), too_long=refusal(client, content="a" * 200)),
        conversation=conversation(client),
        without_first_engine=without_first_engine(addresses),
        answers=talk_during_syncs(job, folder, client),
        metrics=metrics(address),
        asleep=asleep(job, client, address),
        disconnect=disconnect(job, client),
    )


def metrics(address: str) -> str:
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        return answer.read().decode()


def engine_of(client: openai.OpenAI, messages: Any) -> str:
    """The engine that answers."""
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=messages, max_tokens=1)
    return raw.headers[ENGINE_HEADER]


def conversation(client: openai.OpenAI) -> Conversation:
    turn = {"role": "user", "content": "abcdefgh" * 3 + "ab"}
    options: Any = {"max_tokens": 100, "stream": True, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(model="tiny", messages=TURNS, **options) as other:
        next(iter(other))
        first = engine_of(client, [turn])
    turns = [first, *(engine_of(client, [turn] * count) for count in (2, 3, 4))]
    return Conversation(turns=turns, other=engine_of(client, TURNS))


def without_first_engine(addresses: list[str]) -> list[str]:
    """Engines that answer if nothing listens at the first address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nothing = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    app = Frontend([nothing, *addresses], registry=CollectorRegistry()).app()
    with serve_app(app, host="127.0.0.1", port=0) as address:
        client = connect(address)
        return [engine_of(client, TURNS) for _ in range(3)]


def talk_during_syncs(job: rollcast.Job, folder: str, client: openai.OpenAI) -> list[Answer]:
    """Chat in several threads while weights change."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    updates = Updates(job, model)
    answers: list[Answer] = []
    over = threading.Event()
    threads = [threading.Thread(target=talk, args=(client, over, answers, stream)) for stream in (False, True) * 2]
    for thread in threads:
        thread.start()
    for sync in range(SYNCS):
        wait_for_answers(answers)
        updates.make(mode=("in_place", "shadow")[sync % 2])
    wait_for_answers(answers)
    over.set()
    for thread in threads:
        thread.join()
    return answers


def wait_for_answers(answers: list[Answer]) -> None:
    """Wait until as many more answers have come as there are threads."""
    count, end = len(answers) + 4, time.monotonic() + 20
    while len(answers) < count and time.monotonic() < end:
        time.sleep(0.02)


def talk(client: openai.OpenAI, over: threading.Event, answers: list[Answer], stream: bool) -> None:
    options: Any = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
    while not over.is_set():
        try:
            if stream:
                answers.append(Answer(versions=[piece.version for piece in streamed(client, **options)]))
            else:
                answers.append(Answer(versions=[version for version, _ in whole(client, **options).spans]))
        except Exception as error:
            answers.append(Answer(versions=[], problem=f"{type(error).__name__}: {error}"))


def asleep(job: rollcast.Job, client: openai.OpenAI, address: str) -> Asleep:
    before = health(address)
    job.pool.sleep()
    problem, during = error_of(lambda: engine_of(client, TURNS)), health(address)
    job.pool.wake_up()
    engine_after = engine_of(client, TURNS)
    return Asleep(before=before, during=during, problem=problem, after=health(address), engine_after=engine_after)


def health(address: str) -> Health:
    try:
        with urllib.request.urlopen(f"{address}/health") as answer:
            return Health(status=answer.status, engines=[engine["healthy"] for engine in json.load(answer)["engines"]])
    except urllib.error.HTTPError as error:
        return Health(status=error.code, engines=[engine["healthy"] for engine in json.load(error)["engines"]])


def disconnect(job: rollcast.Job, client: openai.OpenAI) -> Disconnect:
    """Read a stream's first piece and disconnect."""
    job.pool.call_workers("set_pace", STEP_S)
    options: Any = {"max_tokens": 100, "stream": True, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(model="tiny", messages=TURNS, **options) as pieces:
        next(iter(pieces))
        during = requests(job)
    start = time.monotonic()
    while requests(job) and time.monotonic() < start + 100 * STEP_S:
        time.sleep(0.02)
    return Disconnect(requests=during, after_s=time.monotonic() - start)


def requests(job: rollcast.Job) -> int:
    return sum(engine.requests for engine in job.pool.describe())


if __name__ == "__main__":
    sys.exit(main())
