"""OpenAI's own client talks to the front door while weights are updated (run by torchrun: one trainer, two engines).

front_door.py MODEL_FOLDER REPORT.json
"""

import json
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
from models import perturb
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollcast.rollout as rollcast
from rollcast.launch.serve.frontend import FrontDoor, served

SYNCS = 4
TURNS: Any = [
    {"role": "user", "content": "abc"},
    {"role": "assistant", "content": "ABC"},
    {"role": "user", "content": "de"},
]


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(model=folder, enforce_eager=True, log_dir=str(report.parent))
    with rollcast.join(config) as job:
        if job.is_trainer:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            door = FrontDoor(job.pool, tokenizer, model="tiny", max_model_len=config.resolved_max_model_len())
            with served(door.app(), host="127.0.0.1", port=0) as address:
                report.write_text(json.dumps(facts(job, folder, address)))


def facts(job: rollcast.Job, folder: str, address: str) -> dict[str, Any]:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    found: dict[str, Any] = {
        "models": [model.id for model in client.models.list()],
        "one": whole(client, temperature=0.0, max_tokens=12),
        "streamed": streamed(client, temperature=0.0, max_tokens=12),
        "plain": plain(client),
        "refused": [refusal(client, stop=["x"]), refusal(client, max_tokens=0), refusal(client, content="a" * 200)],
    }
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    broadcaster = job.broadcaster(model)
    answers: list[Any] = []
    over = threading.Event()
    talking = [threading.Thread(target=talk, args=(client, over, answers, stream)) for stream in (False, True) * 2]
    for thread in talking:
        thread.start()
    for version in range(1, SYNCS + 1):
        time.sleep(1.0)
        perturb(model, seed=version)
        broadcaster.sync(version=version, mode=("in_place", "shadow")[version % 2])
    time.sleep(1.0)
    over.set()
    for thread in talking:
        thread.join()
    with urllib.request.urlopen(f"{address}/metrics") as metrics, urllib.request.urlopen(f"{address}/health") as health:
        found["metrics"], found["health"] = metrics.read().decode(), json.loads(health.read())
    return found | {"answers": answers}


def talk(client: openai.OpenAI, over: threading.Event, answers: list[Any], stream: bool) -> None:
    """Chat until told to stop: versions of each answer, or what went wrong."""
    while not over.is_set():
        try:
            if stream:
                answers.append([its[2] for its in streamed(client, max_tokens=100, extra_body={"ignore_eos": True})])
            else:
                its = whole(client, max_tokens=100, extra_body={"ignore_eos": True})
                answers.append([version for version, _ in its["spans"]])
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")


def whole(client: openai.OpenAI, **options: Any) -> dict[str, Any]:
    """One answer, with what its headers say."""
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=TURNS, logprobs=True, **options)
    answer: Any = raw.parse()
    (choice,) = answer.choices
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "usage": answer.usage.completion_tokens,
        "logprobs": len(choice.logprobs.content),
        "version": answer.policy_version,
        "header": raw.headers["x-rollcast-version"],
        "spans": choice.policy_spans,
        "tokens": choice.token_ids,
    }


def streamed(client: openai.OpenAI, **options: Any) -> list[list[Any]]:
    """Text, finish reason and version of each piece."""
    pieces: Any = client.chat.completions.create(model="tiny", messages=TURNS, stream=True, **options)
    return [[its.choices[0].delta.content, its.choices[0].finish_reason, its.policy_version] for its in pieces]


def plain(client: openai.OpenAI) -> list[str]:
    answer = client.completions.create(model="tiny", prompt="abcd>", n=2, temperature=0.0, max_tokens=6)
    return [choice.text for choice in answer.choices]


def refusal(client: openai.OpenAI, *, content: str = "a", **options: Any) -> str:
    turns: Any = [{"role": "user", "content": content}]
    try:
        client.chat.completions.create(model="tiny", messages=turns, **options)
    except openai.BadRequestError as error:
        return str(error)
    return "none"


if __name__ == "__main__":
    main()
