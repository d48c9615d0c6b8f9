"""How an `AsyncLLM` is built: a stand-in for vLLM, which sets a start method of its own."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollcast.rollout import RolloutConfig
from rollcast.rollout.config import START_METHOD_VARIABLE
from rollcast.rollout.engine import async_llm


class EngineArgs(SimpleNamespace):
    """vLLM's settings; to check them sets the start method, as on CPUs."""

    enable_log_requests = False

    def create_engine_config(self, usage: str) -> str:
        os.environ[START_METHOD_VARIABLE] = "spawn"
        return f"configuration for {usage}{'' if self.skip_tokenizer_init else ', with tokenizer'}"


class AsyncLLM:
    """Keeps the start method that its processes would be started with."""

    def __init__(self, vllm_config: str) -> None:
        self.vllm_config = vllm_config
        self.start_method = os.environ[START_METHOD_VARIABLE]

    @classmethod
    def from_vllm_config(cls, vllm_config: str, **options: Any) -> "AsyncLLM":
        return cls(vllm_config)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {
        "vllm": SimpleNamespace(AsyncEngineArgs=EngineArgs),
        "vllm.usage.usage_lib": SimpleNamespace(UsageContext=SimpleNamespace(LLM_CLASS="an LLM")),
        "vllm.v1.engine.async_llm": SimpleNamespace(AsyncLLM=AsyncLLM),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(async_llm, "_yield_between_outputs", lambda llm: None)


def test_models_with_images_have_a_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(START_METHOD_VARIABLE, "spawn")
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 64}, "vision_config": {}}')
    llm = async_llm.build_async_llm(RolloutConfig(model=str(tmp_path), dtype="float32"))
    assert llm.vllm_config == "configuration for an LLM, with tokenizer"


@pytest.mark.parametrize(("before", "during"), [(None, "spawn"), ("fork", "fork"), ("spawn", "spawn")])
def test_the_supervisors_start_method_is_kept_and_none_is_needed(
    before: str | None, during: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Set first, so that it is what it was when the test is over.
    monkeypatch.setenv(START_METHOD_VARIABLE, before or "")
    if before is None:
        del os.environ[START_METHOD_VARIABLE]
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    llm = async_llm.build_async_llm(RolloutConfig(model=str(tmp_path), dtype="float32"))
    assert (llm.vllm_config, llm.start_method) == ("configuration for an LLM", during)
