"""In which dtype each parameter travels: one rule, from the trainer's dtype and that of what it lands in (worker).

A parameter travels in the trainer's own dtype where its target takes every value of that, and else in its target's: the
trainer casts while it packs, once. So the few float32 tensors of a bfloat16 model arrive unrounded, and float32 masters
of all others land as a checkpoint that is saved in the engine's dtype does.

What a parameter lands in is known once vLLM's loader has run. It runs on an assumption, and again where that was wrong.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import reduce

import torch

from rollcast.comm import Manifest


def widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether every value of `narrow` is a value of `wide`."""
    if narrow == wide:
        return True
    if not (narrow.is_floating_point and wide.is_floating_point):
        return False
    few, many = torch.finfo(narrow), torch.finfo(wide)
    return few.eps >= many.eps and few.max <= many.max and few.tiny * few.eps >= many.tiny * many.eps


def number_kind(dtype: torch.dtype) -> object:
    """Return equal values for dtypes between which casts make sense; 8-bit floats are quantized, with scales beside."""
    return dtype if dtype.is_floating_point and dtype.itemsize == 1 else dtype.is_floating_point


def wire_dtype(held: torch.dtype, targets: Collection[torch.dtype]) -> torch.dtype:
    """Return the dtype on the wire of a parameter that the trainer has as `held`, and that lands in `targets`.

    Where one worker has it in several dtypes: one that takes the values of each.
    """
    known = bool(targets) and held.is_floating_point
    if not known or any(number_kind(held) != number_kind(target) for target in targets):
        return held
    return reduce(torch.promote_types, [held if widens(held, target) else target for target in targets])


def assumed_manifest(manifest: Manifest, dtype: torch.dtype) -> Manifest:
    """Return the manifest with the wire dtypes of a model whose tensors all are of the engine's `dtype`."""
    return landed_manifest(manifest, {param: [dtype] for param in range(len(manifest.specs))})


def landed_manifest(manifest: Manifest, targets: Mapping[int, Collection[torch.dtype]]) -> Manifest:
    """Return the trainer's manifest with wire dtypes. `targets` are the dtypes that each parameter lands in."""
    specs = enumerate(manifest.specs)
    return Manifest(tuple(replace(spec, dtype=wire_dtype(spec.dtype, targets.get(at, ()))) for at, spec in specs))
