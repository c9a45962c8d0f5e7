"""Blocks and linears read from structure; what cannot be edited column by column is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import model_zoo
from holdfast.errors import ModelError
from holdfast.models.families import decoder_blocks, editable_linears, language_model
from holdfast.models.loaded import LoadedModel


class Wrapper(nn.Module):
    """A decoder in a wrapper whose names no list would hold, beside a larger list of blocks that is no decoder."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.eyes = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.talker = nn.Module()
        self.talker.words = nn.Embedding(10, 8)
        self.talker.heads = nn.ModuleList([nn.Linear(8, 2)])
        self.talker.stack = nn.ModuleList([block, nn.Linear(8, 8)])

    def get_input_embeddings(self) -> nn.Module:
        return self.talker.words


def test_the_largest_list_of_blocks_beside_the_token_embeddings_is_the_decoder() -> None:
    model = Wrapper(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)))
    assert language_model(model)[0] == "talker"  # type: ignore[arg-type]
    assert [name for name, _ in decoder_blocks(model)] == ["talker.stack.0", "talker.stack.1"]  # type: ignore[arg-type]
    assert list(editable_linears(model)) == ["talker.stack.0.0", "talker.stack.0.1", "talker.stack.1"]  # type: ignore[arg-type]


def test_blocks_are_chosen_by_index(loaded: LoadedModel) -> None:
    chosen = editable_linears(loaded.model, [1])
    assert chosen and all(".layers.1." in name for name in chosen)
    with pytest.raises(ModelError, match=r"Block 2 does not exist; LlavaForConditionalGeneration has blocks 0\.\.1"):
        editable_linears(loaded.model, [2])


def test_a_transposed_layer_is_refused() -> None:
    model = Wrapper(nn.Sequential(nn.Linear(8, 32), Conv1D(8, 32)))
    with pytest.raises(ModelError, match=r"talker\.stack\.0\.1 is a transposed Conv1D"):
        editable_linears(model)  # type: ignore[arg-type]


def test_a_convolution_over_positions_is_no_expert() -> None:
    model = Wrapper(nn.Sequential(nn.Linear(8, 32), nn.Conv1d(8, 8, 3)))
    assert list(editable_linears(model)) == ["talker.stack.0.0", "talker.stack.1"]  # type: ignore[arg-type]


def test_experts_in_one_tensor_are_refused() -> None:
    text = model_zoo.text_config(
        rope_parameters=model_zoo.MROPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    with pytest.raises(ModelError, match=r"mixture of experts in one \(4, .*use the dense variant"):
        editable_linears(model)


def test_a_model_without_token_embeddings_is_refused() -> None:
    model = Wrapper(nn.Linear(8, 8))
    model.get_input_embeddings = lambda: None  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ModelError, match="has no token embeddings"):
        decoder_blocks(model)  # type: ignore[arg-type]
