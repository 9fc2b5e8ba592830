"""The files of Triton kernels, or None for each of them where there is no CUDA or no Triton."""
from __future__ import annotations

import torch

try:
    if not torch.cuda.is_available():       # then Triton is not worth the time of its import
        raise ImportError
    from . import rows_triton, scan_triton, ssd_triton, step_triton
except ImportError:
    rows_triton = scan_triton = ssd_triton = step_triton = None

__all__ = ["rows_triton", "scan_triton", "ssd_triton", "step_triton"]
