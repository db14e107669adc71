"""An opened bundle: its manifest checked, its small files read, its embedding table mapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from patchsieve import manifest
from patchsieve.errors import BundleError
from patchsieve.runtime.preprocess import Preprocessor
from patchsieve.runtime.prompt import PromptBuilder


class Bundle:
    """A bundle on disk, ready for a backend.

    Args:
        path: The directory.
        target: What it is to run as; other targets' files are not looked at.
        check: "hash" compares every file with its sha256, "size" only sizes.
        progress: Told each file before it is read.

    Raises:
        BundleError: The bundle is damaged, newer, or lacks the target.
    """

    def __init__(
        self,
        path: Path,
        target: str,
        *,
        check: str = "hash",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.path, self.target = path, target
        self.manifest = manifest.read(path)
        if target not in self.manifest.targets:
            raise BundleError(
                f"the bundle holds no graphs for {target}",
                found=", ".join(sorted(self.manifest.targets)),
                expected=target,
                do=f"export it again with --targets {target}",
            )
        self.graphs = self.manifest.targets[target]
        manifest.check_files(
            path, self.manifest, paths=self._own_files(), hashes=check == "hash", progress=progress
        )
        tokens = self.manifest.tokens
        self.prompts = PromptBuilder(
            path / tokens.tokenizer,
            tokens.chat_template,
            image_token=tokens.image_token,
            image_token_id=tokens.image_token_id,
            special_tokens=tokens.special_tokens,
        )
        settings = json.loads((path / self.manifest.preprocessor).read_text(encoding="utf-8"))
        self.preprocessor = Preprocessor.from_dict(settings)
        table = self.manifest.embeddings
        size = self.manifest.files[table.file].size if table.file in self.manifest.files else 0
        width = np.dtype(table.dtype).itemsize * table.shape[0] * table.shape[1]
        if table.offset < 0 or table.offset + width > size:
            raise BundleError("the embedding table reaches past its file", found=table)
        self._table = np.memmap(
            path / table.file, table.dtype, mode="r", offset=table.offset, shape=table.shape
        )

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """Embeddings of tokens: [T] -> [T, C]."""
        return self._table[token_ids]

    def graph_path(self, graph: str) -> Path:
        """File of a graph of this target."""
        return self.path / self.graphs[graph]

    def _own_files(self) -> list[str]:
        facts = self.manifest
        others = {path for graphs in facts.targets.values() for path in graphs.values()}
        return [path for path in facts.files if path not in others - set(self.graphs.values())]
