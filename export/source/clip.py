"""Where CLIP's text tower and projections come from: open_clip, or a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from patchsieve.contract.errors import BackendMissingError, PatchsieveError, UnsupportedModelError
from patchsieve.export.families.specs import TextSpec
from patchsieve.export.source.checkpoint import Checkpoint, locate

DEFAULT_MODEL, DEFAULT_TAG = "ViT-L-14-336-quickgelu", "openai"
_OPEN_CLIP = "open_clip"


class Tensors(Protocol):
    """Tensors by Hugging Face's names."""

    def read(self, name: str) -> Tensor:
        """Read one tensor."""

    def require(self, wanted: dict[str, tuple[int, ...]], model: str) -> None:
        """Refuse a source that lacks a tensor or holds one of another shape."""


@dataclass(frozen=True)
class ClipSource:
    """A CLIP model of which export takes the text tower and the projections.

    Attributes:
        name: What it was asked for by.
        text: The text tower's measures.
        tokenizer: Text of its tokenizer.json.
        bos_id: Begins a text.
        eos_id: Ends it.
        tensors: Its weights, by the names that Hugging Face gives them.
    """

    name: str
    text: TextSpec
    tokenizer: str
    bos_id: int
    eos_id: int
    tensors: Tensors


def open_source(source: str) -> ClipSource:
    """Find a CLIP model.

    Args:
        source: `open_clip`, `open_clip:MODEL:TAG`, `open_clip:MODEL:/path/to/weights` (MODEL may be
            a model's JSON file), or a Hugging Face directory or hub id.

    Raises:
        BackendMissingError: open_clip is asked for and not installed.
        UnsupportedModelError: It is no CLIP, or its text tower has another structure.
        PatchsieveError: It is not there.
    """
    kind, _, rest = source.partition(":")
    if kind != _OPEN_CLIP:
        return _from_hugging_face(source)
    model, _, pretrained = rest.partition(":")
    if not model:
        model, pretrained = DEFAULT_MODEL, DEFAULT_TAG
    if not pretrained:
        raise PatchsieveError(
            "an open_clip model without weights would be random",
            found=source,
            expected=f"open_clip:{model}:TAG, or open_clip:{model}:/path/to/weights",
            do="see open_clip.list_pretrained()",
        )
    return _from_open_clip(source, model, pretrained)


# Hugging Face.


def _from_hugging_face(source: str) -> ClipSource:
    from transformers import AutoTokenizer, CLIPConfig

    directory = locate(source)
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PatchsieveError(
            f"cannot read {path}",
            found=error,
            do="give --scorer a directory that holds a CLIP, or open_clip",
        ) from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type != "clip":
        raise UnsupportedModelError(
            f"the scorer {source} is no CLIP model",
            found=f"model_type {model_type!r}",
            expected="clip, with its text and its image tower",
            do="give the CLIP that the vision tower was trained with, such as "
            "openai/clip-vit-large-patch14-336",
        )
    config: Any = CLIPConfig.from_dict(raw)
    text = config.text_config
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise PatchsieveError(
            f"the scorer {source} has no tokenizer",
            found=str(error).splitlines()[0],
            do="copy its tokenizer's files into the directory of --scorer",
        ) from error
    spec = TextSpec(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        window=text.max_position_embeddings,
        width=config.projection_dim,
        norm_eps=text.layer_norm_eps,
        activation=text.hidden_act,
    )
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id
    return _checked(source, spec, tokenizer.backend_tokenizer.to_str(), ids, Checkpoint(directory))


# open_clip.


class _Table:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return self.tensors[name]

    def require(self, wanted: dict[str, tuple[int, ...]], model: str) -> None:
        """Refuse a source that lacks a tensor or holds one of another shape."""
        for name, shape in wanted.items():
            found = self.tensors.get(name)
            if found is None or tuple(found.shape) != shape:
                raise UnsupportedModelError(
                    f"{name} is not what {model} should hold",
                    found="no such tensor" if found is None else list(found.shape),
                    expected=list(shape),
                    do="give --scorer the weights of this model",
                )


