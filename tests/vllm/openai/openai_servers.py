"""OpenAI's own client at vLLM's own server in every engine, while weights change (torchrun: one trainer, two engines).

openai_servers.py MODEL_FOLDER REPORT.json
"""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from exact import greedy_tokens
from oracle import said
from transformers import AutoModelForCausalLM, AutoTokenizer
from updates import Updates

import rollcast.rollout as rollcast

STEP_S = 0.01
LONG = 160
TURNS: Any = [{"role": "user", "content": "abc"}]
PROMPT = "abcd>"
WAYS = [
    {"pause_mode": "keep", "kv_cache": "recomputed"},
    {"pause_mode": "abort", "kv_cache": "recomputed"},
    {"mode": "shadow", "kv_cache": "recomputed"},
]
TALK_WAYS = [{"pause_mode": "keep"}, {"pause_mode": "wait"}, {"pause_mode": "abort"}, {"mode": "shadow"}]


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(
        model=folder,
        enforce_eager=True,
        log_dir=str(report.parent),
        worker_extension_cls="frail_worker.FrailWorker",
        openai_port=0,
        openai_flags=("--served-model-name", "it", "--return-tokens-as-token-ids"),
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            report.write_text(json.dumps(facts(job, folder)))


def facts(job: rollcast.Job, folder: str) -> dict[str, Any]:
    addresses = [str(its.openai) for its in job.pool.describe()]
    clients = [openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=40) for address in addresses]
    client = clients[1]
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    updates = Updates(job, model)
    found: dict[str, Any] = {
        "addresses": addresses,
        "models": [[its.id for its in each.models.list()] for each in clients],
        "whole": [whole(each, temperature=0.0, max_tokens=12) for each in clients],
        "streamed": streamed(client, temperature=0.0, max_tokens=12),
        "responses": responses(client),
        "several": several(client),
        "bad": said_by(lambda: whole(client, max_tokens=-1)),
    }
    found["talk"] = talk(job, updates, clients)
    job.pool.call_workers("slow_down", STEP_S)
    found["long"] = [long(updates, tokenizer, client, way) for way in WAYS]
    found["crossing"] = crossing(updates, tokenizer, client)
    found["guided"] = guided(updates, client)
    found["partial"] = partially_updated(job, updates, client)
    updates.make()
    found["after"] = [whole(client, max_tokens=3)["version"], updates.version]
    return found | {"asleep": asleep(job, client)}


def whole(client: openai.OpenAI, **options: Any) -> dict[str, Any]:
    """One chat, with what its header says."""
    more = {"return_token_ids": True, "ignore_eos": True}
    raw = client.chat.completions.with_raw_response.create(model="it", messages=TURNS, extra_body=more, **options)
    answer: Any = raw.parse()
    (choice,) = answer.choices
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "version": answer.policy_version,
        "header": raw.headers["x-rollcast-version"],
        "spans": choice.policy_spans,
        "tokens": choice.token_ids,
    }


def events_of(client: openai.OpenAI, **options: Any) -> tuple[str, list[Any]]:
    """A chat as a stream: the header, and each event."""
    more = {"return_token_ids": True, "ignore_eos": True}
    with client.chat.completions.with_streaming_response.create(
        model="it", messages=TURNS, stream=True, extra_body=more, **options
    ) as raw:
        events = [json.loads(line[6:]) for line in raw.iter_lines() if line.startswith("data: {")]
    return raw.headers["x-rollcast-version"], events


def streamed(client: openai.OpenAI, **options: Any) -> dict[str, Any]:
    """The header, and text and version of each piece."""
    header, events = events_of(client, **options)
    return {
        "header": header,
        "pieces": [[its["choices"][0]["delta"].get("content"), its["policy_version"]] for its in events],
    }


