"""An engine that vLLM refuses to start (run by torchrun). no_start.py MODEL_FOLDER"""

import sys

import rollcast.rollout as rollcast

if __name__ == "__main__":
    config = rollcast.RolloutConfig(
        model=sys.argv[1], engine_args={"quantization": "no-such-quantization"}, log_dir=sys.argv[1]
    )
    with rollcast.join(config) as job:
        assert not job.is_trainer, "a trainer must not get here"
