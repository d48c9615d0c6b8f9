"""Share out the GPUs between processes of pytest-xdist."""

import os

import torch
from shares import share_of

if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.device_count():
    # `-n 2` on four GPUs runs two GPU tests at a time.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    its = share_of(visible.split(","), worker=worker, workers=int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(its)
