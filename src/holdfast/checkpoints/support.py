"""Which kinds of adapters and checkpoints are read, merged or refused: the one table that the code refuses by.

A page of the documentation is made of it; what the code raises ends with a row's sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["read", "merged densely", "refused"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of input. name: what it is called. verdict: what is done with it. sentence: how, or what to do instead.

    key: what the code asks for it by.
    """

    key: str
    name: str
    verdict: Verdict
    sentence: str


ADAPTER_KINDS: tuple[Kind, ...] = (
    Kind(
        key="lora",
        name="LoRA on linear layers (rsLoRA, rank_pattern, alpha_pattern, fan_in_fan_out)",
        verdict="read",
        sentence="edited as factors, exported as an adapter or dense; sums are made in fp32 and cast once.",
    ),
    Kind(
        key="modules_to_save",
        name="modules_to_save, trained biases, ensure_weight_tying",
        verdict="merged densely",
        sentence="whole tensors replace the base's; tied ends part, unless ensure_weight_tying is set.",
    ),
    Kind(
        key="embedding",
        name="LoRA on an embedding or a head, tied or not",
        verdict="merged densely",
        sentence="merged as PEFT merges it; on a tied base the two ends part, unless ensure_weight_tying is set.",
    ),
    Kind(
        key="tokens",
        name="trainable_token_indices",
        verdict="merged densely",
        sentence="the trained rows replace the base's, at both ends of a tied base.",
    ),
    Kind(
        key="conv",
        name="LoRA on convolutions",
        verdict="merged densely",
        sentence="merged as PEFT merges it; convolutions with groups are refused.",
    ),
    Kind(
        key="dora",
        name="DoRA (linear, embedding, convolution)",
        verdict="merged densely",
        sentence="merged as PEFT merges it, and then edited as a dense weight; export dense.",
    ),
    Kind(
        key="pissa",
        name="PiSSA, OLoRA, CorDA, LoRA-GA",
        verdict="merged densely",
        sentence=(
            "which changes the base weights in memory; it does not belong to the base on disk. With its initial "
            "adapter it is read: put that folder, saved before training with init_lora_weights true, inside this one "
            "or beside it under a name such as pissa_init. Or convert it with PEFT's "
            "`path_initial_model_for_weight_conversion`, or merge it."
        ),
    ),
    Kind(
        key="loftq",
        name="LoftQ",
        verdict="refused",
        sentence=(
            "whose base is a quantised one that no file holds: pass as BEFORE the model that it was trained on, saved "
            "dequantised, with init_lora_weights true in adapter_config.json; or merge it with PEFT."
        ),
    ),
    Kind(
        key="unknown_option",
        name="Options that change what LoRA factors mean (aLoRA, layer_replication, lora_bias, target_parameters, ...)",
        verdict="refused",
        sentence="refused by the option's name: merge the adapter into its base with PEFT and pass the merged folder.",
    ),
    Kind(
        key="other",
        name="PEFT adapters that are no LoRA (IA3, LoHa, LoKr, OFT, VeRA, ...)",
        verdict="refused",
        sentence=(
            "only LORA can be edited exactly. Merge it into its base with PEFT and pass that. (`evaluate` and "
            "`calibrate-data` let PEFT merge it.)"
        ),
    ),
    Kind(
        key="pickled",
        name="Pickled adapters, or pickled weights beside one",
        verdict="refused",
        sentence="pickles are never loaded; save the weights again as safetensors.",
    ),
)


CHECKPOINT_KINDS: tuple[Kind, ...] = (
    Kind(
        key="safetensors",
        name="safetensors, one file or shards with an index (transformers 4 and 5 names)",
        verdict="read",
        sentence=(
            "one file wins over an index beside it, as in transformers; of shards, every tensor that is in them "
            "counts, listed in the index or not."
        ),
    ),
    Kind(
        key="types",
        name="BEFORE in another floating type than AFTER, whole or in single tensors",
        verdict="read",
        sentence=(
            "BEFORE is rounded to AFTER's type first, tensor by tensor, as loading it in that type for the tuning "
            "did; the result has AFTER's types."
        ),
    ),
    Kind(
        key="never_built",
        name="Tensors that transformers never builds (mtp.*, talker.*, old buffers), on one side only",
        verdict="read",
        sentence="copied into the result, and said; a tensor of the model itself on one side only is refused.",
    ),
    Kind(
        key="resized",
        name="Added tokens: AFTER's embedding and head have more or fewer rows than BEFORE's",
        verdict="read",
        sentence="AFTER's are copied whole, and said; an adapter that holds them resizes the base it is merged into.",
    ),
    Kind(
        key="settings",
        name="AFTER without tokenizer, template or processor files",
        verdict="read",
        sentence="BEFORE's are used, and said; an adapter's own win over its base's.",
    ),
    Kind(
        key="fp8",
        name="fp8 with stored scales, per block, row or tensor (quant_method fp8, compressed-tensors)",
        verdict="merged densely",
        sentence="dequantised to bf16 as it is read; the result is a plain bf16 checkpoint.",
    ),
    Kind(
        key="both",
        name="A full model and an adapter in one folder",
        verdict="refused",
        sentence="which of the two is meant cannot be seen: move one of them away.",
    ),
    Kind(
        key="pickled_model",
        name="Pickled weights (pytorch_model.bin)",
        verdict="refused",
        sentence="pickles are never loaded; save the weights again as safetensors.",
    ),
)

_DEQUANTISE = (
    "which is not read here: load it with transformers and that library, call `model.dequantize()`, save it with "
    "`save_pretrained`, and pass that folder."
)
QUANTISATIONS: tuple[Kind, ...] = (
    Kind(key="bitsandbytes", name="bitsandbytes (4 and 8 bit)", verdict="refused", sentence=_DEQUANTISE),
    Kind(key="gptq", name="GPTQ", verdict="refused", sentence=_DEQUANTISE),
    Kind(key="awq", name="AWQ", verdict="refused", sentence=_DEQUANTISE),
    Kind(
        key="other",
        name="Other quantisations (HQQ, AQLM, int8, packed int4, ...)",
        verdict="refused",
        sentence=_DEQUANTISE,
    ),
)


def adapter_kind(key: str) -> Kind:
    """The row of `ADAPTER_KINDS` that a key names. Raises KeyError."""
    return {kind.key: kind for kind in ADAPTER_KINDS}[key]


def quantisation_kind(method: str) -> Kind:
    """The row of `QUANTISATIONS` of a `quant_method`; that of all others where it has none of its own."""
    rows = {kind.key: kind for kind in QUANTISATIONS}
    return rows.get(method, rows["other"])


__all__ = ["ADAPTER_KINDS", "CHECKPOINT_KINDS", "QUANTISATIONS", "Kind", "Verdict", "adapter_kind", "quantisation_kind"]
