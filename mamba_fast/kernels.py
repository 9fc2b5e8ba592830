"""The files of Triton kernels, or None for each of them where there is no CUDA or no Triton; and
whether they can run."""
from __future__ import annotations

import torch

try:
    if not torch.cuda.is_available():       # then Triton is not worth the time of its import
        raise ImportError
    from . import launch, scan_triton
    launch.preparing()      # while the others are imported
    from . import heads_triton, rows_triton, ssd_triton, step_triton, turn_triton
except ImportError:
    heads_triton = launch = rows_triton = scan_triton = None
    ssd_triton = step_triton = turn_triton = None

__all__ = ["can_run", "heads_triton", "launch", "rows_triton", "scan_triton", "ssd_triton",
           "step_triton", "turn_triton"]


def can_run(x):
    """Whether they can run for tensors like x, by its device and dtype."""
    return (scan_triton is not None and x.device.type == "cuda" and scan_triton.runs_on(x.device)
            and x.dtype != torch.float64)
