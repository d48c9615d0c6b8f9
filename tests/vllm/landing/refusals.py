"""Errors of an engine that cannot take weights as it is (a plain process).

refusals.py MODEL_FOLDER REPORT.json
"""

import asyncio
import json
import sys
from pathlib import Path

from models import build

from rollcast.comm import Kept, WeightSource
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.engine.engine import Engine
from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.messages import EngineSpec


async def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = RolloutConfig(model=folder, max_model_len=64, enforce_eager=True, lora_rank=8)
    engine = Engine.start(EngineSpec(config=config, engine=0, host="127.0.0.1"))
    manifest = WeightSource(build("untied")).manifest.to_bytes()
    errors = {"lora": await refusal(engine, manifest)}
    await engine.sleep(1)
    errors["asleep"] = await refusal(engine, manifest)
    await engine.wake_up([])
    errors["awake"] = await refusal(engine, manifest)
    report.write_text(json.dumps(errors))
    engine.shutdown()


async def refusal(engine: Engine, manifest: bytes) -> str:
    try:
        await engine.sync.prepare(manifest, Kept().to_bytes())
    except EngineError as error:
        return str(error)
    return "none"


if __name__ == "__main__":
    asyncio.run(main())
