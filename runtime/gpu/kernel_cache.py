"""TensorRT-RTX compiles kernels when an engine runs; what it compiled is kept in a file.

The library itself refuses a file of another version, GPU or driver, and starts again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from patchsieve.contract.writing import write_whole
from patchsieve.runtime.gpu.engine import DECODE, Engine

log = logging.getLogger(__name__)

FILE_NAME = "kernels.cache"


class KernelCache:
    """The compiled kernels of a bundle's engines, shared by their contexts.

    Args:
        trt: The library. Where it compiles nothing at run time, this does nothing.
        folder: Of the engines. Where it may not be written, the user's cache directory is taken.
    """

    def __init__(self, trt: ModuleType, folder: Path) -> None:
        self.trt, self.folder = trt, folder
        self._cache: Any = None
        self._stored = b""

    def config(self, engine: Engine, profile: int) -> Any:
        """Settings for a context; None if the library has none.

        A stage's decode profile sees one shape only, so that its kernels are compiled for it before
        the first call returns: a CUDA graph would keep the slow ones for ever. Prompts differ
        in length, and each would wait.
        """
        make = getattr(engine.engine, "create_runtime_config", None)
        config: Any = make() if make is not None else None
        if not hasattr(config, "create_runtime_cache"):
            return None
        strategies = self.trt.DynamicShapesKernelSpecializationStrategy
        is_decode = engine.num_profiles > 1 and profile == DECODE
        config.dynamic_shapes_kernel_specialization_strategy = (
            strategies.EAGER if is_decode else strategies.LAZY
        )
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED  # ours holds all stages
        config.set_execution_context_allocation_strategy(
            self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._load()
        config.set_runtime_cache(self._cache)
        return config

    def save(self) -> None:
        """Write the file if kernels have come in. A place that cannot be written is no failure."""
        if self._cache is None:
            return
        blob = self._cache.serialize()
        content = b"" if blob is None else bytes(memoryview(blob))
        if not content or content == self._stored:
            return
        for path in self._paths():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, content)
            except OSError as error:
                log.info("kernels are not kept in %s: %s", path, error)
            else:
                self._stored = content
                return
        log.warning("compiled kernels cannot be kept: the next start compiles them again")

    def close(self) -> None:
        """Let the library's object go."""
        self._cache = None

    def _load(self) -> None:
        for path in self._paths():
            try:
                content = path.read_bytes()
            except OSError:
                continue
            if self._cache.deserialize(content):
                self._stored = content
                return
            log.info("%s is of another library, driver or GPU: kernels are compiled again", path)

    def _paths(self) -> list[Path]:
        """Where the file may lie: beside the engines, or in the user's cache directory."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        own = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        return [self.folder / FILE_NAME, home / "patchsieve" / own / FILE_NAME]
