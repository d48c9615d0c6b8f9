"""Gives parameters of a small model odd loaders, lands weights, and compares with what vLLM loads by itself.

odd_loaders.py FOLDER      (a plain process; prints one JSON object a line)

No engine: vLLM's model, built and loaded by vLLM, is what an engine's worker has.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

import torch
from architecture_matrix import different, prepare, save, snapshot
from architectures import build, perturb

from rollcast.comm import Manifest, ParamSpec, WeightSource
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.offline import OfflineModels
from rollcast.rollout.landing.vllm_reload import live_tensors

Step = Callable[[torch.Tensor, torch.Tensor], Any]
# One that is copied into its place, and one that vLLM packs on the CPU.
PLAIN = "model.layers.0.input_layernorm.weight"
STAGED = "model.layers.1.self_attn.o_proj.weight"
DTYPE = torch.float32
stash: list[torch.Tensor] = []


def reverse(weight: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(weight)).flip(0)


def joined(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    """Halves of this layer's weight and of the same in the layer before."""
    stash.append(weight)
    half = len(weight) // 2
    parameter.data.copy_(torch.cat([stash[0][:half], weight[half:]]))
    stash.clear()


def computed_in_place(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    parameter.data.copy_(weight)
    parameter.data.copy_(-torch.exp(parameter.data.float()))


LANDS: dict[str, Step] = {
    "identity": lambda p, w: p.data.copy_(w),
    "plus one": lambda p, w: p.data.copy_(w + 1),
    "cast": lambda p, w: p.data.copy_(w.to(torch.bfloat16)),
    "transposed": lambda p, w: p.data.t().copy_(w.t().contiguous() * 2),
    "permuted": lambda p, w: p.data.copy_(w[reverse(w)]),
    "joined": joined,
    "edited source": lambda p, w: p.data.copy_(w.mul_(3)),
    "where": lambda p, w: p.data.copy_(torch.where(w > 0, w, 0.5)),
    "computed in place": computed_in_place,
}
REFUSED: dict[str, Step] = {
    "item": lambda p, w: p.data.copy_(w * w.max().item()),
    "numpy": lambda p, w: p.data.copy_(torch.from_numpy(w.numpy())),
    "mask": lambda p, w: p.data.copy_(w[w > 0].sum()),
    "rebound": lambda p, w: setattr(p, "data", w),
    "turned": lambda p, w: (p.data.copy_(w), setattr(p, "data", p.data.unsqueeze(0))),
    "dropped": lambda p, w: None,
    "stashed": lambda p, w: (p.data.copy_(w), setattr(p, "full", w)),
    "written twice": lambda p, w: (p.data.copy_(w), p.data.copy_(w)),
    "average": lambda p, w: p.data.mul_(0.5).add_(w),
}
MISTAKES: dict[str, Callable[[ParamSpec], Sequence[ParamSpec]]] = {
    "missing": lambda spec: [],
    "extra": lambda spec: [spec, ParamSpec("model.odd.weight", spec.shape, spec.dtype)],
    "duplicated": lambda spec: [spec, spec],
    "another shape": lambda spec: [ParamSpec(spec.name, (*spec.shape[:-1], 7), spec.dtype)],
    "another kind": lambda spec: [ParamSpec(spec.name, spec.shape, torch.int64)],
}


def main() -> None:
    folder = Path(sys.argv[1])
    models = prepare(folder / "first")
    model = build("qwen3", seed=0)
    base = save(model, folder / "base", False)
    perturb(model)
    weights = save(model, folder / "perturbed", False)
    live, manifest = models.load(folder / "base"), WeightSource(weights).manifest
    with models.as_rank(folder / "base", rank=0, size=1), torch.no_grad():
        for name in (PLAIN, STAGED):
            for case, step in REFUSED.items():
                with odd(live, name, step):
                    report(case, name, refused(live, manifest, name))
            for case, change in MISTAKES.items():
                report(case, name, refused(live, manifest, name, change))
        report("reload", "", after_reload(models, live, manifest, folder / "base"))
    for case, step in LANDS.items():
        with odd(live, PLAIN, step), odd(live, STAGED, step):
            expected = snapshot(models.load(folder / "perturbed"))
            with models.as_rank(folder / "base", rank=0, size=1), torch.no_grad():
                report(case, "", lands(live, manifest, [base, weights], expected))


def report(case: str, name: str, row: dict[str, Any]) -> None:
    print(json.dumps({"case": case, "parameter": name} | row), flush=True)


@contextmanager
def odd(live: Any, name: str, step: Step) -> Iterator[None]:
    """Inside, the parameter of every model of the class has this loader."""
    inner = type(live).load_weights

    def load_weights(self: Any, weights: Any) -> Any:
        parameter = self.get_parameter(name)
        parameter.weight_loader = step
        if self is live:
            # A view that loading leaves behind: compiling must not leave one without data.
            self.odd_view = parameter.data
        return inner(self, weights)

    type(live).load_weights = load_weights
    try:
        yield
    finally:
        type(live).load_weights = inner
        stash.clear()


def lands(live: Any, manifest: Manifest, rounds: Sequence[Any], expected: Any) -> dict[str, Any]:
    with watched(live) as row:
        plan = compile_landing(live, manifest, dtype=DTYPE)
        again = compile_landing(live, manifest, dtype=DTYPE)
    landing = LiveLanding(plan, live, dtype=DTYPE)
    for weights in rounds:
        sent = {name: tensor.clone() for name, tensor in weights.items()}
        landing.bind(list(weights.values())).apply()
        assert not different(sent, weights), "the trainer's weights are changed"
    facts = {"problems": plan.check(), "different": different(expected, snapshot(live)), "moved": landing.moved(live)}
    return row | facts | {"digests": len({plan.digest, again.digest})}


def refused(live: Any, manifest: Manifest, name: str, change: Any = lambda spec: [spec]) -> dict[str, Any]:
    with watched(live) as row:
        try:
            specs = (changed for spec in manifest.specs for changed in (change(spec) if spec.name == name else [spec]))
            problems = compile_landing(live, Manifest(tuple(specs)), dtype=DTYPE).check()
        except (ValueError, RuntimeError) as error:
            problems = [str(error)]
        except Exception as error:
            problems = [str(error)] if type(error).__name__ == "LandingError" else [repr(error)]
    return row | {"problems": problems}


@contextmanager
def watched(live: Any) -> Iterator[dict[str, Any]]:
    """Notes what is no longer as it was: values, objects, addresses."""
    row: dict[str, Any] = {}
    values, places = snapshot(live), addresses(live)
    yield row
    row["disturbed"] = different(values, snapshot(live))
    row["replaced"] = [name for name, place in addresses(live).items() if places.get(name) != place]


def addresses(live: Any) -> dict[str, tuple[int, int]]:
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in live_tensors(live).items()}


def after_reload(models: OfflineModels, live: Any, manifest: Manifest, folder: Path) -> dict[str, Any]:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    before = compile_landing(live, manifest, dtype=DTYPE).digest
    initialize_layerwise_reload(live)
    live.load_weights(iter([(spec.name, torch.ones(spec.shape)) for spec in manifest.specs]))
    finalize_layerwise_reload(live, models.config(folder, size=1).model_config)
    return {"digests": len({before, compile_landing(live, manifest, dtype=DTYPE).digest})}


if __name__ == "__main__":
    main()
