"""Load a checkpoint from disk with vLLM alone and tell what the engine holds (a plain process).

fresh.py MODEL_FOLDER REPORT.json
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM

    llm = LLM(
        model=sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        worker_extension_cls="rollcast.rollout.extension.RollcastWorker",
    )
    Path(sys.argv[2]).write_text(json.dumps(llm.collective_rpc("rollcast_fingerprint")))


if __name__ == "__main__":
    main()
