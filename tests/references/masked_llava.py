"""Pruning by mask in Hugging Face's own eager layers: slow, and independent of our code.

Nothing is ever dropped here. Each layer keeps a list of the rows that it may still look at; a site
takes the others off the lists of its layer and of all behind it. Positions are never touched. The
decision is the plain NumPy one, in float64, on the queries and keys that Hugging Face computed.
Where tokens merge, the row that stays is written over with their mean.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from patchsieve.verify.reference import cache_name
from tests.references import atp, fastv, grid2d, pyramiddrop, random, sparsevlm, tome, topk

ANSWER = "\u00a7"  # stands for an answer whose tokens are in the cache
METHODS = {
    "fastv": fastv.decide,
    "atp": atp.decide,
    "random": random.decide,
    "topk": topk.decide,
    "pyramiddrop": pyramiddrop.decide,
    "sparsevlm": sparsevlm.decide,
    "tome": tome.decide,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "fastv": {"keep_ratio": 0.5, "rows": "last"},
    "random": {"keep_ratio": 0.5},
    "topk": {"row": "cls"},
    "pyramiddrop": {"keep_ratio": 0.5},
    "sparsevlm": {"keep_ratio": 0.5, "over_heads": "best"},
    "tome": {},
    "atp": {
        "granularities": (2, 4, 8),
        "normalisation": "minmax",
        "causal": False,
        "spatial_lambda": 3.0,
        "modality": "both",
        "parts": "both",
    },
}


@dataclass
class Choice:
    """What a site chose for one image: raster ids alive before, kept, and their scores."""

    layer: int
    image: int
    alive: list[int]
    kept: list[int]
    scores: dict[int, float]
    num_wanted: int


@dataclass
class Turn:
    """One answer: tokens, the logits of each [V], choices of this turn."""

    token_ids: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)


class MaskedLlava:
    """A checkpoint under Hugging Face, and a conversation with it.

    Args:
        checkpoint: Directory.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.config = self.model.config
        self.decoder = self.model.model.language_model
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        self.grid = (side, side)
        self.num_visual = self.config.image_seq_length
        entry = json.loads((checkpoint / "config.json").read_text()).get("patchsieve", {})
        self.sections: list[int] = entry.get("rotary_sections", [])
        first = -1 if self.num_visual > side * side else 0  # a class token lies on no patch
        self.patch_ids = np.arange(first, side * side)
        self.start()

    def start(self) -> None:
        """Forget the conversation."""
        self.cache = DynamicCache(config=self.decoder.config)
        self.seen = [np.zeros(0, bool) for _ in self.decoder.layers]  # rows each layer looks at
        self.num_images = 0
        self.position = 0  # of the next row, where positions lie on a grid
        self.pending: list[int] = []

    # Prompts.

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The rendered conversation."""
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def hugging_face_inputs(self, text: str, images: list[Any]) -> Any:
        """What Hugging Face's own processor makes of a prompt."""
        return self.processor(images=images or None, text=text, return_tensors="pt")

    def generate(self, text: str, images: list[Any], count: int) -> tuple[list[int], np.ndarray]:
        """Greedy tokens of Hugging Face's `generate`, and the logits of each, [T, V]."""
        inputs = self.hugging_face_inputs(text, images)
        out = self.model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, inputs.input_ids.shape[1] :].tolist()
        return tokens, torch.cat(out.logits).float().numpy()

    # One turn.

    @torch.no_grad()
    def ask(
        self,
        question: str,
        images: list[Any],
        sites: list[dict[str, Any]],
        *,
        messages: list[dict[str, Any]] | None = None,
        raw: bool = False,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> Turn:
        """Answer greedily under a plan.

        Args:
            question: The user's words, placeholders included; the whole prompt where `raw`.
            images: PIL images of this turn.
            sites: The plan's sites as JSON holds them.
            messages: The whole conversation, this question last; by default a first turn. The
                answers that this conversation gave stand in it as `ANSWER`.
            raw: No template.
            max_new_tokens: Most tokens.
            seed: Of the noise.
        """
        if messages is None:
            messages = [user_message(question, len(images))]
        text = question if raw else self.prompt(messages)
        suffix = text.rpartition(ANSWER)[2]  # what stands behind the last answer, or all
        ids, instruction = self._tokenise(suffix, question, raw)
        image = np.full(len(ids), -1)
        is_image = np.array(ids) == self.config.image_token_id
        is_image[: len(self.pending)] = False  # an answer may say anything
        image[is_image] = self.num_images + np.arange(is_image.sum()) // self.num_visual
        assert is_image.sum() == len(images) * self.num_visual
        embeddings = self._embed(ids, is_image, images)
        self.num_images += len(images)
        rng = np.random.default_rng(seed)
        turn = Turn()
        hidden = self._feed(embeddings, image, instruction, sites, rng, turn.choices)
        eos = self.model.generation_config.eos_token_id
        while True:
            logits = self.model.lm_head(self.decoder.norm(hidden[:, -1:]))[0, 0]
            turn.logits.append(logits.numpy())
            token = int(logits.argmax())
            turn.token_ids.append(token)
            if token == eos or len(turn.token_ids) == max_new_tokens:
                break
            hidden = self._feed(self.decoder.embed_tokens(torch.tensor([[token]])))
        self.pending = [] if token == eos else [token]
        return turn

    def _tokenise(self, text: str, question: str, raw: bool) -> tuple[list[int], np.ndarray]:
        """Ids to feed, images expanded, and which of them are the instruction's."""
        mark = self.processor.image_token
        expanded = text.replace(mark, mark * self.num_visual)
        tokenizer = self.processor.tokenizer
        has_past = len(self.seen[0]) > 0
        anchor = "." if has_past else ""  # a suffix does not begin a text
        encoded = tokenizer(
            anchor + expanded, add_special_tokens=not has_past, return_offsets_mapping=True
        )
        first = len(tokenizer(anchor, add_special_tokens=False).input_ids)
        ids = self.pending + encoded.input_ids[first:]
        offsets = [(0, 0)] * len(self.pending) + encoded.offset_mapping[first:]
        wanted = np.zeros(len(anchor + expanded) + 1, bool)
        pieces, end = ([] if raw else question.split(mark)), len(wanted)
        for piece in reversed([piece.strip() for piece in pieces if piece.strip()]):
            end = (anchor + expanded).rindex(piece, 0, end)
            wanted[end : end + len(piece)] = True
        if raw:  # roles cannot be told apart: all that stands behind the last image
            wanted[expanded.rfind(mark) + len(mark) if mark in expanded else 0 :] = True
        special = set(tokenizer.all_special_ids) | {self.config.image_token_id}
        chosen = [
            wanted[a:b].any() and token not in special
            for token, (a, b) in zip(ids, offsets, strict=True)
        ]
        return ids, np.array(chosen)

    def _embed(self, ids: list[int], is_image: np.ndarray, images: list[Any]) -> torch.Tensor:
        tokens = torch.tensor([ids])
        tokens[0, is_image] = 0
        rows = self.decoder.embed_tokens(tokens)
        if images:
            pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
            rows[0, is_image] = torch.cat(list(features)).to(rows.dtype)
        return rows

    def _feed(
        self,
        hidden: torch.Tensor,
        image: np.ndarray | None = None,
        instruction: np.ndarray | None = None,
        sites: list[dict[str, Any]] | None = None,
        rng: Any = None,
        choices: list[Choice] | None = None,
    ) -> torch.Tensor:
        """Rows through all layers, each with its own mask; sites take rows off the lists."""
        count, past = hidden.shape[1], len(self.seen[0])
        positions = torch.arange(past, past + count)[None]
        angles = self._angles(hidden, positions, np.full(count, -1) if image is None else image)
        plan = {site["layer"]: site for site in sites or []}
        alive, self.sizes = np.ones(count, bool), np.ones(count)
        self.entered = hidden
        budget, query = self.num_visual, None
        for number, layer in enumerate(self.decoder.layers):
            if number in plan and (image >= 0).any():
                site = plan[number]
                budget = min(budget, site.get("budget") or budget)
                alive, hidden = self._choose(
                    site, budget, query, hidden, angles, alive, image, instruction, rng, choices
                )
            self.seen[number] = np.concatenate((self.seen[number], alive))
            columns = torch.arange(past + count)
            visible = columns[None] <= positions[0][:, None]
            visible = visible & torch.from_numpy(self.seen[number])[None]
            mask = torch.where(visible, 0.0, torch.finfo(hidden.dtype).min)[None, None]
            query = self._rotated(layer, hidden, angles)[0]
            out = layer(
                hidden,
                attention_mask=mask.to(hidden.dtype),
                position_embeddings=angles,
                position_ids=positions,
                use_cache=True,
                **{cache_name(layer): self.cache},
            )
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def _angles(self, hidden: torch.Tensor, positions: torch.Tensor, image: np.ndarray) -> Any:
        """Cosines and sines of the rows, [1, L, D] each."""
        rotary = self.decoder.rotary_emb
        if not self.sections:
            return rotary(hidden, position_ids=positions)
        place = np.array([np.sum(image[:row] == image[row]) for row in range(len(image))])
        raster = np.where(image < 0, -1, self.patch_ids[place % self.num_visual])
        ids, self.position = grid2d.number(image, raster, self.grid, self.position)
        tables = grid2d.tables(ids, rotary.inv_freq.numpy(), self.sections)
        return tuple(torch.from_numpy(each)[None] * rotary.attention_scaling for each in tables)

    def _rotated(self, layer: Any, hidden: torch.Tensor, angles: Any) -> Any:
        """Queries and keys of a layer by Hugging Face's own projections and rotary function.

        Shapes are [1, H, L, D] and [1, G, L, D].
        """
        attention, states = layer.self_attn, layer.input_layernorm(hidden)
        rows = (project(states) for project in (attention.q_proj, attention.k_proj))
        heads = (r.view(*r.shape[:2], -1, attention.head_dim).transpose(1, 2) for r in rows)
        return sys.modules[type(layer).__module__].apply_rotary_pos_emb(*heads, *angles)

    def _choose(
        self,
        site: dict[str, Any],
        budget: int,
        query: torch.Tensor,
        hidden: torch.Tensor,
        angles: Any,
        alive: np.ndarray,
        image: np.ndarray,
        instruction: np.ndarray,
        rng: Any,
        choices: list[Choice],
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Judge each image alone; a row list without those that were dropped, and the rows."""
        layer = site["layer"]
        seen = torch.from_numpy(self.seen[layer - 1])  # rows cached before, then this turn's
        rows = np.flatnonzero(alive)
        key = self.cache.layers[layer - 1].keys[:, :, seen]
        query = query[:, :, torch.from_numpy(rows)]
        ahead = self._rotated(self.decoder.layers[layer], hidden, angles)
        ahead_query, ahead_key = (states[:, :, torch.from_numpy(rows)] for states in ahead)
        image_of, instruction_of = image[rows], instruction[rows]
        method = method_of(site)
        alive, hidden = alive.copy(), hidden.clone()
        for number in sorted(set(image[image >= 0])):
            visual = np.flatnonzero(image_of == number)
            behind = (np.arange(len(rows)) > visual[-1]) & (image_of < 0)
            text = np.flatnonzero(behind & instruction_of)
            text = text if len(text) else np.flatnonzero(behind)
            text = text if len(text) else np.array([len(rows) - 1])
            ids = self._patch_ids(int(number), self._raster(image, rows[visual]))
            noise = rng.random((1, len(visual)), np.float32)
            view = SimpleNamespace(
                query=query,
                key=key,
                visual_rows=torch.from_numpy(visual),
                text_rows=torch.from_numpy(text),
                patch_ids=torch.from_numpy(ids),
                grid=self.grid,
                num_visual=self.num_visual,
                noise=torch.from_numpy(noise),
                hidden=hidden[:, torch.from_numpy(rows)],
                sizes=torch.from_numpy(self.sizes[rows[visual]])[None],
                embeddings=self.entered[:, torch.from_numpy(rows)],
                next_layer=SimpleNamespace(
                    query=lambda chosen: ahead_query[:, :, chosen], key=lambda: ahead_key
                ),
            )
            keep, scores, wanted = METHODS[site["method"]](method, view, budget)
            alive[rows[visual[~keep[0]]]] = False
            choices.append(
                Choice(
                    layer,
                    int(number),
                    ids.tolist(),
                    ids[keep[0]].tolist(),
                    dict(zip(ids.tolist(), scores[0].tolist(), strict=True)),
                    int(wanted[0]),
                )
            )
            if site["method"] == "tome":
                made, goes = tome.merged(method, view, budget)
                hidden[0, torch.from_numpy(rows[visual])] = torch.from_numpy(made[0]).float()
                for old, new in enumerate(goes[0]):
                    self.sizes[rows[visual[new]]] += self.sizes[rows[visual[old]]] * (old != new)
        return alive, hidden

    def _patch_ids(self, number: int, places: np.ndarray) -> np.ndarray:
        """Raster ids of an image's tokens, by their places among those that entered."""
        return self.patch_ids[places]

    def _raster(self, image: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Place of each row within its image."""
        first = np.flatnonzero(image == image[rows[0]])[0]
        return rows - first


def user_message(question: str, num_images: int) -> dict[str, Any]:
    """A user's turn; images come first unless the question places them."""
    parts = [] if "<image>" in question else [{"type": "image"}] * num_images
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def answer_message(text: str = ANSWER) -> dict[str, Any]:
    """The assistant's turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def method_of(site: dict[str, Any]) -> Any:
    """A site's parameters as the NumPy references read them."""
    params = DEFAULTS[site["method"]] | dict(site["params"])
    if site["method"] == "atp":
        heads = params.pop("heads", None)
        params["thresholds"] = (
            _heads(Path(heads), site["layer"])
            if heads
            else SimpleNamespace(theta_r=params["theta_r"], theta_s=params["theta_s"])
        )
    return SimpleNamespace(**params)


def _heads(directory: Path, layer: int) -> Any:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(directory / "heads.safetensors")
    prefix = f"layer.{layer}."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return SimpleNamespace(
        trunk=True,
        grid=tuple(config["grid"]),
        activation=config["activation"],
        named_parameters=lambda: own.items(),
    )
