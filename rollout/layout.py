"""Which vLLM layers keep their weights as they were loaded (worker)."""

from typing import Any

from torch import nn

from rollcast.rollout.errors import RollcastError

# Layers whose weights vLLM leaves as its loader wrote them, so that they can be overwritten in place.
PLAIN_METHODS = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})


def use_plain_cpu_layout() -> None:
    """Keep CPU linears unpacked (call before the model is loaded; does nothing on other platforms).

    vLLM's CPU kernels otherwise pack every linear weight after loading and drop, or silently no longer read, the
    original.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    vllm_ops: Any = _custom_ops
    vllm_ops._supports_onednn = False
    linear_utils: Any = utils
    linear_utils.check_cpu_sgl_kernel = lambda *_: False


def check_layout(model: nn.Module) -> None:
    """Raise `RollcastError` naming the first module whose weights vLLM transforms after loading."""
    for name, module in model.named_modules():
        if why := _transformed(module):
            raise RollcastError(f"cannot update module {name} ({type(module).__name__}) in place: {why}")


def _transformed(module: Any) -> str | None:
    method = getattr(module, "quant_method", None)
    if method is not None and hasattr(method, "create_weights") and type(method).__name__ not in PLAIN_METHODS:
        return f"{type(method).__name__} transforms its weights after loading"
    linear = getattr(module, "cpu_linear", None)
    # vLLM's plain fallback is a lambda without a closure; the packing ones close over the packed copy.
    if linear is not None and getattr(linear, "__closure__", None):
        return "its CPU kernel keeps a packed copy"
    return None
