"""Trains a step with DeepSpeed and sends the shards, twice, compared with what DeepSpeed itself gathers (torchrun).

zero3_job.py SETTINGS      (DeepSpeed's `zero_optimization` and more, as JSON)
"""

import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # pyright: ignore[reportMissingImports]
import torch
from models import build
from torch import distributed as dist
from trainer_job import TrainerJob

from rollcast.comm import WeightSource

CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
# 2 of 13 rows, say, are padding: no size is a multiple of the ranks.
SIZES = {"vocab_size": 49, "hidden_size": 63, "intermediate_size": 97, "head_dim": 30}


def main() -> None:
    settings = json.loads(sys.argv[1])
    # DeepSpeed would compile a kernel for sums over ranks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = build("tied", **SIZES)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config=CONFIG | {"zero_force_ds_cpu_optimizer": False} | settings,
    )
    train(engine)
    source = WeightSource(engine, dtype=torch.float32)
    check_parts(engine, source, stage=settings["zero_optimization"]["stage"])
    job = TrainerJob(source)
    for _ in range(3):
        before = gathered(engine)
        landed = job.sync()
        if job.rank == 0:
            assert landed.keys() == before.keys()
            for name, tensor in before.items():
                assert torch.equal(landed[name], tensor.float()), name
        train(engine)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in gathered(engine).items())
    job.close()
    dist.destroy_process_group()


def train(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make an optimizer step, with other data on each rank."""
    ids = (torch.arange(12).view(1, 12) * (dist.get_rank() + 3)) % 49
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()


def gathered(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return every parameter whole, as DeepSpeed gathers it. Collective."""
    params = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return {name: param.detach().clone() for name, param in params.items()}


def check_parts(engine: deepspeed.DeepSpeedEngine, source: WeightSource, *, stage: int) -> None:
    """Check what this rank states against the gathered parameters: with ZeRO-3 its even part of each, else all."""
    whole = gathered(engine)
    assert {held.spec.name: held.spec.shape for held in source.statement} == {n: t.shape for n, t in whole.items()}
    assert source.stable_params() is not None
    for held, (_, (part,)) in zip(source.statement, source.gather(range(len(whole))), strict=True):
        (box,) = held.boxes
        if stage == 3:
            assert box.numel <= -(-held.spec.numel // dist.get_world_size())
            assert torch.equal(part, whole[held.spec.name].flatten()[box.start[0] : box.stop[0]]), held.spec.name
        else:
            assert torch.equal(part, whole[held.spec.name])


if __name__ == "__main__":
    main()
