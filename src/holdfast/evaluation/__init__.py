"""Checkpoint -> answers -> scores and verdicts -> rows of a record."""

from holdfast.evaluation.evaluation_config import EvaluationConfig, JudgeConfig
from holdfast.evaluation.evaluator import CheckpointEvaluator

__all__ = ["CheckpointEvaluator", "EvaluationConfig", "JudgeConfig"]
