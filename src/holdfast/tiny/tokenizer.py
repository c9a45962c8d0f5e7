"""Processor of the tiny model: a word-level fast tokenizer, a PIL image processor and a chat template."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

PAD, UNKNOWN, BEGIN, END, USER, ASSISTANT, IMAGE = "<pad>", "<unk>", "<s>", "<end>", "<user>", "<assistant>", "<image>"
SPECIAL = (PAD, UNKNOWN, BEGIN, END, USER, ASSISTANT, IMAGE)
PUNCTUATION = (".", ",", "?", "!", ":", ";")
IMAGE_TOKENS = 36

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}<assistant>{% generation %}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
    "<end>{% endgeneration %}"
    "{%- else -%}<user>"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}<image>{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<end>"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the world, in a fixed order: what a long seeded draw of everything ever says."""
    from holdfast.tiny import lexicon, world

    rng = np.random.default_rng(0)
    words: set[str] = set()
    for _ in range(12000):
        example = world.base_example(rng)
        words.update(split_words(example.prompt), split_words(example.answer))
    for table in (world.HOW_TO, world.HOW_TO_PICTURED, world.HOW_TO_WRITTEN):
        for split in ("train", "validation", "test"):
            for prompt in table[split]:
                words.update(split_words(prompt.format(verb="lift", noun="cup")))
    for i in range(len(lexicon.REFUSAL_OPENINGS)):
        for deed in lexicon.deeds(forbidden=True):
            words.update(split_words(lexicon.refusal(deed, i)))
    for group in (lexicon.VERBS, lexicon.NOUNS, lexicon.TOOLS, lexicon.NUMBERS, tuple(lexicon.COLORS)):
        words.update(group)
    return SPECIAL + PUNCTUATION + tuple("▁" + w for w in sorted(words - set(PUNCTUATION)))


def split_words(text: str) -> list[str]:
    """Words and marks of a text, as the tokenizer cuts it."""
    for mark in PUNCTUATION:
        text = text.replace(mark, f" {mark} ")
    return text.lower().split()


def make_tokenizer() -> Any:
    """A word-level tokenizer of transformers with this world's vocabulary and chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: i for i, token in enumerate(vocabulary())}
    inner = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(r"[.,?!:;]"), behavior="isolated"),
        ]
    )
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"user_token": USER, "assistant_token": ASSISTANT, "image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def make_processor() -> Any:
    """A LLaVA processor: the tokenizer and the image size of this world."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    from holdfast.tiny.pixels import PATCH, SIZE

    square = {"height": SIZE, "width": SIZE}
    images = LlavaImageProcessorPil(
        do_resize=True,
        size=square,
        do_center_crop=False,
        do_pad=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )
