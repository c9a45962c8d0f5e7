"""Every family is asked the same questions, offline, on microscopic random models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoProcessor

import model_zoo
from holdfast.calibration.curvature import collect_curvature
from holdfast.calibration.gram_sets import GramSets, collect_grams
from holdfast.calibration.walk import walk_grams
from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.merged import open_checkpoint
from holdfast.data.images import PictureConfig, shrunk
from holdfast.data.images import pictures as pictures_opened
from holdfast.data.types import Sample, Turn
from holdfast.editing.editor import edit_checkpoint
from holdfast.errors import CalibrationError, DataError
from holdfast.functional.anchor import anchor_weight
from holdfast.functional.hpa import HpaConfig, edit_weight
from holdfast.models.encode import IMAGE, encode_request, encode_training, token_kinds
from holdfast.models.families import decoder_blocks, editable_linears
from holdfast.models.generate import generate
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.models.streaming import load_streamed
from holdfast.rules.anchor import AnchorConfig, AnchorRule
from holdfast.rules.hpa import HpaRule
from holdfast.stream.protocol import Checkpoint
from holdfast.training.supervised import lora_adapter, train
from holdfast.training.training_config import TrainingConfig

# Layers of one block in a plain gated decoder; GLM fuses gate and up into one.
LINEARS = dict.fromkeys(model_zoo.BUILDERS, 7) | {"glm4v": 6}

# Families that are asked one question about a picture, and nothing else.
ONE_PICTURED_QUESTION = {"paligemma"}

# Families whose adapter the no-op guard loads in a clean process of its own (seconds each): names on disk as in memory,
# renamed on load, and a vision tower that is no CLIP.
RELOADED = ("llava", "qwen2_5_vl", "gemma3")


@dataclass(frozen=True)
class Case:
    """One family: its folder, the model as built, the model as loaded, and samples that it can take."""

    name: str
    folder: Path
    loaded: LoadedModel
    built_logits: Tensor
    samples: list[Sample]


@pytest.fixture(scope="module", params=list(model_zoo.BUILDERS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures: list[Path]) -> Case:
    name = request.param
    folder = tmp_path_factory.mktemp("families") / name
    model, processor = model_zoo.BUILDERS[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded = load(folder, device="cpu")
    assert loaded.family.needs_image == loaded.family.answers_as_suffix == (name in ONE_PICTURED_QUESTION)
    samples = [
        Sample.single("one", "<image>\nWhat colour?", "Red.", images=pictures[:1]),
        Sample.single("other", "<image>\nWhich shape is it then?", "A circle", images=pictures[1:2]),
    ]
    if not loaded.family.needs_image:
        samples.append(Sample.single("text", "Say hello.", "Hello"))
    with torch.no_grad():
        logits = model(**encode_request(loaded, samples[:1])).logits
    return Case(name, folder, loaded, logits, samples)


def hessians(loaded: LoadedModel, samples: list[Sample], passes: int | None = None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    walk_grams(
        loaded,
        samples,
        lambda layer: found.update(dict.fromkeys(layer.modules, layer.gram.hessian())),
        blocks_per_pass=passes,
    )
    return found


def test_saved_and_loaded_it_says_the_same(case: Case) -> None:
    with torch.no_grad():
        logits = case.loaded.model(**encode_request(case.loaded, case.samples[:1])).logits
    torch.testing.assert_close(logits, case.built_logits, rtol=1e-4, atol=1e-4)


def test_blocks_and_linears_are_found_in_order(case: Case) -> None:
    names = [name for name, _ in decoder_blocks(case.loaded.model)]
    assert [name.rpartition(".")[2] for name in names] == ["0", "1"]
    linears = editable_linears(case.loaded.model)
    assert len(linears) == 2 * LINEARS[case.name]
    assert not any(part in name for name in linears for part in ("vision", "visual", "projector", "lm_head"))


def test_names_on_disk_hold_the_weights_in_memory(case: Case) -> None:
    with open_checkpoint(case.folder) as checkpoint, safe_open(case.folder / "model.safetensors", "pt") as file:
        for name, linear in editable_linears(case.loaded.model).items():
            key = checkpoint.names.find(f"{name}.weight")
            assert key is not None, name
            assert torch.equal(file.get_tensor(key), linear.weight)


def test_labels_are_the_answer_alone_and_batched(case: Case) -> None:
    loaded = case.loaded
    batch = encode_training(loaded, case.samples)
    kinds = token_kinds(loaded, batch)
    for row, sample in enumerate(case.samples):
        labels = batch["labels"][row]
        text = loaded.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
        assert text.strip() == sample.answer
        assert int(labels[labels != -100][-1]) == loaded.model.generation_config.eos_token_id
        assert bool((kinds[row] == IMAGE).any()) == bool(sample.images)
        alone = encode_training(loaded, [sample])
        assert labels[: alone["labels"].shape[1]].tolist() == alone["labels"][0].tolist()


def test_every_answer_of_a_conversation_ends(case: Case) -> None:
    """Answers, the middle ones too, are followed by the token at which stock generation stops."""
    said = ["Red.", "Yes", "Two of them"]
    turns = [Turn(role="user", text="<image>\nWhat colour?")]
    for number, answer in enumerate(said):
        turns += [Turn(role="assistant", text=answer), Turn(role="user", text=f"And {number}?")]
    sample = Sample(id="turns", turns=tuple(turns[:-1]), images=case.samples[0].images)
    if case.name in ONE_PICTURED_QUESTION:
        with pytest.raises(DataError, match="takes one question and one answer"):
            encode_training(case.loaded, [sample])
        return
    inputs = encode_training(case.loaded, [sample])
    labels, end = inputs["labels"][0].tolist(), case.loaded.model.generation_config.eos_token_id
    text = case.loaded.tokenizer.decode([i for i in labels if i != -100])
    closing = case.loaded.tokenizer.decode([end])
    assert labels.count(end) == len(said)
    pieces = text.split(closing)
    assert [
        p.replace("<|im_end|>", "").replace("<end_of_turn>", "").replace("<end_of_utterance>", "").strip()
        for p in pieces
    ] == [*said, ""]
    # A label begins where the model takes over.
    first = next(i for i, label in enumerate(labels) if label != -100)
    request = encode_request(case.loaded, [Sample(id="ask", turns=tuple(turns[:1]), images=sample.images)])
    assert inputs["input_ids"][0, :first].tolist() == request["input_ids"][0].tolist()


def test_answers_do_not_depend_on_the_batch(case: Case) -> None:
    alone = [generate(case.loaded, [s], max_new_tokens=4)[0] for s in case.samples]
    assert generate(case.loaded, case.samples, max_new_tokens=4) == alone
    assert len(set(alone)) > 1


def test_it_can_be_trained_on(case: Case) -> None:
    model = load(case.folder, device="cpu", trainable=True).model.train()
    loss = model(**encode_training(load(case.folder, device="cpu"), case.samples)).loss
    loss.backward()
    name, linear = next(iter(editable_linears(model).items()))
    assert torch.isfinite(loss), name
    assert float(linear.weight.grad.abs().max()) > 0


def test_a_pixel_budget_is_the_processors_own_or_shrinks_the_picture(case: Case, tmp_path: Path) -> None:
    """Qwen-VL and GLM-4V have a budget of their own, asked as stock code sets it; the others are shown less."""
    bound = 56 * 28
    large = model_zoo.picture(tmp_path / "large.png", size=(120, 90))
    sample = replace(case.samples[0], images=(large,))
    usual = encode_request(case.loaded, [sample])
    with pictures_opened(PictureConfig(max_pixels=bound)):
        found = encode_request(case.loaded, [sample])
    own = case.name.startswith(("qwen", "glm"))
    if own:
        stock = AutoProcessor.from_pretrained(case.folder, backend="pil")
        stock.image_processor.size["longest_edge"] = bound
        stock.image_processor.size["shortest_edge"] = min(stock.image_processor.size["shortest_edge"], bound)
        picture = Image.open(large).convert("RGB")
    else:
        stock, picture = case.loaded.processor, shrunk(Image.open(large).convert("RGB"), bound)
    expected = stock.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found["pixel_values"].reshape(expected.shape), expected)
    assert not own or found["input_ids"].shape[1] < usual["input_ids"].shape[1]


def answers_of_unlike_length(case: Case, shown: str = "pictures") -> list[Sample]:
    """Eight samples, each with another number of target tokens; the mean of means is far from the mean.

    shown: "pictures", "words" (no sample has one) or "both" (the first half has, the second has not).
    """
    said = [
        "Red",
        "A circle, I think",
        "no",
        "It is the one on the left side",
        "3",
        "Yes it is",
        "blue",
        "Hm, who knows?",
    ]
    chosen = {"pictures": [0, 1] * 4, "words": [2] * 8, "both": [0, 1, 0, 1, 2, 2, 2, 2]}[shown]
    return [
        replace(case.samples[k], id=f"s{i}", turns=(case.samples[k].turns[0], Turn(role="assistant", text=t)))
        for i, (k, t) in enumerate(zip(chosen, said, strict=True))
    ]


@pytest.mark.parametrize(
    ("case", "micro", "shown"),
    [
        (name, micro, shown)
        for name in model_zoo.BUILDERS
        for shown, sizes in (("pictures", (1, 2, 8)), ("words", (1, 2)), ("both", (1, 2, 8)))
        for micro in sizes
        if shown == "pictures" or name not in ONE_PICTURED_QUESTION
    ],
    indirect=["case"],
)
def test_a_step_of_training_is_the_gradient_of_the_stock_model_whatever_the_micro_batch(
    case: Case, micro: int, shown: str, tmp_path: Path
) -> None:
    """Passes of pictures, of words alone, and of both in one step (some passes then have no picture)."""
    samples = answers_of_unlike_length(case, shown)
    config = TrainingConfig(
        rank=2, alpha=4, dropout=0.0, max_steps=1, batch_size=8, micro_batch_size=micro, precision="fp32"
    )

    def fresh(loaded: LoadedModel, config: TrainingConfig) -> PeftModel:
        torch.manual_seed(3)
        wrapped = lora_adapter(loaded, config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)  # B = 0 would hide half of the gradient
        return wrapped

    stock = fresh(case.loaded, config)
    stock(**encode_training(case.loaded, samples)).loss.backward()
    expected = {name: p.grad.clone() for name, p in stock.named_parameters() if p.requires_grad}
    stock.unload()
    found: dict[str, Tensor] = {}

    def watched(loaded: LoadedModel, config: TrainingConfig) -> PeftModel:
        wrapped = fresh(loaded, config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, name=name: found.__setitem__(name, p.grad.clone())
                )
        return wrapped

    train(case.loaded, samples, config, work_dir=tmp_path, seed=0, adapter=watched)
    assert set(found) == set(expected)
    whole = torch.cat([g.flatten() for g in expected.values()])
    off = torch.cat([(found[name] - g).flatten() for name, g in expected.items()])
    assert float(off.norm() / whole.norm()) < 1e-4


def test_calibration_in_passes_and_from_disk_is_the_same(case: Case) -> None:
    whole = hessians(case.loaded, case.samples)
    assert set(whole) == set(editable_linears(case.loaded.model))
    in_passes = hessians(case.loaded, case.samples, passes=1)
    streamed = hessians(load_streamed(case.folder, device="cpu"), case.samples, passes=1)
    for name, expected in whole.items():
        assert torch.equal(in_passes[name], expected), name
        assert torch.equal(streamed[name], expected), name


def test_a_padded_batch_calibrates_like_samples_alone(case: Case) -> None:
    batch = hessians(case.loaded, case.samples)
    each = [hessians(case.loaded, [s]) for s in case.samples]
    for name, together in batch.items():
        mean = sum(one[name] for one in each) / len(each)
        scale = float(together.diagonal().mean())
        torch.testing.assert_close(
            together, mean, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(scope="module")
def tuned(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The family under a random LoRA adapter on every editable layer."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("tuned") / case.name
    targets = list(editable_linears(case.loaded.model))
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    get_peft_model(load(case.folder, device="cpu", trainable=True).model, settings).save_pretrained(folder)
    return Checkpoint(base=str(case.folder), adapters=(str(folder),))


@pytest.fixture(scope="module")
def curvature(case: Case, tuned: Checkpoint) -> Curvature:
    return collect_curvature(case.folder, tuned, case.samples[:1], case.samples, device="cpu")


def logits_of(loaded: LoadedModel, samples: list[Sample]) -> Tensor:
    with torch.no_grad():
        return loaded.model(**encode_request(loaded, samples[:1])).logits


def test_a_lora_adapter_loads_merged(case: Case, tuned: Checkpoint) -> None:
    wrapped = PeftModel.from_pretrained(load(case.folder, device="cpu").model, tuned.adapters[0]).eval()
    inputs = encode_request(case.loaded, case.samples[:1])
    with torch.no_grad():
        expected = wrapped(**inputs).logits
    assert float((expected - case.built_logits).abs().max()) > 1e-2
    torch.testing.assert_close(logits_of(load(tuned, device="cpu"), case.samples), expected, rtol=1e-3, atol=1e-3)


def test_edited_on_disk_it_says_what_the_edited_live_model_says(
    case: Case, tuned: Checkpoint, curvature: Curvature, tmp_path: Path
) -> None:
    """Dense and adapter exports, reloaded, against the same rule applied to the weights of live models."""
    config = HpaConfig(keep_bounds=(20.0, 60.0))
    before, after = load(case.folder, device="cpu"), load(tuned, device="cpu")
    unedited = logits_of(after, case.samples)
    old = editable_linears(before.model)
    for name, linear in editable_linears(after.model).items():
        percent = config.keep_percent(curvature.blocks[name], curvature.block_count)
        edit = edit_weight(
            old[name].weight,
            linear.weight,
            curvature.safety[name],
            curvature.task[name],
            keep_percent=percent,
            focus_percent=config.focus_percent(percent),
        )
        with torch.no_grad():
            linear.weight.copy_(edit.weight)
    expected = logits_of(after, case.samples)
    assert float((expected - unedited).abs().max()) > 1e-2
    for export in ("dense", "adapter"):
        out = tmp_path / export
        edit_checkpoint(
            case.folder,
            tuned.adapters[0],
            rule=HpaRule(config),
            curvature=curvature,
            out=out,
            export=export,
            coefficient="keep",
            verify=export == "adapter" and case.name in RELOADED,
        )
        source = out if export == "dense" else Checkpoint(base=str(case.folder), adapters=(str(out),))
        edited = load(source, device="cpu")
        torch.testing.assert_close(logits_of(edited, case.samples), expected, rtol=1e-3, atol=2e-3)
        assert all(isinstance(text, str) for text in generate(edited, case.samples, max_new_tokens=2))


def test_anchored_on_disk_it_says_what_the_closed_form_says(case: Case, tuned: Checkpoint, tmp_path: Path) -> None:
    """Gram matrices from the walk, on disk, through the shared editor: dense, and as an adapter of the same rank."""
    grams = GramSets(
        task=collect_grams(tuned, case.samples, tmp_path / "task", device="cpu"),
        safety=collect_grams(case.folder, case.samples[:1], tmp_path / "safety", device="cpu"),
    )
    before, after = load(case.folder, device="cpu"), load(tuned, device="cpu")
    unedited = logits_of(after, case.samples)
    old = editable_linears(before.model)
    assert set(grams.task.modules) == set(old)
    for name, linear in editable_linears(after.model).items():
        edited = anchor_weight(
            old[name].weight.float(), linear.weight.float(), grams.task.gram(name), grams.safety.gram(name)
        )
        with torch.no_grad():
            linear.weight.copy_(edited)
    expected = logits_of(after, case.samples)
    assert float((expected - unedited).abs().max()) > 1e-3
    for export in ("dense", "adapter"):
        out = tmp_path / export
        edit_checkpoint(
            case.folder,
            tuned.adapters[0],
            rule=AnchorRule(AnchorConfig(), grams),
            out=out,
            export=export,
            coefficient="drop",
            verify=False,
        )
        source = out if export == "dense" else Checkpoint(base=str(case.folder), adapters=(str(out),))
        torch.testing.assert_close(logits_of(load(source, device="cpu"), case.samples), expected, rtol=1e-3, atol=2e-3)
    swapped = GramSets(task=grams.safety, safety=grams.task)
    with pytest.raises(CalibrationError, match=r"Gram matrices .* are of another model"):
        edit_checkpoint(case.folder, tuned.adapters[0], rule=AnchorRule(AnchorConfig(), swapped), out=tmp_path / "no")


def test_a_tied_head_stays_tied_through_calibration_and_edit(samples: list[Sample], tmp_path: Path) -> None:
    """On disk there is one tensor for embeddings and head; streamed, merged and edited it must serve as both."""
    model, processor = model_zoo.BUILDERS["llava"]()
    config = model.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    type(model)(config).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        assert not any("lm_head" in key for key in file.keys())  # noqa: SIM118 (not a mapping)
    loaded = load(tmp_path / "base", device="cpu")
    streamed = load_streamed(tmp_path / "base", device="cpu")
    assert streamed.model.get_output_embeddings().weight is streamed.model.get_input_embeddings().weight
    whole, in_passes = hessians(loaded, samples), hessians(streamed, samples, passes=1)
    assert all(torch.equal(in_passes[name], whole[name]) for name in whole)
    settings = LoraConfig(r=2, target_modules=list(editable_linears(loaded.model)), init_lora_weights=False)
    tuned = load(tmp_path / "base", device="cpu", trainable=True).model
    get_peft_model(tuned, settings).save_pretrained(tmp_path / "adapter")
    adapter = Checkpoint(base=str(tmp_path / "base"), adapters=(str(tmp_path / "adapter"),))
    made = collect_curvature(tmp_path / "base", adapter, samples, samples, device="cpu")
    report = edit_checkpoint(
        tmp_path / "base", tmp_path / "adapter", rule=HpaRule(), curvature=made, out=tmp_path / "out"
    )
    assert report.verification is not None and report.verification["edit_moves_logits_by"] > 0
    edited = load(tmp_path / "out", device="cpu").model
    assert edited.get_output_embeddings().weight is edited.get_input_embeddings().weight
    assert torch.equal(edited.get_input_embeddings().weight, loaded.model.get_input_embeddings().weight)
