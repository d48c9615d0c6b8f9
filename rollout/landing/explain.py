"""Why vLLM's loader does not take a parameter, in words that say what to do (worker)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rollcast.comm import ParamSpec
from rollcast.comm.device.storage import storage_id

# Of vLLM's own text: some of its messages list every name of a model.
MAX_CHARACTERS = 240
UNKNOWN_NAME = "no module or parameter named"


def explain(error: Exception, spec: ParamSpec | None, targets: Mapping[str, torch.Tensor]) -> str:
    """Return what was wrong with a parameter, with the engine's side of it. `targets` are what the loader may write."""
    text = _shortened(str(error)) or _failed_check(error)
    if spec is None:
        return text
    if not spec.dtype.is_floating_point:
        return (
            f"{text} (it is {_name(spec.dtype)}: packed or quantised weights must be dequantised before they are sent)"
        )
    if UNKNOWN_NAME in text:
        return (
            f"{text} (is the model inside another module? Pass the model itself to job.broadcaster(), or names= for "
            "names that are not the checkpoint's)"
        )
    frames = [*_locals_of(error)]
    vocabulary = next((rows for each in frames if (rows := _vocabulary(each)) is not None), None)
    if vocabulary is not None and spec.shape and spec.shape[0] != vocabulary:
        return (
            f"the trainer's vocabulary has {spec.shape[0]} rows, the engine's {vocabulary}: start the engines from a "
            "folder that was saved after resize_token_embeddings()"
        )
    names = {storage_id(tensor): name for name, tensor in targets.items()}
    for each in reversed(frames):
        for value in each.values():
            if isinstance(value, torch.Tensor) and storage_id(value) in names:
                return f"{text} (the engine's {names[storage_id(value)]} is {list(value.shape)} {_name(value.dtype)})"
    return text


def _locals_of(error: Exception) -> Iterator[dict[str, Any]]:
    """Yield the local variables of the functions that the error has passed through, outermost first."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_locals
        trace = trace.tb_next


def _vocabulary(variables: Mapping[str, Any]) -> int | None:
    """Return the rows that one of vLLM's embeddings expects, if these are the variables of its loader."""
    rows = getattr(variables.get("self"), "org_vocab_size", None) if "loaded_weight" in variables else None
    return rows if isinstance(rows, int) else None


def _failed_check(error: Exception) -> str:
    """Describe an error that has no text by where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" in {trace.tb_frame.f_code.co_qualname}" if trace is not None else ""
    check = isinstance(error, AssertionError)
    return f"a check of its name, shape or dtype failed{where}" if check else f"{type(error).__name__}{where}"


def _shortened(text: str) -> str:
    # What follows is a list of every name.
    text = " ".join(text.split()).partition(" The available parameters")[0]
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS].rsplit(' ', 1)[0]} ..."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
