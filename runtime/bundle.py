"""An opened bundle: its manifest checked, its small files read, its embedding table mapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from patchsieve.contract import files
from patchsieve.contract.errors import BundleError, RequestError
from patchsieve.contract.links import locate
from patchsieve.contract.precision import stored_as
from patchsieve.runtime.inputs.builder import PromptBuilder
from patchsieve.runtime.inputs.preprocess import Preprocessor
from patchsieve.runtime.target import AUTO, Choice, choose

_CHECKS = ("full", "hash", "size")


class Bundle:
    """A bundle on disk, ready for a backend.

    Args:
        path: The directory.
        target: What it is to run as, or "auto" (`patchsieve.runtime.target`); other targets' files
            are not looked at.
        check: "hash" compares every file with its sha256, but does not read again what was found
            whole and has not changed since; "full" reads all; "size" compares only sizes.
        progress: Told each file before it is read.

    Attributes:
        choice: Its target, and why "auto" took that one.
        place: Where it lies; a snapshot of the hub's cache is made of links.
        has_links: Its graphs or weights are links, which a backend may refuse to follow.

    Raises:
        BundleError: The bundle is damaged, newer, or lacks the target.
        RequestError: `check` is none of the three.
    """

    def __init__(
        self,
        path: Path,
        target: str,
        *,
        check: str = "hash",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if check not in _CHECKS:
            raise RequestError(
                "bad check",
                found=repr(check),
                expected=" or ".join(map(repr, _CHECKS)),
                do="choose one of these for check=",
            )
        self.path, self.check = path, check
        self.place = locate(path)
        self.manifest = files.read(path)
        self.choice = choose(path, self.manifest) if target == AUTO else Choice(target)
        self.target = target = self.choice.target
        if target not in self.manifest.targets:
            raise BundleError(
                f"the bundle holds no graphs for {target}",
                found=", ".join(sorted(self.manifest.targets)),
                expected=target,
                do=f"choose one that it holds, or --target {AUTO}; or export it again with "
                f"--targets {target}",
            )
        self.graphs = self.manifest.targets[target]
        own = self._own_files()
        files.check_files(
            path,
            self.manifest,
            paths=own,
            hashes=check != "size",
            again=check == "full",
            progress=progress,
        )
        self.has_links = self.place.has_links(own)
        self.prompts = self._prompts()
        self.preprocessor = self._preprocessor()
        self._table = self._embeddings()

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """Embeddings of tokens: [T] -> [T, C]; of bfloat16 the bits, as uint16.

        Raises:
            RequestError: The tokenizer gave a token that the table does not hold.
        """
        count = len(self._table)
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < count:
            raise RequestError(
                "the prompt holds a token that the model does not know",
                found=f"token {token_ids.max()}",
                expected=f"0 to {count - 1}",
                do="leave special tokens of other models out of the prompt",
            )
        return self._table[token_ids]

    def graph_path(self, graph: str) -> Path:
        """File of a graph of this target."""
        return self.path / self.graphs[graph]

    def _own_files(self) -> list[str]:
        facts = self.manifest
        others = {path for graphs in facts.targets.values() for path in graphs.values()}
        return [path for path in facts.files if path not in others - set(self.graphs.values())]

    def _prompts(self) -> PromptBuilder:
        tokens = self.manifest.tokens
        try:
            return PromptBuilder(
                self.place.file(tokens.tokenizer),
                tokens.chat_template,
                image_token=tokens.image_token,
                image_token_id=tokens.image_token_id,
                special_tokens=tokens.special_tokens,
            )
        except Exception as error:
            if type(error) is not Exception:  # what tokenizers raises has no type of its own
                raise
            raise BundleError(
                f"the bundle's {tokens.tokenizer} cannot be read",
                found=str(error)[:200],
                do="export the bundle again",
            ) from error

    def _preprocessor(self) -> Preprocessor:
        name, vision = self.manifest.preprocessor, self.manifest.vision
        try:
            settings = json.loads(self.place.file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
            raise BundleError(
                f"the bundle's {name} cannot be read",
                found=str(error)[:200],
                do="export the bundle again",
            ) from error
        preprocessor = Preprocessor.from_dict(settings)
        side = vision.image_size
        if preprocessor.size != (side, side):
            raise BundleError(
                f"the bundle's {name} does not yield the images that the vision graph takes",
                found=list(preprocessor.size),
                expected=[side, side],
                do="export the bundle again",
            )
        return preprocessor

    def _embeddings(self) -> np.ndarray:
        """The embedding table [V, C], mapped: only the rows that are read enter memory."""
        table = self.manifest.embeddings
        dtype = np.dtype(stored_as(table.dtype))
        end = table.offset + dtype.itemsize * table.shape[0] * table.shape[1]
        if end > self.manifest.files[table.file].size:
            raise BundleError(
                "the embedding table reaches past its file",
                found=table,
                do="copy or export the bundle again",
            )
        return np.memmap(
            self.place.file(table.file),
            dtype,
            mode="r",
            offset=table.offset,
            shape=table.shape,
        )
