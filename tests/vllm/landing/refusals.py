"""What an engine says that cannot take weights as it is (a plain process).

refusals.py MODEL_FOLDER REPORT.json
"""

import asyncio
import json
import sys
from pathlib import Path

from models import build

from rollcast.comm import WeightSource
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.engine.engine import Engine
from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.messages import Launch


async def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    engine = Engine.start(launch(folder))
    manifest = WeightSource(build("untied")).manifest.to_bytes()
    found = {"lora": await refusal(engine, manifest)}
    await engine.sleep(1)
    found["asleep"] = await refusal(engine, manifest)
    await engine.wake_up([])
    found["awake"] = await refusal(engine, manifest)
    report.write_text(json.dumps(found))
    engine.shutdown()


async def refusal(engine: Engine, manifest: bytes) -> str:
    try:
        await engine.updates.prepare(manifest)
    except EngineError as error:
        return str(error)
    return "none"


def launch(folder: str) -> Launch:
    config = RolloutConfig(model=folder)
    return Launch(
        engine=0,
        host="127.0.0.1",
        device="cpu",
        dtype=config.resolved_dtype(),
        model=folder,
        max_model_len=64,
        tensor_parallel_size=1,
        worker_extension_cls=config.worker_extension_cls,
        load_format="auto",
        seed=0,
        eos_token_ids=(),
        enforce_eager=True,
        gpu_memory_utilization=0.9,
        max_num_seqs=None,
        sync_asleep=config.sync_asleep,
        deterministic=False,
        openai_port=None,
        openai_flags=(),
        lora_rank=8,
        lora_versions=1,
        engine_args={},
    )


if __name__ == "__main__":
    asyncio.run(main())
