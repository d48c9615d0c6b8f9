"""Gives parameters of a small model odd loaders, lands weights, and compares with what vLLM loads by itself.

Runs in landing_server.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from architecture_matrix import different, snapshot
from architectures import build, perturb, save
from loaded_models import LoadedModels
from local_transfer import LocalTransfer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollcast.comm import Manifest, ParamSpec, WeightSource
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.vllm_reload import live_tensors

Step = Callable[[torch.Tensor, torch.Tensor], Any]
Change = Callable[[ParamSpec], Sequence[ParamSpec]]
# A parameter that is copied into its place, and one that vLLM packs on CPU.
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
MISTAKES: dict[str, Change] = {
    "missing": lambda spec: [],
    "extra": lambda spec: [spec, ParamSpec("model.odd.weight", spec.shape, spec.dtype)],
    "duplicated": lambda spec: [spec, spec],
    "another shape": lambda spec: [ParamSpec(spec.name, (*spec.shape[:-1], 7), spec.dtype)],
    "another kind": lambda spec: [ParamSpec(spec.name, spec.shape, torch.int64)],
}


class OddLoaders:
    """One live model, whose parameters get odd loaders case by case."""

    def __init__(self, models: LoadedModels, folder: Path) -> None:
        self._models = models
        self._folder = folder
        model = build("qwen3", seed=0)
        base = save("qwen3", model, folder / "base")
        perturb(model)
        weights = save("qwen3", model, folder / "perturbed")
        self._rounds = [base, weights]
        self._manifest = WeightSource(weights).manifest
        self._live = models.load(folder / "base")

    def lands(self, case: str) -> dict[str, Any]:
        """Land weights by a loader of `LANDS`, and compare with vLLM's own load by it."""
        step = LANDS[case]
        with self._odd(PLAIN, step), self._odd(STAGED, step):
            expected = snapshot(self._models.load(self._folder / "perturbed"))
            with self._as_rank():
                return self._land(expected)

    def refused(self, case: str, parameter: str) -> dict[str, Any]:
        """Compile with a loader of `REFUSED` or a manifest of `MISTAKES`, and return the problems."""
        with self._as_rank():
            if case in MISTAKES:
                return self._problems(parameter, MISTAKES[case])
            with self._odd(parameter, REFUSED[case]):
                return self._problems(parameter, lambda spec: [spec])

    def reloaded(self) -> dict[str, Any]:
        """Return how many different plans there are before and after vLLM has reloaded the model."""
        with self._as_rank():
            before = self._compile().digest
            initialize_layerwise_reload(self._live)
            self._live.load_weights(iter([(spec.name, torch.ones(spec.shape)) for spec in self._manifest.specs]))
            config = self._models.config(self._folder / "base", size=1).model_config
            finalize_layerwise_reload(self._live, config)
            return {"digests": len({before, self._compile().digest})}

    @contextmanager
    def _as_rank(self) -> Iterator[None]:
        with self._models.as_rank(self._folder / "base", rank=0, size=1), torch.no_grad():
            yield

    @contextmanager
    def _odd(self, name: str, step: Step) -> Iterator[None]:
        """Give the parameter this loader, in every model of the class."""
        live, model_class = self._live, type(self._live)
        inner = model_class.load_weights

        def load_weights(model: Any, weights: Any) -> Any:
            parameter = model.get_parameter(name)
            parameter.weight_loader = step
            if model is live:
                # A view that loading leaves behind: compiling must not leave one without data.
                model.odd_view = parameter.data
            return inner(model, weights)

        model_class.load_weights = load_weights
        try:
            yield
        finally:
            model_class.load_weights = inner
            stash.clear()

    def _compile(self, manifest: Manifest | None = None) -> Any:
        return compile_landing(self._live, manifest or self._manifest, dtype=DTYPE)

    def _land(self, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
        with self._watched() as row:
            plan, again = self._compile(), self._compile()
        landing = LiveLanding(plan, self._live, dtype=DTYPE)
        for weights in self._rounds:
            sent = {name: tensor.clone() for name, tensor in weights.items()}
            LocalTransfer(landing, list(weights.values())).apply()
            assert not different(sent, weights), "the trainer's weights are changed"
        facts = {"problems": plan.check(), "different": different(expected, snapshot(self._live))}
        return row | facts | {"moved": landing.moved(self._live), "digests": len({plan.digest, again.digest})}

    def _problems(self, name: str, change: Change) -> dict[str, Any]:
        with self._watched() as row:
            try:
                changed = [change(spec) if spec.name == name else [spec] for spec in self._manifest.specs]
                problems = self._compile(Manifest(tuple(chain.from_iterable(changed)))).check()
            except (LandingError, ValueError) as error:
                problems = [str(error)]
        return row | {"problems": problems}

    @contextmanager
    def _watched(self) -> Iterator[dict[str, Any]]:
        """Fill the row on exit with what is no longer as it was: values; objects and addresses."""
        row: dict[str, Any] = {}
        values, addresses = snapshot(self._live), self._addresses()
        yield row
        row["disturbed"] = different(values, snapshot(self._live))
        row["replaced"] = [name for name, place in self._addresses().items() if addresses.get(name) != place]

    def _addresses(self) -> dict[str, tuple[int, int]]:
        return {name: (id(tensor), tensor.data_ptr()) for name, tensor in live_tensors(self._live).items()}
