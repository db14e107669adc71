"""A loaded bundle that answers: `Model.generate`, `Model.stream`, `Model.chat`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from patchsieve.contract.errors import CapacityError, RequestError
from patchsieve.runtime.chat import Chat
from patchsieve.runtime.inputs.chat_template import Content
from patchsieve.runtime.loaded import Loaded
from patchsieve.runtime.result import Result


class Model(Loaded):
    """A bundle, loaded; `Loaded` describes the arguments."""

    def generate(
        self,
        image: Any = None,
        prompt: Content = "",
        *,
        plan: str | None = None,
        system: Content | None = None,
        **options: Any,
    ) -> Result:
        """Answer one prompt about an image, several (a list), or none.

        Args:
            image: A path, bytes, a PIL image or an array [h, w, 3]; or a list of them.
            prompt: The user's words; `<image>` in them places an image.
            plan: Which of the bundle's plans; its default otherwise.
            system: A system prompt.
            **options: Those of `Chat.stream`: raw, scores, max_new_tokens, ...

        Returns:
            The answer.
        """
        with closing(self.chat(plan=plan, system=system)) as chat:
            return chat.ask(prompt, image, **options)

    def stream(
        self,
        image: Any = None,
        prompt: Content = "",
        *,
        plan: str | None = None,
        system: Content | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The same, piece by piece; an option `result` is filled when the last piece has come."""
        with closing(self.chat(plan=plan, system=system)) as chat:
            yield from chat.stream(prompt, image, **options)

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
                "the bundle holds no such plan",
                found=plan,
                expected=", ".join(self.facts.plans),
                do="name one of them with --plan, or add it: patchsieve export --reuse BUNDLE",
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
