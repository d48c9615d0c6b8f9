"""The example of docs/names-and-parts.md makes what it says."""

import re
from pathlib import Path
from typing import Any

import torch

from rollcast.comm import WeightSource

TEXT = (Path(__file__).parents[3] / "docs" / "names-and-parts.md").read_text()


def test_a_function_of_ones_own_names_and_cuts() -> None:
    (code,) = re.findall(r"```python names\n(.*?)```", TEXT, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    state = {"mlp.gate_up.weight": torch.randn(6, 4), "norm.weight": torch.randn(4)}
    source = WeightSource(state, names=scope["checkpoint_of"])
    got = {source.manifest.specs[param].name: tensor for param, (tensor,) in source.gather(range(3))}
    assert got.keys() == {"mlp.gate_proj.weight", "mlp.up_proj.weight", "model.norm.weight"}
    assert torch.equal(got["mlp.up_proj.weight"], state["mlp.gate_up.weight"][3:])
