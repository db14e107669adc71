"""A loaded bundle that answers: `Model.generate`, `Model.stream`, `Model.chat`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchsieve.contract.errors import CapacityError, RequestError
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.backends import open_backend
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import Cache
from patchsieve.runtime.chat import Chat
from patchsieve.runtime.inputs.images import load_image
from patchsieve.runtime.inputs.prompt import Content
from patchsieve.runtime.pipeline import Pipeline
from patchsieve.runtime.result import Result


class Model:
    """A bundle, loaded.

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

    def generate(self, image: Any = None, prompt: Content = "", **options: Any) -> Result:
        """Answer one prompt about an image, several (a list), or none.

        Args:
            image: A path, bytes, a PIL image or an array [h, w, 3]; or a list of them.
            prompt: The user's words; `<image>` in them places an image.
            **options: `plan` and `system` as for `chat`, and those of `Chat.stream`: raw, scores,
                max_new_tokens, ...

        Returns:
            The answer.
        """
        result = Result()
        for _ in self.stream(image, prompt, result=result, **options):
            pass
        return result

    def stream(
        self,
        image: Any = None,
        prompt: Content = "",
        *,
        result: Result | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The same, piece by piece; `result` is filled when the last piece has come."""
        chat = self.chat(plan=options.pop("plan", None), system=options.pop("system", None))
        try:
            yield from chat.stream(prompt, image, result=result, **options)
        finally:
            chat.close()

    def chat(self, *, plan: str | None = None, system: Content | None = None) -> Chat:
        """Start a conversation that continues from its cache.

        Args:
            plan: Which of the bundle's plans; its default otherwise.
            system: A system prompt.

        Raises:
            RequestError: There is no such plan, or the chat template has no place for a system
                prompt.
            CapacityError: The plan needs more slots than the engines reserve.
        """
        self.check_open()
        plan = plan or self.facts.default_plan
        if plan not in self.facts.plans:
            raise RequestError(
                "the bundle holds no such plan", found=plan, expected=", ".join(self.facts.plans)
            )
        if self.backend.has_fixed_slots:
            built = [stage.slots for stage in self.facts.stages]
            if any(a > b for a, b in zip(self.facts.slots(plan), built, strict=True)):
                raise CapacityError(
                    f"the plan {plan} needs more slots than the engines reserve",
                    found=self.facts.slots(plan),
                    expected=f"at most {built}",
                    do="export with a larger --budget",
                )
        return Chat(self, plan, system)

    def take_cache(self, plan: str) -> Cache:
        """An empty cache: the one that the last request gave back, or a new one."""
        return self._spare.pop(plan, None) or self.pipeline.new_cache(plan)

    def give_back(self, plan: str, cache: Cache) -> None:
        """Keep a cache for the next request."""
        if self._is_closed:
            return
        cache.rewind((0,) * (1 + len(cache.stages)))
        self._spare[plan] = cache
        while len(self._spare) > self.spare_caches:
            del self._spare[next(iter(self._spare))]  # the one that waits longest

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
