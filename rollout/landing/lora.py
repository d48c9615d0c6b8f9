"""Where a LoRA adapter lands in vLLM, and how it becomes what a slot serves (worker).

vLLM keeps, for each layer that it wraps, stacks of A and B with a place for each adapter: a slot. Its own code, run
once on tensors without data, says which parts of A and B a worker keeps there; see `compiler.py`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rollcast.comm import Manifest, Move, ParamSpec, VerifyError
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.compiler import assemble, record
from rollcast.rollout.landing.plan import LandingPlan, Target
from rollcast.rollout.landing.tape import carry_out
from rollcast.rollout.lora import adapter_id

A, B = ".lora_A.weight", ".lora_B.weight"
STACKS = {"lora_a": "lora_a_stacked", "lora_b": "lora_b_stacked"}
# Slots, one, rows, columns.
DIMS = 4


class AdapterLanding:
    """A `Landing` beside the slots: what has arrived goes into `slot` when all of it has, with zeros around it.

    The base weights are not touched, and a failure on the way leaves every slot as it was.
    """

    def __init__(self, plan: LandingPlan, model: nn.Module) -> None:
        self.plan = plan
        self.slot = 0
        """The one that the next `commit` fills."""
        self._stacks = stacks(model)
        self._rooms = {name: torch.zeros_like(stack[:1]) for name, stack in self._stacks.items()}
        tensors: dict[tuple[str, int | str], torch.Tensor] = {
            ("live", name): room for name, room in self._rooms.items()
        }
        tensors |= {("value", key): value for key, value in enumerate(plan.values)}
        carry_out(tuple(fill.op for fill in plan.fills), tensors)
        self._confirming = False

    def moved(self, model: nn.Module) -> str | None:
        """The first stack of the model, as it is now, that is not the one that was found."""
        now = stacks(model)
        return next((name for name in self._stacks if now.get(name) is not self._stacks[name]), None)

    def live(self, target: str) -> torch.Tensor:
        """See `Landing.live`."""
        return self._rooms[target]

    def staging(self, stage: int, target: str) -> torch.Tensor:
        """See `Landing.staging`. Adapters have no stages."""
        raise AssertionError(f"stage {stage} of {target}")

    def begin(self, *, confirming: bool = False) -> None:
        """See `Landing.begin`."""
        self._confirming = confirming

    def finish(self, stage: int) -> None:
        """See `Landing.finish`. Adapters have no stages."""
        raise AssertionError(f"stage {stage}")

    def commit(self) -> None:
        """See `Landing.commit`."""
        places = [stack[self.slot : self.slot + 1] for stack in self._stacks.values()]
        if not self._confirming:
            torch._foreach_copy_(places, list(self._rooms.values()))
            return
        for (name, room), place in zip(self._rooms.items(), places, strict=True):
            if not torch.equal(flat_bytes(room), flat_bytes(place)):
                raise VerifyError(f"{name} in memory is not what the trainer holds")

    def abandon(self) -> None:
        """See `Landing.abandon`."""


def is_adapter(manifest: Manifest) -> bool:
    """Whether a trainer has sent A and B instead of full weights."""
    return all(spec.name.endswith((A, B)) for spec in manifest.specs)


def register_adapters(model: Any, *, versions: int) -> None:
    """Let vLLM know an adapter of zeros in every slot, for good. Before the first request."""
    manager = model.lora_manager
    for slot in range(versions):
        adapter = manager.create_dummy_lora(adapter_id(slot), 1, getattr(model, "embedding_modules", None))
        manager.add_adapter(adapter)
        manager.pin_adapter(adapter.id)
    assert manager.lora_index_to_id == [adapter_id(slot) for slot in range(versions)]


def stacks(model: Any) -> dict[str, torch.Tensor]:
    """Every stack of A or B, [slots, 1, rows, columns], by vLLM's path of the layer."""
    found: dict[str, torch.Tensor] = {}
    for path, module in _wrapped(model.lora_manager):
        for kind, attribute in STACKS.items():
            for index, stack in enumerate(_each(vars(module)[attribute])):
                found[f"{path}.{kind}.{index}"] = stack
    return found


def compile_adapter(model: Any, manifest: Manifest) -> LandingPlan:
    """The plan of one worker for one slot. The slots are not touched. All workers of an engine may call it at once.

    Raises `LandingError` naming parameters that vLLM has no place for, and what to do.
    """
    manager = model.lora_manager
    pairs = _pairs(manifest, model)
    _check(pairs, manager)
    try:
        with _blank_slot(manager) as targets:
            recording = record(lambda weights: _load(pairs, dict(weights), manager), targets, manifest)
    except LandingError as error:
        # `_load` knows better than the recorder which layer it was.
        raise error.__cause__ or error from None
    plan = assemble(recording, targets, manifest, staged={}, parameters=targets, shared={})
    if plan.stages:
        what = ", ".join(stage.module for stage in plan.stages)
        raise LandingError(
            f"vLLM computes with the adapters of {what}: leave them out of target_modules, or "
            "start the engines with tensor_parallel_size=1"
        )
    _check_sizes(plan, parts=max(getattr(module, "tp_size", 1) for _, module in _wrapped(manager)))
    return plan


