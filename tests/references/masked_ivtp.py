"""IVTP, and TopK likewise, by mask in Hugging Face's own eager layers, in tower and decoder.

As in masked_llava.py nothing is ever dropped: a patch or row that is pruned is only hidden from
then on. The pseudo-CLS rows run beside the others; their keys are taken out of the cache behind
each layer. All decisions are the plain NumPy ones of ivtp.py and topk.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPModel

from patchsieve.pruning.schedules import geometric
from patchsieve.verify.reference import cache_name
from tests.references import ivtp, rollout, topk
from tests.references.attention import softmax
from tests.references.masked_llava import Choice, MaskedLlava
from tests.references.selection import top

DEFAULTS = {
    "ivtp": {"group": 3, "fusion": "rollout", "block": "visual", "identity_first": False},
    "topk": {"group": 1, "row": "cls"},
}
METHODS = {"ivtp": ivtp.decide, "topk": topk.decide}


class MaskedIvtp(MaskedLlava):
    """A checkpoint with its CLIP under Hugging Face.

    Args:
        checkpoint: Directory of the LLaVA.
        clip: Directory of the CLIP.
    """

    def __init__(self, checkpoint: Path, clip: Path) -> None:
        super().__init__(checkpoint)
        self.clip = CLIPModel.from_pretrained(clip, attn_implementation="eager").eval()
        self.clip_tokenizer = AutoTokenizer.from_pretrained(clip)
        self.plan: dict[str, Any] = {}
        self.chosen: list[list[str]] = []  # words that judge, per image of this turn

    # The tower.

    def _embed(self, ids: list[int], is_image: np.ndarray, images: list[Any]) -> torch.Tensor:
        rows = super()._embed(ids, is_image, [])
        self.alive_patches = []
        self.visual_cls = []
        for number, image in enumerate(images):
            pixels = self.processor.image_processor([image], return_tensors="pt").pixel_values
            features = self._tower(pixels)
            places = np.flatnonzero(is_image).reshape(len(images), -1)[number]
            rows[0, places] = features
        return rows

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [N, C]; who is alive and what the class token becomes are noted."""
        tower = self.model.model.vision_tower
        project = self.model.model.multi_modal_projector
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        count, layers = x.shape[1] - 1, tower.encoder.layers
        run = len(layers) - 1
        alive = np.ones(1 + count, bool)
        encoder = self.plan.get("encoder")
        group = encoder["params"]["group_layers"] if encoder else run
        ends = [min(end, run) - 1 for end in range(group, run + group, group)]
        left = geometric(count, encoder["params"]["keep"], len(ends)) if encoder else [count]
        maps: list[np.ndarray] = []
        for index, layer in enumerate(layers[:run]):
            attention, value = self._tower_attention(layer, x, alive)
            maps.append(attention)
            x = layer(x, self._columns(alive))
            if encoder and index in ends:
                who = np.flatnonzero(alive)
                if encoder["method"] == "topk":
                    scores = maps[-1][0, 0, 1:]
                else:
                    row = ivtp.cls_row(maps, encoder["params"]["fusion"], 0)[:, 1:]
                    scores = rollout.scores(row, value[:, :, 1:])[0]
                kept = top(scores, left[ends.index(index)])
                alive[who[1:][~kept]] = False
                maps = []
        self.alive_patches.append(alive[1:])
        last = (
            x
            if self.plan["pseudo_cls"].get("cls") == "penultimate"
            else layers[-1](x, self._columns(alive))
        )
        joint = self.clip.visual_projection(tower.post_layernorm(last[:, 0]))[0]
        self.visual_cls.append((project(x[:, :1])[0, 0].numpy(), joint.numpy()))
        return project(x[:, 1:])[0]

    def _columns(self, alive: np.ndarray) -> torch.Tensor:
        hidden = torch.finfo(torch.float32).min
        return torch.where(torch.from_numpy(alive), 0.0, hidden)[None, None, None]

    def _tower_attention(
        self, layer: Any, x: torch.Tensor, alive: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Head-mean attention among the alive rows, and their values, in float64."""
        rows, attn = layer.layer_norm1(x)[:, torch.from_numpy(alive)], layer.self_attn

        def heads(projection: Any) -> np.ndarray:
            states = projection(rows).view(1, rows.shape[1], attn.num_heads, -1)
            return states.transpose(1, 2).double().numpy()

        query, key, value = (heads(p) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        logits = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
        return softmax(logits).mean(1), value

    # The question.

    def _tokenise(self, text: str, question: str, raw: bool) -> tuple[list[int], np.ndarray]:
        ids, chosen = super()._tokenise(text, question, raw)
        self.asked = np.flatnonzero(chosen)
        self.ids, self.question = ids, question
        return ids, chosen

    def _pseudo_cls(self) -> torch.Tensor:
        """One row per image of this turn, [M, C] (eqs. 5-8)."""
        rule = {"text": "clip", "tau": 0.2} | self.plan["pseudo_cls"]
        tokens = torch.tensor(self.ids)[self.asked]
        embeddings = self.decoder.embed_tokens(tokens).double().numpy()
        spans = self._question_spans()
        rows, self.chosen = [], []
        for features, joint in self.visual_cls:
            if rule["text"] == "clip":
                c = ivtp.relevance(joint.tolist(), *self._clip_words(), spans)
            elif rule["text"] == "similarity":
                whole = [(k, k + 1) for k in range(len(tokens))]
                c = ivtp.relevance(features.tolist(), embeddings, whole, whole)
            else:
                c = np.full(len(tokens), np.inf if rule["text"] == "all" else -np.inf)
            row, chosen = ivtp.pseudo_cls(embeddings, c, rule["tau"], features)
            self.chosen.append([self.question[slice(*spans[k])].strip() for k in chosen])
            rows.append(torch.from_numpy(row).float())
        return torch.stack(rows)

    def _question_spans(self) -> list[tuple[int, int]]:
        """Characters of the question that each asked token covers, by the text before it."""
        spans, end = [], 0
        for token in self.asked:
            piece = self.processor.tokenizer.convert_ids_to_tokens(int(self.ids[token]))
            piece = piece.lstrip("\u2581\u0120")
            start = self.question.index(piece, end)
            end = start + len(piece)
            spans.append((start, end))
        return spans

    def _clip_words(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Eq. 5: every content token, and its characters; windows of as many as CLIP takes."""
        tokenizer = self.clip_tokenizer
        made = tokenizer(self.question, add_special_tokens=False, return_offsets_mapping=True)
        window = self.clip.config.text_config.max_position_embeddings - 2
        features = []
        for first in range(0, len(made.input_ids), window):
            part = made.input_ids[first : first + window]
            ids = torch.tensor([[tokenizer.bos_token_id, *part, tokenizer.eos_token_id]])
            hidden = self.clip.text_model(input_ids=ids).last_hidden_state
            features.append(self.clip.text_projection(hidden)[0, 1:-1].numpy())
        return np.concatenate(features), made.offset_mapping

    # The decoder.

    def _feed(self, hidden: torch.Tensor, image: Any = None, *given: Any) -> torch.Tensor:
        if image is None or not (image >= 0).any():
            return super()._feed(hidden, image, *given)
        _, sites, _, choices = given
        count, past = hidden.shape[1], len(self.seen[0])
        images = sorted(set(image[image >= 0]))
        behind = [np.flatnonzero(image == number)[-1] for number in images]
        text = [next((r for r in range(b, count) if image[r] < 0), count) for b in behind]
        rows = torch.cat((hidden, self._pseudo_cls()[None]), dim=1)
        places = past + np.concatenate((np.arange(count), text))
        positions = torch.from_numpy(places)[None]
        angles = self.decoder.rotary_emb(rows, position_ids=positions)
        limit = past + np.concatenate((np.arange(count), behind))
        plan = {site["layer"]: site for site in sites or []}
        alive = np.ones(count, bool)
        for number, patches in zip(images, self.alive_patches, strict=True):
            alive[image == number] = patches
        self.states: list[tuple[torch.Tensor, ...]] = []
        for number, layer in enumerate(self.decoder.layers):
            if number in plan:
                alive = self._prune(plan[number], alive, image, images, choices)
            self.seen[number] = np.concatenate((self.seen[number], alive))
            seen = np.concatenate((self.seen[number], np.zeros(len(images), bool)))
            columns = np.arange(len(seen))
            visible = (columns <= limit[:, None]) & seen
            visible |= columns == past + np.arange(rows.shape[1])[:, None]
            mask = torch.where(torch.from_numpy(visible), 0.0, torch.finfo(rows.dtype).min)
            query = self._rotated(layer, rows, angles)[0]
            out = layer(
                rows,
                attention_mask=mask[None, None],
                position_embeddings=angles,
                position_ids=positions,
                use_cache=True,
                **{cache_name(layer): self.cache},
            )
            rows = out[0] if isinstance(out, tuple) else out
            cache = self.cache.layers[number]
            self.states.append((query, cache.keys, cache.values))
            cache.keys, cache.values = (t[:, :, : past + count] for t in (cache.keys, cache.values))
        return rows[:, :count]

    def _prune(
        self,
        site: dict[str, Any],
        alive: np.ndarray,
        image: np.ndarray,
        images: list[int],
        choices: list[Choice],
    ) -> np.ndarray:
        """Judge each image by its pseudo-CLS; a row list without those that were dropped."""
        layer, count = site["layer"], len(alive)
        method = SimpleNamespace(**DEFAULTS[site["method"]] | site["params"])
        rows = np.append(np.flatnonzero(alive), count + np.arange(len(images)))
        past = np.flatnonzero(self.seen[layer - 1][: len(self.seen[layer - 1]) - count])
        start = len(self.seen[layer - 1]) - count
        columns = torch.from_numpy(np.append(past, start + rows))
        states = [
            (q[:, :, torch.from_numpy(rows)], k[:, :, columns], v[:, :, columns])
            for q, k, v in self.states[layer - method.group : layer]
        ]
        alive = alive.copy()
        for number, side in zip(images, range(len(rows) - len(images), len(rows)), strict=True):
            visual = np.flatnonzero(np.append(image, np.full(len(images), -1))[rows] == number)
            view = SimpleNamespace(
                query=states[-1][0],
                key=states[-1][1],
                value=states[-1][2],
                lower=[state[:2] for state in states[-2::-1]],
                visual_rows=torch.from_numpy(visual),
                side_row=torch.tensor([side]),
            )
            decide = METHODS[site["method"]]
            keep, scores, wanted = decide(method, view, site.get("budget") or 1 << 30)
            ids = self.patch_ids[self._raster(image, rows[visual])]
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
        return alive