def responses(client: openai.OpenAI) -> dict[str, Any]:
    """The Responses API, as a stream: the header, and kind and version of each event."""
    options: Any = {"max_output_tokens": 12, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    with client.responses.with_streaming_response.create(model="it", input="abc", stream=True, **options) as raw:
        events = [json.loads(line[6:]) for line in raw.iter_lines() if line.startswith("data: {")]
    return {
        "header": raw.headers.get("x-rollcast-version"),
        "events": [[its["type"], its.get("policy_version")] for its in events],
    }


def several(client: openai.OpenAI) -> list[Any]:
    """Two prompts, two samples of each: index, text and spans of every choice."""
    options: Any = {"max_tokens": 20, "seed": 3, "extra_body": {"ignore_eos": True}}
    answer: Any = client.completions.create(model="it", prompt=[PROMPT, "dcba>"], n=2, **options)
    return [[its.index, its.text, its.policy_spans] for its in answer.choices]


def talk(job: rollcast.Job, updates: Updates, clients: list[openai.OpenAI]) -> list[Any]:
    """Chats with both engines, and the pool's own requests beside them, while weights change in every way."""
    answers: list[Any] = []
    over = threading.Event()

    def chat(client: openai.OpenAI, stream: bool) -> None:
        while not over.is_set():
            try:
                its = (streamed if stream else whole)(client, max_tokens=100)
                answers.append([v for _, v in its["pieces"]] if stream else [v for v, _ in its["spans"]])
            except Exception as error:
                answers.append(f"{type(error).__name__}: {error}")

    def roll_out() -> None:
        while not over.is_set():
            sampling = rollcast.Sampling(max_tokens=100, ignore_eos=True)
            for group in job.pool.generate([[3, 4], [5, 6]], sampling):
                answers.append([*group[0].versions] if len(group[0].token_ids) == 100 else group[0].finish_reason)

    threads = [threading.Thread(target=chat, args=(each, stream)) for each in clients for stream in (False, True)]
    threads.append(threading.Thread(target=roll_out))
    for thread in threads:
        thread.start()
    for way in TALK_WAYS:
        time.sleep(1.0)
        updates.make(**way)
    time.sleep(1.0)
    over.set()
    for thread in threads:
        thread.join()
    return answers


def half_way(act: Callable[[], Any], request: Callable[[], Any]) -> Any:
    """Act when the request is under way; its answer."""
    with ThreadPoolExecutor(1) as thread:
        answer: Future[Any] = thread.submit(request)
        time.sleep(LONG * STEP_S / 2)
        act()
        return answer.result()


def long(updates: Updates, tokenizer: Any, client: openai.OpenAI, way: dict[str, Any]) -> dict[str, Any]:
    """A request that a sync meets half way, and what both weights would have said."""
    prompt = tokenizer.encode("abc>")
    version, wanted = updates.version, greedy_tokens(updates.model, prompt, LONG)
    request = lambda: whole(client, temperature=0.0, max_tokens=LONG)  # noqa: E731
    found = half_way(lambda: updates.make(**way), request)
    cut = found["spans"][-1][1]
    after = greedy_tokens(updates.model, prompt + found["tokens"][:cut], LONG - cut)
    return found | {"way": way, "versions": [version, version + 1], "wanted": wanted[:cut] + after, "cut": cut}


def crossing(updates: Updates, tokenizer: Any, client: openai.OpenAI) -> dict[str, Any]:
    """A stream that a sync meets half way: version and tokens of each event, and what the old weights would say."""
    version, wanted = updates.version, greedy_tokens(updates.model, tokenizer.encode("abc>"), LONG)
    request = lambda: events_of(client, temperature=0.0, max_tokens=LONG)  # noqa: E731
    header, events = half_way(updates.make, request)
    found = [[its["policy_version"], its["choices"][0].get("token_ids") or []] for its in events]
    return {"versions": [version, version + 1], "wanted": wanted, "header": header, "events": found}


def guided(updates: Updates, client: openai.OpenAI) -> list[Any]:
    """Text that must have a form, met half way by a sync that takes the pool's requests out of vLLM."""
    options: Any = {"max_tokens": LONG, "extra_body": {"structured_outputs": {"regex": "(ab|cd){60}"}}}
    request = lambda: client.completions.create(model="it", prompt=PROMPT, **options)  # noqa: E731
    answer = half_way(lambda: updates.make(pause_mode="abort"), request)
    return [answer.choices[0].text, answer.choices[0].policy_spans]


def partially_updated(job: rollcast.Job, updates: Updates, client: openai.OpenAI) -> dict[str, Any]:
    """A sync fails while chats are under way: what they, and later ones, hear."""
    job.pool.call_workers("fail_next_sync")

    def fail() -> None:
        words.append(said(updates.make))

    words: list[str] = []
    with ThreadPoolExecutor(1) as thread:
        streaming = thread.submit(said_by, lambda: streamed(client, max_tokens=LONG))
        whole_one = half_way(fail, lambda: said_by(lambda: whole(client, max_tokens=LONG)))
        return {
            "sync": words[0],
            "whole": whole_one,
            "streaming": streaming.result(),
            "later": said_by(lambda: whole(client, max_tokens=3)),
            "later stream": said_by(lambda: streamed(client, max_tokens=3)),
            "health": health(client),
        }


def said_by(call: Callable[[], Any]) -> str:
    """What the server answers if not with success."""
    try:
        return json.dumps(call())
    except openai.APIStatusError as error:
        return f"{error.status_code}: {error.message}"
    except KeyError as error:
        return f"no {error}"


def health(client: openai.OpenAI) -> int:
    try:
        with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/health")) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def asleep(job: rollcast.Job, client: openai.OpenAI) -> list[Any]:
    job.pool.sleep()
    refused = said_by(lambda: whole(client, max_tokens=3))
    job.pool.wake_up()
    return [refused, whole(client, max_tokens=3)["finish_reason"], health(client)]


if __name__ == "__main__":
    main()
