"""One trial after the other in one process, each as if it were the first.

``pristine`` puts back what a trial can change of its process: seeds, torch's switches, environment, working
directory, logging, warnings, garbage collection, and the names in its own modules; GPU memory is freed. What stays:
the contents of containers at module level, which is where a trial keeps what later trials shall find warm, names in
modules that were first imported during the trial, and threads that it leaves behind.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType


@contextmanager
def pristine(*, seed: int, package: str) -> Iterator[None]:
    """Run a trial so that the next one finds the process as this one did; seeds are set from ``seed``.

    ``package`` is the top-level package of the trial: names that it rebinds in its own modules are put back.
    """
    before = _State(package)
    _seed(seed)
    try:
        yield
    finally:
        before.restore()


class _State:
    """What a trial can change of its process."""

    def __init__(self, package: str) -> None:
        self.environment, self.folder = dict(os.environ), os.getcwd()
        self.path, self.argv = list(sys.path), list(sys.argv)
        self.streams = sys.stdout, sys.stderr
        self.recursion, self.gc = sys.getrecursionlimit(), (gc.isenabled(), gc.get_threshold())
        self.filters, self.show = list(warnings.filters), warnings.showwarning
        self.disabled = logging.root.manager.disable
        self.loggers = {log: (log.level, list(log.handlers), log.propagate) for log in _loggers()}
        self.modules = {m: dict(vars(m)) for m in _modules_of(package)}
        self.torch = _TorchState()
        import numpy as np

        self.numpy_errors = np.geterr()

    def restore(self) -> None:
        import numpy as np

        for child in multiprocessing.active_children():
            child.terminate()
        for key in os.environ.keys() - self.environment.keys():
            del os.environ[key]
        os.environ.update({k: v for k, v in self.environment.items() if os.environ.get(k) != v})
        with suppress(OSError):
            os.chdir(self.folder)
        sys.path[:], sys.argv[:] = self.path, self.argv
        sys.stdout, sys.stderr = self.streams
        sys.setrecursionlimit(self.recursion)
        warnings.filters[:] = self.filters  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]
        warnings.showwarning = self.show
        logging.disable(self.disabled)
        for log in _loggers():
            level, handlers, propagate = self.loggers.get(log, (logging.NOTSET, log.handlers, log.propagate))
            log.setLevel(level)
            log.handlers[:], log.propagate = handlers, propagate
        np.seterr(**self.numpy_errors)
        for module, names in self.modules.items():
            vars(module).update(names)
        self.torch.restore()
        enabled, thresholds = self.gc
        gc.set_threshold(*thresholds)
        (gc.enable if enabled else gc.disable)()
        gc.collect()
        self.torch.free_memory()


class _TorchState:
    """Torch's process-wide switches."""

    def __init__(self) -> None:
        import torch

        self.dtype, self.device = torch.get_default_dtype(), torch.get_default_device()
        self.threads, self.grad = torch.get_num_threads(), torch.is_grad_enabled()
        self.anomaly = torch.is_anomaly_enabled()
        self.determinism = self._determinism()
        self.precision = torch.get_float32_matmul_precision()
        cudnn = torch.backends.cudnn
        self.cudnn = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
        self.gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        import torch

        torch.set_default_dtype(self.dtype)
        if torch.get_default_device() != self.device:
            torch.set_default_device(self.device)
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(self.grad)
        torch.autograd.set_detect_anomaly(self.anomaly)
        if (
            self._determinism() != self.determinism
        ):  # setting it imports torch's compiler, which takes seconds
            torch.use_deterministic_algorithms(self.determinism[0], warn_only=self.determinism[1])
        torch.set_float32_matmul_precision(self.precision)
        cudnn = torch.backends.cudnn
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = self.cudnn

    @staticmethod
    def _determinism() -> tuple[bool, bool]:
        import torch

        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def free_memory(self) -> None:
        import torch

        if torch.cuda.is_initialized():
            with suppress(RuntimeError):  # a GPU that does not work any more is noticed elsewhere
                torch.cuda.set_device(self.gpu or 0)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def _seed(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _loggers() -> list[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(log for log in known if isinstance(log, logging.Logger))]


def _modules_of(package: str) -> list[ModuleType]:
    return [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == package and m is not None]
