"""What a trial's process takes of its machine, once for each epoch; off unless ``slots.system_metrics`` says so.

It is measured in the worker, so it is right on any node of a cluster, and travels with the record of the epoch: to the
study's folder, and by the spool to MLflow, whose pages show names that begin with ``system/`` on a tab of their own.
Of a trial with several workers it is the first one's. A reading that fails is left out and never ends a trial.
"""

from __future__ import annotations

import contextlib
import sys


class Meter:
    """Reads the process it was made in; the first reading covers the time since then."""

    def __init__(self) -> None:
        import psutil  # comes with Ray

        self._psutil, self._process = psutil, psutil.Process()
        self._process.cpu_percent()

    def read(self) -> dict[str, float]:
        """CPU in percent of one core since the last reading, memory now, and the GPU's peak since the last reading."""
        found: dict[str, float] = {}
        with contextlib.suppress(self._psutil.Error, OSError):
            memory = self._psutil.virtual_memory()
            found |= {
                "system/cpu_utilization_percentage": self._process.cpu_percent(),
                "system/process_memory_megabytes": self._process.memory_info().rss / 1e6,
                "system/system_memory_usage_percentage": memory.percent,
            }
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):
                found["system/gpu_memory_peak_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
                torch.cuda.reset_peak_memory_stats()
        return found