def _wrapped(manager: Any) -> Iterator[tuple[str, Any]]:
    """The layers that A and B can be sent for. (Experts and embeddings keep theirs in other forms.)"""
    for path, module in manager.modules.items():
        its = [stack for attribute in STACKS.values() for stack in _each(vars(module).get(attribute, ()))]
        if its and "w13_lora_a_stacked" not in vars(module) and all(stack.ndim == DIMS for stack in its):
            yield path, module


def _each(stacked: Any) -> tuple[torch.Tensor, ...]:
    return (stacked,) if isinstance(stacked, torch.Tensor) else tuple(stacked)


@contextmanager
def _blank_slot(manager: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, every stack has one slot, which has no data. Yields them by name."""
    targets: dict[str, torch.Tensor] = {}
    kept: list[tuple[Any, str, Any]] = []
    try:
        for path, module in _wrapped(manager):
            for kind, attribute in STACKS.items():
                its = vars(module)[attribute]
                kept.append((module, attribute, its))
                blank = tuple(map(_blank, _each(its)))
                targets |= {f"{path}.{kind}.{index}": stack for index, stack in enumerate(blank)}
                vars(module)[attribute] = blank[0] if isinstance(its, torch.Tensor) else blank
        yield targets
    finally:
        for module, attribute, its in kept:
            vars(module)[attribute] = its


def _blank(stack: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, *stack.shape[1:], dtype=stack.dtype, device="meta")


def _pairs(manifest: Manifest, model: Any) -> dict[str, tuple[ParamSpec, ParamSpec]]:
    """A and B of each layer, by vLLM's path of it."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for without_fusing in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, without_fusing):
            mapper = getattr(mapper, without_fusing)()
            break
    found: dict[str, dict[bool, ParamSpec]] = {}
    for spec in manifest.specs:
        path, is_a = parse_fine_tuned_lora_name(spec.name, mapper)
        found.setdefault(path, {})[is_a] = spec
    for path, its in found.items():
        if len(its) != 2:
            raise LandingError(f"{path} needs A and B: got {', '.join(map(str, its.values()))} alone")
    return {path: (its[True], its[False]) for path, its in found.items()}


def _check(pairs: Mapping[str, tuple[ParamSpec, ParamSpec]], manager: Any) -> None:
    """Raise `LandingError` for layers and ranks that vLLM was not started for."""
    known: set[str] = set()
    for path, _ in _wrapped(manager):
        known.update(manager.packed_modules.get(path, (path,)))
    most = manager.lora_config.max_lora_rank
    for path, (a, b) in pairs.items():
        if path not in known:
            kinds = ", ".join(sorted({its.rpartition(".")[2] for its in known}))
            raise LandingError(f"vLLM has no LoRA for {a}: target_modules may name {kinds}")
        if a.shape[0] != b.shape[1]:
            raise LandingError(f"{a} and {b} have different ranks")
        if a.shape[0] > most:
            raise LandingError(
                f"{a} has rank {a.shape[0]}, and the engines take at most {most}: set lora_rank={a.shape[0]}"
            )


def _load(pairs: Mapping[str, tuple[ParamSpec, ParamSpec]], tensors: dict[str, torch.Tensor], manager: Any) -> None:
    """What vLLM does when an adapter is put into its first slot."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    layers = {
        # As large an alpha as the rank: the trainer has multiplied B by the scaling.
        path: LoRALayerWeights(path, a.shape[0], a.shape[0], tensors[a.name], tensors[b.name])
        for path, (a, b) in pairs.items()
    }
    adapter = LoRAModel(adapter_id(0), 1, layers)
    manager._create_merged_loras_inplace(adapter)
    for path, module in _wrapped(manager):
        layer: Any = adapter.get_lora(path)
        if layer is None:
            module.reset_lora(0)
            continue
        try:
            module.set_lora(0, layer.lora_a, layer.lora_b)
        except RuntimeError as error:
            its = [pairs[part] for part in manager.packed_modules.get(path, (path,)) if part in pairs]
            shown = ", ".join(f"{a} and {b}" for a, b in its)
            raise LandingError(f"{shown} do not fit the engines' {path}: {error}") from error


def _check_sizes(plan: LandingPlan, *, parts: int) -> None:
    """vLLM takes an A or B that is too small, or too large for `parts` workers, without a word."""
    targets: dict[str, Target] = {target.name: target for target in plan.targets}
    for move in plan.moves:
        dim = 1 if move.target.rpartition(".")[0].endswith(".lora_a") else 0
        wanted = targets[move.target].whole.shape[2 + dim]
        if not _fits(move, plan.manifest.specs[move.param], dim, wanted, parts):
            spec = plan.manifest.specs[move.param]
            raise LandingError(f"{spec} is of another size than {move.target} in the engines, {wanted}")


def _fits(move: Move, spec: ParamSpec, dim: int, wanted: int, parts: int) -> bool:
    return move.region.shape[dim] == wanted and spec.shape[dim] <= wanted * parts
