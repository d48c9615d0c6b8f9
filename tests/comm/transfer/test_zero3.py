"""What a rank holds of parameters as DeepSpeed's ZeRO-3 leaves them, without DeepSpeed."""

from enum import Enum
from typing import Any

import pytest
import torch
from fake_ranks import rank_of
from torch import nn

from rollcast.comm import Box, WeightSource
from rollcast.comm.transfer.gathering import GatheringSource


def test_zero3_has_an_even_share_of_the_flattened_padded_parameter() -> None:
    """As DeepSpeed keeps it: the parameter is empty, `ds_tensor` has this rank's share."""
    full = torch.arange(13 * 6, dtype=torch.float32).view(13, 6)
    share = -(-full.numel() // 4)
    padded = torch.cat((full.flatten(), torch.full((4 * share - full.numel(),), -1.0)))
    rows: list[torch.Tensor] = []
    for rank in range(4):
        with rank_of(4, rank):
            param = nn.Parameter(torch.empty(0))
            for name, value in {"ds_shape": full.shape, "ds_tensor": padded.split(share)[rank]}.items():
                setattr(param, name, value)
            source = WeightSource({"w": param})
            assert source.manifest.specs[0].shape == (13, 6)
            ((box,),) = (held.boxes for held in source.statement)
            assert box == Box((78,), (rank * share,), (min(78, (rank + 1) * share),))
            ((_, (part,)),) = source.gather([0])
            rows.append(part)
    assert torch.equal(torch.cat(rows).view(13, 6), full)


def zero3_param(share: torch.Tensor, **attributes: Any) -> nn.Parameter:
    """A parameter [4, 2] as DeepSpeed has partitioned it."""
    param = nn.Parameter(torch.empty(0))
    for name, value in {"ds_shape": torch.Size((4, 2)), "ds_tensor": share}.items():
        setattr(param, name, value)
    for name, value in attributes.items():
        setattr(share, name, value)
    return param


def test_zero3_parameters_that_stay_cost_nothing() -> None:
    """The last rank's part is padded: it is shorter than `ds_tensor`."""
    with rank_of(3, 2):
        param = zero3_param(torch.zeros(3))
        source = WeightSource({"w": param})
        before = source.stable_params()
        assert before is not None and source.statement[0].boxes == (Box((8,), (6,), (8,)),)
        source.current_manifest()
        assert source.stable_params() is before
        param.ds_tensor.data = torch.ones(3)  # type: ignore[attr-defined]
        source.current_manifest()
        assert source.stable_params() is not before
        ((_, (part,)),) = source.gather([0])
        assert part.tolist() == [1.0, 1.0]
        param.ds_tensor = torch.zeros(3)  # type: ignore[attr-defined]
        ((_, (part,)),) = source.gather([0])
        assert part.tolist() == [0.0, 0.0]


class Status(Enum):
    """As DeepSpeed's `PartitionedParamStatus`."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


def test_zero3_parts_that_cannot_be_read_are_refused_by_name() -> None:
    with rank_of(2, 0):
        assert WeightSource({"w": zero3_param(torch.zeros(4), status=Status.AVAILABLE)})
        with pytest.raises(ValueError, match="w: DeepSpeed has this rank's part on NVMe"):
            WeightSource({"w": zero3_param(torch.zeros(1), status=Status.NOT_AVAILABLE)})
        with pytest.raises(ValueError, match="w: DeepSpeed has quantised it"):
            WeightSource({"w": zero3_param(torch.zeros(4), ds_quant_scale=torch.ones(1))})


def test_adapters_of_flattened_models_are_refused() -> None:
    param = zero3_param(torch.zeros(4))
    with rank_of(2, 0), pytest.raises(ValueError, match="w: a peft model that FSDP1 or ZeRO-3 has flattened"):
        GatheringSource({"w": param})
