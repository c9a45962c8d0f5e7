"""Editing checkpoints: a rule sees one layer, the editor streams it over files, a report says what was done."""

from holdfast.rules.base import DenseEdit, EditRule, Layer, LoraEdit, LoraEditRule, layer_seed

__all__ = ["DenseEdit", "EditRule", "Layer", "LoraEdit", "LoraEditRule", "layer_seed"]
