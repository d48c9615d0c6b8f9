"""What engines keep: patterns of names, and the statements of several ranks as one."""

import pytest
import torch

from rollcast.comm import Kept, Manifest, ParamSpec


def manifest(*names: str) -> Manifest:
    return Manifest(tuple(ParamSpec(name, (2,), torch.float32) for name in names))


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("visual", "model.visual.blocks.0.weight", True),
        ("visual", "visual.weight", True),
        ("visual", "model.visuals.weight", False),
        ("layers.1", "model.layers.1.mlp.weight", True),
        ("layers.1", "model.layers.11.mlp.weight", False),
        ("layers.?.mlp", "model.layers.3.mlp.up.weight", True),
        ("model.norm.weight", "model.norm.weight", True),
        ("*tower", "vision_tower.weight", True),
    ],
)
def test_patterns_match_whole_levels(pattern: str, name: str, matches: bool) -> None:
    assert Kept(patterns=(pattern,)).matches(name) is matches


def test_ranks_are_merged_and_must_agree() -> None:
    ranks = [Kept(manifest("a"), ("x",)), Kept(manifest("b", "a"), ("y", "x"))]
    merged = Kept.merged([Kept.from_bytes(kept.to_bytes()) for kept in ranks], manifest("c"))
    assert merged == Kept(manifest("a", "b"), ("x", "y"))
    with pytest.raises(ValueError, match="one trainer rank sends parameter b, and another keeps it"):
        Kept.merged(ranks, manifest("b"))
