"""What a loaded bundle shares among its conversations: graphs, and caches between requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchsieve.contract.errors import RequestError
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.backends import open_backend
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import Cache
from patchsieve.runtime.inputs.images import load_image
from patchsieve.runtime.pipeline import Pipeline


class Loaded:
    """An opened bundle, its backend, and the caches that wait for the next request.

    Args:
        path: The bundle's directory.
        target: What to run it as; "auto" takes the only target, else the one with engines for this
            GPU, else the only one that runs here.
        threads: Threads of the backend.
        check: "hash" compares every file with its sha256 first, but does not read again what was
            found whole and has not changed since; "full" reads all; "size" compares only sizes.
        progress: Told each file before it is checked.
        backend: Makes the backend of the opened bundle; the target's own by default.
        spare_caches: How many plans' caches are kept between requests.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        target: str = "auto",
        threads: int | None = None,
        check: str = "hash",
        progress: Callable[[str], None] | None = None,
        backend: Callable[[Bundle], Backend] | None = None,
        spare_caches: int = 1,
    ) -> None:
        self.bundle = Bundle(Path(path), target, check=check, progress=progress)
        self.facts = self.bundle.manifest
        self.backend = (
            open_backend(self.bundle, threads=threads) if backend is None else backend(self.bundle)
        )
        self.pipeline = Pipeline(self.bundle, self.backend)
        self.spare_caches = spare_caches
        self._spare: dict[str, Cache] = {}  # one cache per plan, for the next request
        self._is_closed = False

    def take_cache(self, plan: str) -> Cache:
        """An empty cache: the one that the last request gave back, or a new one."""
        return self._spare.pop(plan, None) or self.pipeline.new_cache(plan)

    def give_back(self, plan: str, cache: Cache) -> None:
        """Keep a cache for the next request."""
        if self._is_closed:
            return
        cache.empty()
        self._spare[plan] = cache
        while len(self._spare) > self.spare_caches:
            del self._spare[next(iter(self._spare))]  # the one that has waited longest

    def check_open(self) -> None:
        """Refuse work after `close`: the caches are bound to sessions that are gone.

        Raises:
            RequestError: The model is closed.
        """
        if self._is_closed:
            raise RequestError("the model is closed", do="load the bundle again")

    def preprocess(self, sources: Sequence[Any]) -> np.ndarray:
        """Images to pixels, [B, 3, h, w]."""
        return np.stack([self.bundle.preprocessor(load_image(source)) for source in sources])

    def close(self) -> None:
        """Give back memory. Open conversations and answers end: their next step is refused."""
        self._is_closed = True
        self._spare.clear()
        self.backend.close()
