"""Where a LoRA adapter lands in vLLM, and how it gets into a slot that requests are served from (worker).

vLLM keeps, for each layer that it wraps, stacked A and B matrices with one entry for each adapter: a slot. Its own
code, run once on tensors without data, shows which parts of A and B a worker keeps there; see `compiler.py`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rollcast.comm import Manifest, ParamSpec, VerifyError
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.compiler import assemble, record
from rollcast.rollout.landing.dtypes import landed_manifest
from rollcast.rollout.landing.plan import LandingPlan, Target
from rollcast.rollout.landing.tape import replay
from rollcast.rollout.lora import adapter_id

A, B = ".lora_A.weight", ".lora_B.weight"
STACKS = {"lora_a": "lora_a_stacked", "lora_b": "lora_b_stacked"}
# Dimensions of a stack: slots, one, rows, columns.
STACK_DIMS = 4


class AdapterLanding:
    """A `Landing` into buffers beside the slots, which `commit` copies into `slot`, padded with zeros.

    The base weights are not touched, and a failure before `commit` leaves every slot as it was.
    """

    def __init__(self, plan: LandingPlan, model: nn.Module) -> None:
        self.plan = plan
        self.slot = 0
        """The slot that the next `commit` fills."""
        self._stacks = stacks(model)
        self._buffers = {name: torch.zeros_like(stack[:1]) for name, stack in self._stacks.items()}
        tensors: dict[tuple[str, int | str], torch.Tensor] = {
            ("live", name): buffer for name, buffer in self._buffers.items()
        }
        tensors |= {("value", key): value for key, value in enumerate(plan.values)}
        replay(tuple(fill.op for fill in plan.fills), tensors)
        self._verifying = False

    def moved(self, model: nn.Module) -> str | None:
        """Return the name of a stack that was replaced since this was made; None if there is none.

        `model` is the worker's model as it is now.
        """
        now = stacks(model)
        return next((name for name in self._stacks if now.get(name) is not self._stacks[name]), None)

    def live(self, target: str) -> torch.Tensor:
        """See `Landing.live`."""
        return self._buffers[target]

    def staging(self, stage: int, target: str) -> torch.Tensor:
        """See `Landing.staging`. Adapters have no stages."""
        raise AssertionError(f"stage {stage} of {target}")

    def begin(self, *, verifying: bool = False) -> None:
        """See `Landing.begin`."""
        self._verifying = verifying

    def finish(self, stage: int) -> None:
        """See `Landing.finish`. Adapters have no stages."""
        raise AssertionError(f"stage {stage}")

    def commit(self) -> None:
        """See `Landing.commit`."""
        entries = [stack[self.slot : self.slot + 1] for stack in self._stacks.values()]
        if not self._verifying:
            torch._foreach_copy_(entries, list(self._buffers.values()))
            return
        for (name, buffer), entry in zip(self._buffers.items(), entries, strict=True):
            if not torch.equal(flat_bytes(buffer), flat_bytes(entry)):
                raise VerifyError(f"{name} in memory is not what the trainer holds")

    def abort(self) -> None:
        """See `Landing.abort`."""


def is_lora_manifest(manifest: Manifest) -> bool:
    """Return whether the trainer sends A and B matrices instead of full weights."""
    return all(spec.name.endswith((A, B)) for spec in manifest.specs)


def register_adapters(model: Any, *, versions: int) -> None:
    """Register an adapter of zeros in each of `versions` slots, pinned. Call before the first request."""
    manager = model.lora_manager
    for slot in range(versions):
        adapter = manager.create_dummy_lora(adapter_id(slot), 1, getattr(model, "embedding_modules", None))
        manager.add_adapter(adapter)
        manager.pin_adapter(adapter.id)
    assert manager.lora_index_to_id == [adapter_id(slot) for slot in range(versions)]


def stacks(model: Any) -> dict[str, torch.Tensor]:
    """Return every stack of A or B, [slots, 1, rows, columns], by vLLM's path of the layer, kind and index."""
    by_name: dict[str, torch.Tensor] = {}
    for path, module in _lora_layers(model.lora_manager):
        for kind, attribute in STACKS.items():
            for index, stack in enumerate(_as_tuple(vars(module)[attribute])):
                by_name[f"{path}.{kind}.{index}"] = stack
    return by_name


def compile_adapter(model: Any, manifest: Manifest) -> LandingPlan:
    """Return the plan of one worker for one slot. The slots are not touched. Not collective.

    `manifest` states the trainer's own dtypes; that of the plan has those of the wire. Raises `LandingError` with the
    parameters that vLLM has no slot for, and what to do.
    """
    manager = model.lora_manager
    pairs = _pairs(manifest, model)
    _check(pairs, manager)
    # vLLM gives all stacks one dtype.
    dtypes = {stack.dtype for stack in stacks(model).values()}
    manifest = landed_manifest(manifest, dict.fromkeys(range(len(manifest.specs)), dtypes))
    try:
        with _one_meta_slot(manager) as targets:
            recording = record(lambda weights: _load(pairs, dict(weights), manager), targets, manifest)
    except LandingError as error:
        # `_load` names the layers, the recorder only the parameter that came last.
        raise error.__cause__ or error from None
    plan = assemble(recording, targets, manifest, staged={}, parameters=targets, shared={})
    if plan.stages:
        what = ", ".join(stage.module for stage in plan.stages)
        raise LandingError(
            f"vLLM computes with the adapters of {what}: leave them out of target_modules, or "
            "start the engines with tensor_parallel_size=1"
        )
    _check_sizes(plan, parts=max(getattr(module, "tp_size", 1) for _, module in _lora_layers(manager)))
    return plan


