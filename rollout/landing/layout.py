"""How vLLM keeps weights on CPU (worker)."""

import os
from typing import Any

from rollcast.rollout.config import CPU_WEIGHTS, CPU_WEIGHTS_VARIABLE


def choose_cpu_layout() -> None:
    """Keep linears as they are loaded if the environment says "plain" (before the model is loaded; CPU only).

    By default vLLM's CPU kernels pack every linear weight after loading, and drop the original. "plain" is the
    layout that weights have on CUDA.
    """
    from vllm.platforms import current_platform

    if os.environ.get(CPU_WEIGHTS_VARIABLE, CPU_WEIGHTS[0]) != "plain" or not current_platform.is_cpu():
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    vllm_ops: Any = _custom_ops
    vllm_ops._supports_onednn = False
    linear_utils: Any = utils
    linear_utils.check_cpu_sgl_kernel = lambda *_: False
