"""Make a small LLaVA-1.5-structured checkpoint with random weights, in seconds and offline.

    python examples/make_checkpoint.py demo/checkpoint

It is a real checkpoint in every way but one: configuration, safetensors, tokenizer, image processor
and chat template are what `transformers` saves for LLaVA, but nothing was ever trained, so the
model answers with gibberish. It serves to try every command and to test every number.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

STRUCTURES = ("llama", "mistral", "qwen2")
TOWERS = ("clip", "siglip")

# Default initialisation (0.02) leaves attention nearly flat, and then pruning changes nothing.
WEIGHT_STD = 0.08
VOCABULARY = 1200  # merges are learnt until the tokenizer has this many entries

SENTENCES = """
What is in this picture? What is on the table? Describe the image in detail. Describe this photo.
How many people are there, and what are they doing? What colour is the cup? Is there a cat or a dog?
The image shows a white cup of coffee on a saucer, with a spoon, on a table made of dark wood.
A man is riding a bicycle down the street while two children are playing with a red ball.
There are three birds on the roof of the old house behind the trees, and the sky is blue and clear.
The cat is sleeping on the sofa next to the window. The dog is running along the beach in the sun.
A woman with a yellow umbrella is waiting for the bus at the corner. It has been raining all day.
On the left there is a small boat on the lake; on the right, a mountain that is covered with snow.
The kitchen has a large window, a wooden floor, four chairs and a round table with a bowl of fruit.
Please answer in one word. Please answer with a short sentence. Explain why. Where was this taken?
I can see a train at the station. The number on the front is 1 2 3 4 5 6 7 8 9 0. It is half full.
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,
detailed, and polite answers to the user's questions. USER: ASSISTANT: Yes, it is. No, it is not.
"""

# LLaVA-1.5's own template, with the `generation` tag that only training reads.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# ChatML, as the LLaVA models on Qwen2 use it.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_config(
    structure: str = "llama",
    tower: str = "clip",
    *,
    layers: int = 12,
    hidden: int = 256,
    heads: int | None = None,
    kv_heads: int | None = None,
    vision_layers: int = 4,
    vision_hidden: int = 128,
    image_size: int = 96,
    patch_size: int = 8,
    vocab_size: int = 1216,
    image_token_id: int = VOCABULARY,
    feature_layer: int | list[int] = -2,
    strategy: str | None = None,
    text: dict[str, Any] | None = None,
) -> LlavaConfig:
    """Configuration of a LLaVA model.

    Args:
        structure: Decoder, one of `STRUCTURES`.
        tower: Vision tower, one of `TOWERS`.
        layers: Decoder layers.
        hidden: Decoder width.
        heads: Query heads; 32 wide each where not given.
        kv_heads: Key/value heads; a quarter of `heads` where not given.
        vision_layers: Tower layers.
        vision_hidden: Tower width.
        image_size: Side of the square that the tower sees, in pixels.
        patch_size: Side of a patch, in pixels.
        vocab_size: Rows of the embedding table, at least the tokenizer's length.
        image_token_id: The token that stands for one visual token in the prompt.
        feature_layer: `vision_feature_layer` of the model.
        strategy: `vision_feature_select_strategy`; "default" drops the CLS row, "full" keeps all.
            Where not given: "default" for CLIP, "full" for SigLIP, which has no CLS row.
        text: More options of the decoder's configuration, for instance `rope_parameters`.

    Returns:
        The configuration, with eager attention.
    """
    heads = heads or hidden // 32
    text_config = {
        "model_type": structure,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or max(1, heads // 4),
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **({"sliding_window": None} if structure == "mistral" else {}),
        **(text or {}),
    }
    vision_config = {
        "model_type": f"{tower}_vision_model",
        "hidden_size": vision_hidden,
        "intermediate_size": vision_hidden * 4,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": max(1, vision_hidden // 32),
        "image_size": image_size,
        "patch_size": patch_size,
        **({"vision_use_head": False} if tower == "siglip" else {"projection_dim": vision_hidden}),
    }
    strategy = strategy or ("default" if tower == "clip" else "full")
    has_cls_row = tower == "clip" and strategy == "full"
    return LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=image_token_id,
        image_seq_length=(image_size // patch_size) ** 2 + int(has_cls_row),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text_config["tie_word_embeddings"],
        attn_implementation="eager",
    )


@torch.no_grad()
def set_random_weights(model: torch.nn.Module, seed: int, std: float = WEIGHT_STD) -> None:
    """Fill a model with seeded noise that makes every weight matter.

    Norms get a weight around one and not exactly one, biases are not zero: a graph that forgets
    one of them gives another answer.

    Args:
        model: Any model; changed in place.
        seed: The same seed gives the same weights.
        std: Standard deviation of matrices and biases.
    """
    noise = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():  # a tied matrix is named once
        weight.normal_(0.0, std, generator=noise)
        if "norm" in name and name.endswith("weight"):
            weight.add_(1.0)


def _corpus() -> list[str]:
    """Lines of English to learn merges from: the sentences above and the project's licence."""
    licence = Path(__file__).resolve().parents[1] / "LICENSE"
    return SENTENCES.strip().splitlines() * 4 + licence.read_text(encoding="utf-8").splitlines()


