"""vLLM's model of a folder without an engine: one process stands in for any tensor-parallel rank.

(Not vLLM's "offline inference".) For printing a landing plan, and for comparing landings with fresh loads. One
process works on one engine's models at a time: vLLM's distributed state is global.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from rollcast.comm import Manifest, ParamSpec, checkpoint_names
from rollcast.rollout.errors import PreflightError
from rollcast.rollout.landing.derived import watch_building
from rollcast.rollout.landing.vllm_reload import move_to_meta

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Specs = list[tuple[str, tuple[int, ...], torch.dtype]]


class OfflineModels:
    """Builds vLLM's models, as the tensor-parallel rank that is asked for.

    models = OfflineModels(any_model_folder)
    model = models.build(folder, rank=1, size=2)           # on meta, nothing loaded
    with models.as_rank(folder, rank=1, size=2): ...       # what compiles a landing plan for it

    Further settings are vLLM's, such as `enable_expert_parallel=True`.
    """

    def __init__(self, folder: str | Path, **settings: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

        self._settings = settings
        watch_building()
        rendezvous = Path(tempfile.mkdtemp(), "rendezvous")
        with set_current_vllm_config(self.config(folder, size=1)):
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)

    def config(self, folder: str | Path, *, size: int) -> Any:
        """Return vLLM's configuration of the model for `size` tensor-parallel workers."""
        from vllm import EngineArgs

        arguments: dict[str, Any] = {"enforce_eager": True, "skip_tokenizer_init": True}
        arguments |= self._settings
        config = EngineArgs(model=str(folder), **arguments).create_engine_config()
        # Afterwards: vLLM would look for as many devices.
        config.parallel_config.tensor_parallel_size = size
        config.model_config.verify_with_parallel_config(config.parallel_config)
        return config

    def build(self, folder: str | Path, *, rank: int = 0, size: int = 1) -> Any:
        """Return the model before anything is loaded: parameters on meta, everything else on the host.

        Raises `PreflightError` if vLLM cannot split it among `size` workers.
        """
        # On the host, where untouched memory takes none: on meta, models that compute tables would fail.
        with (
            self.as_rank(folder, rank=rank, size=size) as config,
            _default_dtype(config.model_config.dtype),
            torch.device("cpu"),
        ):
            model = _initialize(config, f"{folder} as worker {rank} of {size}")
        move_to_meta(model)
        return model

    @contextmanager
    def as_rank(self, folder: str | Path, *, rank: int, size: int) -> Iterator[Any]:
        """Make loaders and processing take this process for the rank. Yields vLLM's configuration."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed import parallel_state

        config = self.config(folder, size=size)
        state: Any = parallel_state
        groups = [group for group in (state._TP, getattr(state, "_EP", None)) if group is not None]
        saved = [(group, group.rank_in_group, group.world_size, group.ranks) for group in groups]
        try:
            for group in groups:
                group.rank_in_group, group.world_size, group.ranks = rank, size, list(range(size))
            with set_current_vllm_config(config):
                yield config
        finally:
            for group, *before in saved:
                group.rank_in_group, group.world_size, group.ranks = before


def missing_architecture(folder: str | Path) -> dict[str, Any]:
    """Return vLLM's setting for a config.json that names no architecture: vLLM would find no language model in it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.architectures:
        return {}
    return {"hf_overrides": {"architectures": [_model_kind(config)._model_mapping[type(config)].__name__]}}


def checkpoint_manifest(folder: str | Path) -> Manifest:
    """Return what a trainer of this folder's model would send: from its weight files, or from config.json alone.

    Raises `PreflightError` for files that cannot be read.
    """
    files = _weight_files(Path(folder))
    specs = _specs_of_files(files) if files else _specs_of_config(folder)
    return Manifest(tuple(ParamSpec(name, shape, dtype) for name, shape, dtype in specs))


def _initialize(config: Any, what: str) -> Any:
    from vllm.model_executor.model_loader.utils import initialize_model

    try:
        return initialize_model(vllm_config=config)
    except Exception as error:
        why = str(error) or f"{type(error).__name__} without a message"
        raise PreflightError(f"vLLM cannot build {what}: {why}") from error


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of the index, if there is one: a folder may hold the weights twice."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _specs_of_files(files: list[Path]) -> Specs:
    specs: Specs = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no mapping)
                    part = tensors.get_slice(name)
                    specs.append((name, tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()]))
        except (OSError, SafetensorError) as error:
            raise PreflightError(f"{file} cannot be read: {error}") from error
    return specs


def _specs_of_config(folder: str | Path) -> Specs:
    if not Path(folder, "config.json").is_file():
        raise PreflightError(f"{folder} has no config.json: pass the folder of a Hugging Face model")
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = _model_kind(config).from_config(config)
    dtype: Any = config.dtype or torch.float32
    # Tied weights are one object, of which checkpoints have one.
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    state = {name: tensor.detach() for name, tensor in reversed(tensors.values())}
    conversion = checkpoint_names(model)
    return [
        (name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in (conversion(state) if conversion else state).items()
    ]


def _model_kind(config: Any) -> Any:
    """Return the transformers class that makes a model of what config.json names."""
    auto = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    auto = (*auto, transformers.AutoModelForSequenceClassification, transformers.AutoModel)
    named = (config.architectures or [""])[0]
    made = {kind: mapping.get(type(config), None) for kind in auto if (mapping := kind._model_mapping) is not None}
    return next((kind for kind, model in made.items() if getattr(model, "__name__", None) == named), None) or next(
        kind for kind, model in made.items() if model is not None
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
