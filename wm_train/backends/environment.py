"""Choose the environment variables that workers get on every machine: those that the vendors'
libraries read, as they were set for the command, and time limits and determinism as configured.

A launcher starts workers with a bare environment on other machines, so what is not named here does
not reach them. It imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

NAMES = (
    "PYTHONPATH",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NPU_ALLOC_CONF",
    "TASK_QUEUE_ENABLE",
    "CPU_AFFINITY_CONF",
    "MULTI_STREAM_MEMORY_REUSE",
    "CLOSE_MATMUL_K_SHIFT",
    "COMBINED_ENABLE",
    "GLOO_SOCKET_IFNAME",
)
PREFIXES = ("NCCL_", "TORCH_NCCL_", "HCCL_", "LCCL_", "ASCEND_", "ACL_")
# which devices a worker uses is what its launcher says
NOT_PASSED = ("ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES")
CONNECT_S = (120, 7200)  # what HCCL takes for the time to meet
DETERMINISTIC = {
    "HCCL_DETERMINISTIC": "true",
    "LCCL_DETERMINISTIC": "1",
    "CLOSE_MATMUL_K_SHIFT": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def worker_environment(
    given: Mapping[str, str], timeout_s: float, deterministic: bool
) -> dict[str, str]:
    """Return the variables for every worker. given: of the command, whose values win.

    timeout_s: of collectives, in seconds (backend.collective_timeout_s). NCCL takes it from the
    process group; HCCL has limits of its own, with which a rank would wait half an hour.
    """
    low, high = CONNECT_S
    whole = math.ceil(timeout_s)
    limits = {
        "HCCL_CONNECT_TIMEOUT": str(min(max(whole, low), high)),
        "HCCL_EXEC_TIMEOUT": str(whole),
    }
    passed = {
        name: value
        for name, value in given.items()
        if (name in NAMES or name.startswith(PREFIXES)) and name not in NOT_PASSED
    }
    return {**limits, **(DETERMINISTIC if deterministic else {}), **passed}
