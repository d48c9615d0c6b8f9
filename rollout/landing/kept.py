"""Leave out of a landing plan what the engine keeps as it has it (worker)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rollcast.comm import Kept, Manifest, Move, Region
from rollcast.rollout.landing.plan import LandingPlan


def leave_out(plan: LandingPlan, sent: Manifest, kept: Kept) -> LandingPlan:
    """Return the plan for `sent` alone; `plan` is for that and the parameters of `kept.manifest` behind it.

    A module that vLLM processes as a whole can be kept only as a whole: else the plan has a refusal that names it.
    """
    if not kept.manifest.specs and not kept.patterns:
        return plan
    first = len(sent.specs)
    # In the dtypes of the wire.
    landed = Manifest(plan.manifest.specs[:first])
    gone = [number for number in range(len(plan.stages)) if _is_kept_stage(plan, number, first, kept)]
    regions = [*_kept_regions(plan, first, gone), *_absent(plan, gone, kept)]
    touched = {name for name, _ in regions}
    numbers = {old: new for new, old in enumerate(n for n in range(len(plan.stages)) if n not in gone)} | {None: None}
    # Their constants were set when the engine loaded them.
    set_before = [fill for fill in plan.fills if fill.target.key in touched]
    regions += [(str(fill.target.key), fill.target.region) for fill in set_before]
    return replace(
        plan,
        manifest=landed,
        moves=tuple(
            replace(move, stage=numbers[move.stage])
            for move in plan.moves
            if move.param < first and move.stage in numbers
        ),
        fills=tuple(
            replace(fill, stage=numbers[fill.stage])
            for fill in plan.fills
            if fill.target.key not in touched and fill.stage in numbers
        ),
        stages=tuple(stage for number, stage in enumerate(plan.stages) if number in numbers),
        kept=tuple(regions),
        refused=(*plan.refused, *_mixed(plan, first)),
    )


def _is_kept_stage(plan: LandingPlan, number: int, first: int, kept: Kept) -> bool:
    """Return whether nothing of a module that is processed as a whole is sent."""
    params = [move.param for move in plan.moves if move.stage == number and move.source.numel]
    if params:
        return min(params) >= first
    stage = plan.stages[number]
    # A tied module follows the one that it shares its memory with.
    return kept.matches(stage.module) and not stage.shares


def _kept_regions(plan: LandingPlan, first: int, gone: Sequence[int]) -> Iterator[tuple[str, Region]]:
    """Yield the regions that parameters of the trainer would be written to, had they been sent."""
    modules = {plan.stages[number].module for number in gone}
    for target in plan.targets:
        if target.name.rpartition(".")[0] in modules:
            yield target.name, target.whole
    for move in plan.moves:
        if move.param >= first and move.stage is None:
            yield move.target, move.region


def _absent(plan: LandingPlan, gone: Sequence[int], kept: Kept) -> Iterator[tuple[str, Region]]:
    """Yield tensors that the engine keeps by their own names, where nothing is written to them."""
    written = {move.target for move in plan.moves}
    written |= {str(op.target.key) for stage in plan.stages for op in stage.tape if op.target is not None}
    modules = {plan.stages[number].module for number in gone}
    for target in plan.targets:
        if target.name not in written and target.name.rpartition(".")[0] not in modules and kept.matches(target.name):
            yield target.name, target.whole


def _mixed(plan: LandingPlan, first: int) -> Iterator[str]:
    """Describe modules that are processed as a whole, and of which a part alone is sent."""
    for number, stage in enumerate(plan.stages):
        moves = [move for move in plan.moves if move.stage == number and move.source.numel]
        ours, theirs = _names(plan, moves, 0, first), _names(plan, moves, first, len(plan.manifest.specs))
        if ours and theirs:
            yield (
                f"{stage.module}: vLLM processes this module as a whole, but {', '.join(theirs)} is kept and "
                f"{', '.join(ours)} is sent: keep both or send both"
            )


def _names(plan: LandingPlan, moves: Sequence[Move], start: int, stop: int) -> list[str]:
    return [*dict.fromkeys(plan.manifest.specs[move.param].name for move in moves if start <= move.param < stop)]