def _from_open_clip(source: str, name: str, pretrained: str) -> ClipSource:
    try:
        import open_clip
    except ImportError as error:
        raise BackendMissingError(
            "open_clip is not installed",
            found=str(error).splitlines()[0],
            do="pip install open_clip_torch",
        ) from error

    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    try:
        model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise PatchsieveError(
            f"open_clip does not load {name} with {pretrained}",
            found=" ".join(str(error).split())[:200],
            expected="one of open_clip.list_pretrained(), or a file of weights",
            do="correct --scorer open_clip:MODEL:TAG",
        ) from error
    tower = getattr(model, "text", model)  # some models hold it as a part
    _check_open_clip(source, tower, tokenizer)
    blocks = tower.transformer.resblocks
    gelu = type(blocks[0].mlp.gelu).__name__
    spec = TextSpec(
        vocab_size=tower.token_embedding.num_embeddings,
        hidden_size=tower.token_embedding.embedding_dim,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_layers=len(blocks),
        num_heads=blocks[0].attn.num_heads,
        window=tower.context_length,
        width=tower.text_projection.shape[1],
        norm_eps=tower.ln_final.eps,
        activation="quick_gelu" if gelu == "QuickGELU" else "gelu",
    )
    tensors = _Table(_hugging_face_names(tower, model.visual))
    ids = tokenizer.sot_token_id, tokenizer.eot_token_id
    return _checked(source, spec, tokenizer_json(tokenizer), ids, tensors)


def _check_open_clip(source: str, tower: Any, tokenizer: Any) -> None:
    """Refuse what is not built as CLIP's own text tower."""
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    is_clip = (
        blocks is not None
        and all(
            isinstance(getattr(block, "attn", None), torch.nn.MultiheadAttention)
            and isinstance(block.ls_1, torch.nn.Identity)
            for block in blocks
        )
        and tower.attn_mask is not None
        and getattr(tower, "cls_emb", None) is None
        and isinstance(tower.text_projection, Tensor)
        and hasattr(tokenizer, "bpe_ranks")
    )
    if not is_clip:
        raise UnsupportedModelError(
            f"the text tower of {source} is not built as CLIP's",
            expected="a causal tower with a projection and CLIP's own tokenizer",
            do=f"choose another model, such as open_clip:{DEFAULT_MODEL}:{DEFAULT_TAG}",
        )


def _hugging_face_names(tower: Any, visual: Any) -> dict[str, Tensor]:
    """The tensors that export may ask for, as Hugging Face names and cuts them."""
    named = {
        "text_model.embeddings.token_embedding.weight": tower.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": tower.positional_embedding,
        "text_model.final_layer_norm.weight": tower.ln_final.weight,
        "text_model.final_layer_norm.bias": tower.ln_final.bias,
        "text_projection.weight": tower.text_projection.t(),
    }
    for index, block in enumerate(tower.transformer.resblocks):
        named |= _block(f"text_model.encoder.layers.{index}.", block)
    if isinstance(getattr(visual, "proj", None), Tensor):  # else its image tower is another's
        named["visual_projection.weight"] = visual.proj.t()
        named["vision_model.post_layernorm.weight"] = visual.ln_post.weight
        named["vision_model.post_layernorm.bias"] = visual.ln_post.bias
        for index, block in enumerate(visual.transformer.resblocks):
            named |= _block(f"vision_model.encoder.layers.{index}.", block)
    return {name: tensor.detach() for name, tensor in named.items()}


def _block(prefix: str, block: Any) -> dict[str, Tensor]:
    """One layer: its three projections lie in one matrix."""
    named: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        together = getattr(block.attn, f"in_proj_{kind}").chunk(3)
        for part, tensor in zip(("q_proj", "k_proj", "v_proj"), together, strict=True):
            named[f"{prefix}self_attn.{part}.{kind}"] = tensor
        for ours, theirs in (
            ("self_attn.out_proj", block.attn.out_proj),
            ("layer_norm1", block.ln_1),
            ("layer_norm2", block.ln_2),
            ("mlp.fc1", block.mlp.c_fc),
            ("mlp.fc2", block.mlp.c_proj),
        ):
            named[f"{prefix}{ours}.{kind}"] = getattr(theirs, kind)
    return named


def tokenizer_json(tokenizer: Any) -> str:
    """open_clip's own tokenizer as a tokenizers file, which keeps each token's place in the text.

    Differs from open_clip: of ftfy's repairs only curly quotes are made straight; broken encodings
    and HTML escapes stay as they are.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    made = Tokenizer(
        models.BPE(
            vocab=dict(tokenizer.encoder),
            merges=list(tokenizer.bpe_ranks),
            end_of_word_suffix="</w>",
            unk_token=tokenizer.decoder[tokenizer.eot_token_id],
        )
    )
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
            normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return made.to_str()


# Both.


def _checked(
    source: str, spec: TextSpec, tokenizer: str, ids: tuple[Any, Any], tensors: Tensors
) -> ClipSource:
    """Refuse ids that the tower does not hold."""
    if not all(type(i) is int and 0 <= i < spec.vocab_size for i in ids):
        raise UnsupportedModelError(
            f"the scorer {source} has a tokenizer that does not fit it",
            found=f"ids {ids} of the marks",
            expected=f"two ids below {spec.vocab_size}",
            do="give --scorer a CLIP with its own tokenizer",
        )
    return ClipSource(source, spec, tokenizer, *ids, tensors)
