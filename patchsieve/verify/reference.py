"""The checkpoint's side of `verify`: Hugging Face in float32, layer by layer, eager.

The decoder's own modules are called in a loop of ours, because Hugging Face has none that drops
rows: a row that is dropped leaves the list of rows and keeps its position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from PIL import Image
from torch import Tensor

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError, UnsupportedModelError
from patchsieve.contract.plan import Plan, PseudoCls
from patchsieve.contract.trained import Trained
from patchsieve.export.families import family_of
from patchsieve.export.graphs.vision import Vision
from patchsieve.export.plan_graphs import plan_vision
from patchsieve.export.source.checkpoint import Checkpoint, locate, read_config
from patchsieve.export.weights import weights_of


@dataclass
class Layers:
    """What a prefill computed.

    Attributes:
        hidden: Rows after each layer, [1, L, C].
        query: Rotated queries of each layer, heads side by side, [1, L, H * D].
        key: Rotated keys of each layer, [1, G, L, D].
        value: Values of each layer, [1, G, L, D].
        logits: Of the last row, [V].
        cache: For `decode`.
        position: Of the next row.
        row_positions: Of the rows that the last layer was fed, [L]; with A rotary sections [L, A].
        row_embeddings: The same rows as they entered the decoder, [1, L, C].
        fed: Positions of the rows that each layer was fed, and which rows each saw, bool [L, L].
    """

    hidden: list[np.ndarray] = field(default_factory=list)
    query: list[np.ndarray] = field(default_factory=list)
    key: list[np.ndarray] = field(default_factory=list)
    value: list[np.ndarray] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    cache: Any = None
    position: int = 0
    row_positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    row_embeddings: np.ndarray = field(default_factory=lambda: np.zeros((1, 0, 0), np.float32))
    fed: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


class Reduced(NamedTuple):
    """What a vision module that prunes gives.

    Attributes:
        features: Of each image, [N, C].
        ids: Their raster ids, [N].
        cls: The projected CLS, [B, C].
    """

    features: list[np.ndarray]
    ids: list[np.ndarray]
    cls: np.ndarray


# Asked before a layer, given what the layers so far made: the rows that enter it, and all rows
# [1, L, C], which a method that merges changes.
Judge = Callable[[int, Layers], tuple[np.ndarray, np.ndarray]]


class Reference:
    """A checkpoint in Hugging Face.

    Args:
        checkpoint: A directory or a hub id.
        revision: Branch, tag or commit of a hub id; None for its main branch.

    Raises:
        UnsupportedModelError: The checkpoint has a structure that is not known.
    """

    def __init__(self, checkpoint: str, revision: str | None = None) -> None:
        import transformers

        directory = locate(checkpoint, revision, check=read_config)
        self.config = read_config(directory)
        self.family = family_of(self.config)
        self.facts = self.family.vision(self.config)
        self.checkpoint = Checkpoint(directory, self.family)
        self.sections = Trained.of(self.config).rotary_sections
        try:
            self.processor = self.family.processor(directory, self.config)
            self.model = self.family.load(
                directory,
                self.config,
                self.checkpoint.dequantised(),
                dtype=torch.float32,
                attn_implementation="eager",
            ).eval()
        except (OSError, ValueError) as error:
            raise PatchsieveError(
                f"transformers {transformers.__version__} does not load {checkpoint}",
                found=str(error).splitlines()[0],
                do="check that --against names a whole checkpoint that transformers knows",
            ) from error
        parts = self.family.parts(self.model)
        self.tower, self.decoder, self.head = parts.tower, parts.decoder, parts.head
        self.cache_name = cache_name(self.decoder.layers[0])
        # Greedy, and without an end, which would hide what follows
        self.model.generation_config = transformers.GenerationConfig()

    def inputs(
        self, images: list[Image.Image], messages: list[dict[str, Any]] | str
    ) -> dict[str, np.ndarray]:
        """`pixel_values` and `input_ids` [1, L] of Hugging Face's processor and chat template.

        Raises:
            UnsupportedModelError: The processor makes another number of rows of an image than the
                model does.
        """
        text = messages
        if not isinstance(messages, str):
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        made = self.processor(images=images, text=text, return_tensors="pt")
        rows = int((made["input_ids"] == self.config.image_token_id).sum())
        expected = text.count(self.processor.image_token) * self.facts.num_visual
        if rows != expected:
            raise UnsupportedModelError(
                "the checkpoint's processor_config.json and config.json disagree about an image",
                found=f"{rows} rows by the processor (vision_feature_select_strategy "
                f"{self.processor.vision_feature_select_strategy}, num_additional_image_tokens "
                f"{self.processor.num_additional_image_tokens})",
                expected=f"{expected} rows by the model (vision_feature_select_strategy "
                f"{self.config.vision_feature_select_strategy})",
                do="correct processor_config.json; the bundle follows config.json",
            )
        return {key: made[key].numpy() for key in (names.PIXEL_VALUES, "input_ids")}

    @torch.no_grad()
    def vision(self, pixel_values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Projected features [B, N, C], and the tower's rows after each of its layers."""
        pixels = torch.from_numpy(pixel_values)
        seen = self.tower(pixels, output_hidden_states=True)
        features = self.model.model.get_image_features(pixels).pooler_output
        layers = [rows.numpy() for rows in seen.hidden_states[1:]]
        return torch.stack(list(features)).numpy(), layers

    @torch.no_grad()
    def plan_vision(self, plan: Plan) -> Vision:
        """A plan's vision module on the checkpoint's weights in float32.

        Hugging Face has no tower that prunes: `vision` holds the tower itself against it.
        """
        # The space that words are compared in is the scorer's, which the checkpoint does not hold.
        plan = replace(plan, pseudo_cls=PseudoCls("none"))
        size = self.config.text_config.hidden_size
        module = plan_vision(plan, self.facts, size, None).eval()
        state = {}
        for weight in weights_of(module):
            tensor = self.checkpoint.read(weight.source).float()
            state[weight.name] = tensor.t() if weight.transposed else tensor
        module.load_state_dict(state)
        return module

    @torch.no_grad()
    def reduced(
        self, module: Vision, pixel_values: np.ndarray, noise: np.ndarray | None
    ) -> Reduced:
        """Run a plan's vision module.

        Args:
            module: What `plan_vision` gave.
            pixel_values: [B, 3, h, w].
            noise: [B, patches], where a method draws.
        """
        drawn = () if noise is None else (torch.from_numpy(noise),)
        features, ids, _, *wanted, cls = module(torch.from_numpy(pixel_values), *drawn)
        counts = wanted[0].tolist() if wanted else [module.num_visual] * len(features)
        tokens, places = (without_padding(each.numpy(), counts) for each in (features, ids))
        return Reduced(tokens, places, cls.numpy())

    @torch.no_grad()
    def embed(self, input_ids: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Embeddings with the image's features in their places, [1, L, C]."""
        ids = torch.from_numpy(input_ids)
        is_visual = ids == self.config.image_token_id
        rows = self.model.get_input_embeddings()(torch.where(is_visual, 0, ids))
        rows[is_visual] = torch.from_numpy(features).reshape(-1, rows.shape[-1])
        return rows.numpy()

    @torch.no_grad()
    def embed_text(self, ids: np.ndarray) -> np.ndarray:
        """Input embeddings of tokens [T], [T, C]."""
        return self.model.get_input_embeddings()(torch.from_numpy(ids)).numpy()

    @torch.no_grad()
    def prefill(
        self,
        embeddings: np.ndarray,
        positions: np.ndarray,
        image_index: np.ndarray | None,
        judges: Mapping[int, Judge],
    ) -> Layers:
        """Feed rows through the decoder.

        Args:
            embeddings: Rows, and after them a side row for each image, if any; [1, L0 + M, C].
            positions: Of the L0 rows, and of the one after them, [L0 + 1]; [L0 + 1, A] for a model
                with A rotary sections.
            image_index: Image of each row, -1 for text, [L0]; None if there are no side rows.
            judges: What is asked before a layer.
        """
        import transformers

        out = Layers(cache=transformers.DynamicCache(config=self.config.text_config))
        x, count = torch.from_numpy(embeddings), len(positions) - 1
        out.position = int(positions[-1].max())
        places, last_seen = positions[:-1], np.arange(count)
        if image_index is not None:
            side, seen = side_rows(positions, image_index)
            places, last_seen = np.concatenate((places, side)), np.append(last_seen, seen)
        row = np.arange(len(places))  # each row's place among those that came in
        for index in range(len(self.decoder.layers)):
            if index in judges:
                kept, hidden = judges[index](index, out)
                x, row = torch.from_numpy(hidden)[:, kept], row[kept]
            seen_by = (row <= last_seen[row, None]) | (row == row[:, None])  # [L, L]
            out.row_positions, out.row_embeddings = places[row], embeddings[:, row]
            out.fed.append((out.row_positions, seen_by))
            at = torch.from_numpy(out.row_positions)
            x, query = self.layer(index, x, at, out.cache, torch.from_numpy(seen_by))
            made = out.cache.layers[index]
            out.hidden.append(x.numpy())
            out.query.append(query.numpy())
            out.key.append(made.keys.numpy())
            out.value.append(made.values.numpy())
            stays = int((row < count).sum())  # the rows to come do not see side rows
            made.keys, made.values = made.keys[:, :, :stays], made.values[:, :, :stays]
        out.logits = self.logits(x)
        return out

    @torch.no_grad()
    def next_layer(self, layer: int, made: Layers) -> tuple[Tensor, Tensor]:
        """Rotated queries [1, H, L, D] and keys [1, G, L, D] that a layer would make of all rows.

        Args:
            layer: Not yet run.
            made: What the layers before it made.
        """
        x = torch.from_numpy(made.hidden[layer - 1])
        angles = self._angles(x, torch.from_numpy(made.row_positions))
        return self._rotated(layer, x, angles)

    @torch.no_grad()
    def decode(self, layers: Layers, count: int, said: Sequence[int] = ()) -> np.ndarray:
        """Logits of tokens after a prefill, end tokens or not, [count, V].

        Args:
            layers: What the prefill made.
            count: How many.
            said: The tokens; greedy ones after these.
        """
        logits = [layers.logits]
        while len(logits) < count:
            greedy = int(logits[-1].argmax())
            token = said[len(logits) - 1] if len(logits) <= len(said) else greedy
            x = self.model.get_input_embeddings()(torch.tensor([[token]]))
            for index in range(len(self.decoder.layers)):
                x, _ = self.layer(index, x, torch.tensor([layers.position]), layers.cache)
            layers.position += 1
            logits.append(self.logits(x))
        return np.stack(logits)

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Logits of greedy tokens of Hugging Face's `generate`, end tokens or not, [count, V]."""
        tensors: dict[str, Any] = {key: torch.from_numpy(value) for key, value in inputs.items()}
        made = self.model.generate(
            **tensors,
            do_sample=False,
            max_new_tokens=count,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.cat(made.logits).numpy()

    def layer(
        self, index: int, x: Tensor, positions: Tensor, cache: Any, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One decoder layer: rows [1, L, C] after it and its rotated queries [1, L, H * D].

        `seen` holds which rows a row sees, bool [L, L]; None: all that are there.
        """
        angles = self._angles(x, positions)
        mask = None
        if seen is not None:
            mask = torch.where(seen, 0.0, torch.finfo(x.dtype).min)[None, None]  # [1, 1, L, L]
        query = self._rotated(index, x, angles)[0].transpose(1, 2).flatten(2)  # [1, L, H * D]
        x = self.decoder.layers[index](
            x,
            attention_mask=mask,
            position_embeddings=angles,
            use_cache=True,
            **{self.cache_name: cache},
        )
        return x, query

    def _rotated(self, index: int, x: Tensor, angles: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """A layer's queries [1, H, L, D] and keys [1, G, L, D] of rows [1, L, C]."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        layer = self.decoder.layers[index]
        attention, rows = layer.self_attn, layer.input_layernorm(x)
        query, key = (
            projection(rows).view(1, rows.shape[1], -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        return apply_rotary_pos_emb(query, key, *angles)

    def _angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines of rows, [1, L, D] each; positions: [L] or [L, A]."""
        if positions.ndim == 1:
            return self.decoder.rotary_emb(x, position_ids=positions[None])
        by_axis = [self.decoder.rotary_emb(x, position_ids=axis[None]) for axis in positions.T]
        sections = list(self.sections) * 2  # both halves of a head turn by the same frequencies
        return tuple(
            torch.cat(
                [
                    each[i % len(each)].split(sections, dim=-1)[i]  # [1, L, section]
                    for i in range(len(sections))
                ],
                dim=-1,
            )
            for each in zip(*by_axis, strict=True)
        )

    def logits(self, x: Tensor) -> np.ndarray:
        """Logits [V] of the last of rows [1, L, C]."""
        return self.head(self.decoder.norm(x[:, -1]))[0].numpy()


def cache_name(layer: torch.nn.Module) -> str:
    """The argument by which a decoder layer takes its cache.

    transformers 5.40 removes `past_key_values`; the first releases of 5 know no `cache`.
    """
    taken = inspect.signature(layer.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def without_padding(values: np.ndarray, counts: Iterable[int]) -> list[np.ndarray]:
    """The first rows of each image, of [B, N, ...] as many as `counts` says."""
    return [rows[:count] for rows, count in zip(values, counts, strict=True)]


def side_rows(positions: np.ndarray, image_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each image's side row, and the last row that it sees apart from itself, [M] each.

    Args:
        positions: Of the rows, and of the one after them, [L0 + 1].
        image_index: Image of each row, -1 for text, [L0].
    """
    numbers = range(image_index.max() + 1)
    last = np.array([np.flatnonzero(image_index == number)[-1] for number in numbers])
    text = np.append(np.flatnonzero(image_index < 0), len(image_index))
    following = [text[text > row][0] for row in last]  # the first text, whose position it shares
    return positions[following], last


def tapped(path: Path, has_products: bool) -> bytes:
    """A graph whose rows after each layer are outputs too, and what each matrix makes if wanted."""
    model = onnx.load(str(path), load_external_data=False)
    present = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            is_rows = name.endswith(".output") and "layers." in name
            is_product = has_products and name.endswith(names.PRODUCT)
            if (is_rows or is_product) and name not in present:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return model.SerializeToString()