def _lora_layers(manager: Any) -> Iterator[tuple[str, Any]]:
    """Yield path and module of the layers that A and B can be sent for.

    Experts and embeddings keep theirs in other forms.
    """
    for path, module in manager.modules.items():
        stacks = [stack for attribute in STACKS.values() for stack in _as_tuple(vars(module).get(attribute, ()))]
        is_moe = "w13_lora_a_stacked" in vars(module)
        if stacks and not is_moe and all(stack.ndim == STACK_DIMS for stack in stacks):
            yield path, module


def _as_tuple(stacked: Any) -> tuple[torch.Tensor, ...]:
    return (stacked,) if isinstance(stacked, torch.Tensor) else tuple(stacked)


@contextmanager
def _one_meta_slot(manager: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Give every layer stacks of one slot, on meta, and yield these by name; afterwards its own are back."""
    targets: dict[str, torch.Tensor] = {}
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for path, module in _lora_layers(manager):
            for kind, attribute in STACKS.items():
                stacked = vars(module)[attribute]
                replaced.append((module, attribute, stacked))
                metas = tuple(map(_meta_slot, _as_tuple(stacked)))
                targets |= {f"{path}.{kind}.{index}": stack for index, stack in enumerate(metas)}
                vars(module)[attribute] = metas[0] if isinstance(stacked, torch.Tensor) else metas
        yield targets
    finally:
        for module, attribute, stacked in replaced:
            vars(module)[attribute] = stacked


def _meta_slot(stack: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, *stack.shape[1:], dtype=stack.dtype, device="meta")


def _pairs(manifest: Manifest, model: Any) -> dict[str, tuple[ParamSpec, ParamSpec]]:
    """Return A and B of each layer, by vLLM's path of the layer."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for without_fusing in ("get_rename_mapper", "get_unstacked_mapper"):
        if hasattr(mapper, without_fusing):
            mapper = getattr(mapper, without_fusing)()
            break
    pairs: dict[str, dict[bool, ParamSpec]] = {}
    for spec in manifest.specs:
        path, is_a = parse_fine_tuned_lora_name(spec.name, mapper)
        pairs.setdefault(path, {})[is_a] = spec
    for path, pair in pairs.items():
        if len(pair) != 2:
            raise LandingError(f"{path} needs A and B: got {', '.join(map(str, pair.values()))} alone")
    return {path: (pair[True], pair[False]) for path, pair in pairs.items()}


def _check(pairs: Mapping[str, tuple[ParamSpec, ParamSpec]], manager: Any) -> None:
    """Raise `LandingError` for layers and ranks that vLLM was not started for."""
    known: set[str] = set()
    for path, _ in _lora_layers(manager):
        known.update(manager.packed_modules.get(path, (path,)))
    max_rank = manager.lora_config.max_lora_rank
    for path, (a, b) in pairs.items():
        if path not in known:
            kinds = ", ".join(sorted({layer.rpartition(".")[2] for layer in known}))
            raise LandingError(f"vLLM has no LoRA for {a}: target_modules may name {kinds}")
        if a.shape[0] != b.shape[1]:
            raise LandingError(f"{a} and {b} have different ranks")
        if a.shape[0] > max_rank:
            raise LandingError(
                f"{a} has rank {a.shape[0]}, and the engines take at most {max_rank}: set lora_rank={a.shape[0]}"
            )


def _load(pairs: Mapping[str, tuple[ParamSpec, ParamSpec]], tensors: dict[str, torch.Tensor], manager: Any) -> None:
    """Do what vLLM does when it puts an adapter into its first slot."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    layers = {
        # As large an alpha as the rank: the trainer has multiplied B by the scaling.
        path: LoRALayerWeights(path, a.shape[0], a.shape[0], tensors[a.name], tensors[b.name])
        for path, (a, b) in pairs.items()
    }
    adapter = LoRAModel(adapter_id(0), 1, layers)
    manager._create_merged_loras_inplace(adapter)
    for path, module in _lora_layers(manager):
        layer: Any = adapter.get_lora(path)
        if layer is None:
            module.reset_lora(0)
            continue
        try:
            module.set_lora(0, layer.lora_a, layer.lora_b)
        except RuntimeError as error:
            parts = [pairs[part] for part in manager.packed_modules.get(path, (path,)) if part in pairs]
            names = ", ".join(f"{a} and {b}" for a, b in parts)
            raise LandingError(f"{names} do not fit the engines' {path}: {error}") from error


def _check_sizes(plan: LandingPlan, *, parts: int) -> None:
    """Raise `LandingError` for an A or B that is too small, or too large for `parts` workers.

    vLLM takes them silently.
    """
    targets: dict[str, Target] = {target.name: target for target in plan.targets}
    for move in plan.moves:
        dim = 1 if move.target.rpartition(".")[0].endswith(".lora_a") else 0
        size = targets[move.target].whole.shape[2 + dim]
        spec = plan.manifest.specs[move.param]
        if move.region.shape[dim] != size or spec.shape[dim] > size * parts:
            raise LandingError(f"{spec} is of another size than {move.target} in the engines, {size}")
