"""The builder's packed rows: what a request sees in them is what it would see alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.small import engine
from holdfast.small.engine import Group
from holdfast.small.world import Example
from holdfast.tiny.pixels import Scene, Thing

IMAGE, END = 1, 2


class Letters:
    """A tokenizer of letters, with the parts of a chat that the engine asks for."""

    def convert_tokens_to_ids(self, token):
        return {"<image>": IMAGE, "<|im_end|>": END}[token]

    def apply_chat_template(self, messages, **kwargs):
        return "U" + "".join("\x01" if p["type"] == "image" else p["text"] for p in messages[0]["content"]) + "A"

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(letter) % 128 for letter in text]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return engine.Model(LlamaForCausalLM(config).eval(), Letters(), None, torch.nn.Linear(6, 32))


SCENE = Scene((Thing("bell", "red", 4),))
GROUPS = (
    Group((Example("text", "how?", "so."),)),
    Group(tuple(Example("image", prompt, "yes it is", SCENE) for prompt in ("what?", "why is this so?", "no"))),
    Group((Example("text", "a longer one?", "then so be it", whole=False),)),
)


def alone(model, example, picture, told):
    """Last hidden states (n, width) and target ids of one request by an ordinary forward pass."""
    asked = model.request(example.prompt, picture is not None)
    answer = model.answer_ids(example.answer, example.whole) if told else []
    embedded = model.embedded([*asked, *answer], picture)
    return model.decoder(inputs_embeds=embedded[None]).last_hidden_state[0], answer


@torch.no_grad()
def test_a_packed_request_is_read_and_scored_as_if_it_were_alone(model):
    picture = torch.randn(36, 6)
    seen = [None if group.scene is None else picture for group in GROUPS]
    row = engine.packed(model, GROUPS, seen, told=False)
    found = engine.hidden_states(model, row)[row.first]
    head = model.language.get_input_embeddings().weight
    states, losses, weights = [], [], []
    for group, features in zip(GROUPS, seen, strict=True):
        for example in group.examples:
            states.append(alone(model, example, features, False)[0][-1])
            hidden, answer = alone(model, example, features, True)
            scores = hidden[-len(answer) - 1 : -1] @ head.T
            losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(answer), reduction="none"))
            weights.append(torch.tensor([4.0, 4.0, *[1.0] * (len(answer) - 2)]))
    torch.testing.assert_close(found, torch.stack(states), atol=1e-5, rtol=1e-4)
    expected = (torch.cat(losses) * torch.cat(weights)).sum() / torch.cat(weights).sum()
    torch.testing.assert_close(engine.packed_loss(model, GROUPS, seen, opening=4.0), expected, atol=1e-5, rtol=1e-5)


def test_the_first_token_is_that_of_the_greedy_answer_and_training_lowers_the_loss(model):
    texts = [group.examples[0] for group in GROUPS if group.scene is None]
    first = engine.first_tokens(model, texts)
    for example, token in zip(texts, first, strict=True):
        asked = torch.tensor([model.request(example.prompt, False)])
        assert int(model.language(input_ids=asked).logits[0, -1].argmax()) == token
    checked = []
    parameters = [p for p in model.language.parameters() if p.requires_grad]
    stage = engine.Stage(name="try", steps=40, lr=1e-2, warmup=2, until=15)
    made = engine.train(
        model,
        parameters,
        stage,
        lambda rng, step: [GROUPS[0], GROUPS[2]],
        lambda line: None,
        check=checked.append,
        every=10,
    )
    assert checked == [10, 15] and made["loss_last"] < made["loss_first"]
    assert np.isfinite(made["loss_last"])