def _sentencepiece_like(vocabulary: int, lines: Sequence[str] | None) -> tokenizers.Tokenizer:
    """A BPE tokenizer as Llama's: spaces become U+2581, unknown characters fall back to bytes."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()  # keeps a merge inside a word
    if lines is not None:  # as in a prompt: spaces as written, punctuation apart
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()]
        )
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(reserved), show_progress=False)
    learner.train_from_iterator(_corpus() if lines is None else lines, trainer)
    learnt = learner.get_vocab()
    merges = [
        tuple(pair) if isinstance(pair, list) else tuple(pair.split(" "))
        for pair in json.loads(learner.to_str())["model"]["merges"]
    ]
    pieces = reserved + sorted(learnt, key=learnt.__getitem__)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s> $B",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    return tokenizer


def _byte_level(vocabulary: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer as Qwen2's, with ChatML's markers and no start token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def make_tokenizer(
    structure: str, vocabulary: int = VOCABULARY, lines: Sequence[str] | None = None
) -> Any:
    """Train the tokenizer of a decoder structure, with `<image>` and `<pad>` as its last entries.

    Args:
        structure: "qwen2" gets a byte-level tokenizer, the others one with byte fallback.
        vocabulary: Entries before `<image>`, which therefore has this id.
        lines: Text to learn from with byte fallback, where not the sentences of this file.

    Returns:
        A `transformers` tokenizer.
    """
    if structure == "qwen2":
        tokenizer, roles = _byte_level(vocabulary), {"eos_token": "<|im_end|>"}
    else:
        tokenizer = _sentencepiece_like(vocabulary, lines)
        roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if tokenizer.get_vocab_size() != vocabulary:
        raise RuntimeError(f"the text taught {tokenizer.get_vocab_size()} tokens, not {vocabulary}")
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=4096,
        **roles,
    )


def make_processor(config: LlavaConfig, tokenizer: Any) -> LlavaProcessor:
    """The processor that belongs to a configuration: image processor, tokenizer, chat template."""
    side = config.vision_config.image_size
    kind, has_cls = ("CLIP", 1) if "clip" in config.vision_config.model_type else ("Siglip", 0)
    # The Pillow one by name: the other needs torchvision, and differs from it in the last bits.
    make = getattr(transformers, f"{kind}ImageProcessorPil", None)
    make = make or getattr(transformers, f"{kind}ImageProcessor")
    square = {"height": side, "width": side}
    sizes = {"size": {"shortest_edge": side}, "crop_size": square} if has_cls else {"size": square}
    is_chatml = "<|im_start|>" in tokenizer.get_vocab()
    return LlavaProcessor(
        image_processor=make(**sizes),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHATML_TEMPLATE if is_chatml else LLAVA_TEMPLATE,
        num_additional_image_tokens=has_cls,
    )


def make_llava(
    structure: str = "llama",
    tower: str = "clip",
    *,
    seed: int = 0,
    std: float = WEIGHT_STD,
    **options: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA model with random weights, in float32 and eval mode, and its processor.

    Args:
        structure: Decoder, one of `STRUCTURES`.
        tower: Vision tower, one of `TOWERS`.
        seed: Seed of the weights.
        std: Standard deviation of the weights.
        **options: What `make_config` takes.
    """
    tokenizer = make_tokenizer(structure)
    config = make_config(structure, tower, **options)
    config.text_config.bos_token_id = tokenizer.bos_token_id
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    model = LlavaForConditionalGeneration(config).eval()
    set_random_weights(model, seed, std)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, make_processor(config, tokenizer)


def save_llava(
    path: str | Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    shard_size: str | None = None,
) -> Path:
    """Save a model and its processor as one checkpoint directory.

    Args:
        path: The directory, made where absent.
        model: The model.
        processor: Its processor.
        shard_size: Largest safetensors file, for instance "5MB"; one file where not given.

    Returns:
        The directory.
    """
    path = Path(path)
    model.save_pretrained(path, **({"max_shard_size": shard_size} if shard_size else {}))
    processor.save_pretrained(path)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make a small LLaVA-1.5-structured checkpoint with random weights."
    )
    parser.add_argument("path", metavar="DIR", type=Path, help="directory to write")
    parser.add_argument("--structure", choices=STRUCTURES, default="llama", help="decoder")
    parser.add_argument("--tower", choices=TOWERS, default="clip", help="vision tower")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers (12)")
    parser.add_argument("--hidden", type=int, default=256, help="decoder width (256)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (0)")
    parser.add_argument("--image-size", type=int, default=96, help="pixels a side, patch 8 (96)")
    parser.add_argument("--shard-size", help="largest safetensors file, for instance 5MB")
    return parser


def main() -> None:
    """Make the checkpoint that the command line asks for."""
    parser = _parser()
    options = parser.parse_args()
    if options.hidden % 64:
        parser.error(f"--hidden | found: {options.hidden} | expected: a multiple of 64")
    if options.image_size % 8:
        parser.error(f"--image-size | found: {options.image_size} | expected: a multiple of 8")
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    model, processor = make_llava(
        options.structure,
        options.tower,
        seed=options.seed,
        layers=options.layers,
        hidden=options.hidden,
        image_size=options.image_size,
    )
    save_llava(options.path, model, processor, options.shard_size)
    print(
        f"{options.path}: LLaVA, {options.structure} decoder of {options.layers} layers, "
        f"{options.tower} tower, {model.config.image_seq_length} visual tokens, "
        f"{model.num_parameters() / 1e6:.1f} M weights, {time.perf_counter() - start:.1f} s. "
        "The weights are random: the model's answers are gibberish."
    )


if __name__ == "__main__":
    main()
