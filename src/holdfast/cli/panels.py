"""The panels of --help: an option stands in the same one in every verb that has it."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from typer.core import TyperCommand

# Panel -> options that it holds. What stands in none is shown under "Options".
PANELS: dict[str, tuple[str, ...]] = {
    "Data and models": (
        "adapter", "after", "align", "base", "benign", "calibration", "category_key", "earlier", "encoder",
        "every_linear", "grams", "image", "image_mode", "images", "judge", "limit", "max_pixels", "model", "option",
        "past", "probe_benign", "probe_safety", "probe_task", "processor", "prompt", "prompts", "reference",
        "reference_task", "references", "root", "run", "safety", "safety_images", "samples", "scorer", "stream", "task",
        "task_images", "tasks", "test_set", "world",
    ),
    "The budget": ("max_asr", "max_drop", "max_over_refusal", "target_asr"),
    "The rule": ("options", "past_weight", "rule", "set_", "strengths"),
    "The search": (
        "benign_samples", "min_refused", "probes", "safety_samples", "screen", "task_samples", "tune", "whole_curve",
    ),
    "Labels": ("annotator", "html", "import_", "number", "settle", "show"),
    "The method": (
        "activations", "alpha", "coefficient", "curvature_form", "damping", "expert", "focus", "harmful", "keep",
        "method", "methods", "mode", "normalization", "on_failure", "per_category", "preset", "projection", "quick",
        "ranking", "seed", "shrinkage", "temperature", "tokens",
    ),
    "Output": (
        "all_images", "as_json", "as_record", "dry_run", "export", "json", "json_", "layers", "listed",
        "measured_safety", "model_card", "names_only", "out", "overwrite", "private", "report", "report_to", "shard",
        "title", "verify",
    ),
    "Machine": (
        "backend", "batch_size", "cpus_per_cell", "device", "dtype", "eager", "environment", "fsdp", "gpu_memory",
        "gpus", "gpus_per_cell", "jobs", "max_lora_rank", "max_model_len", "max_new_tokens", "memory", "ray", "retries",
        "tensor_parallel", "tflops", "vllm_args", "vllm_python", "vllm_url",
    ),
    "The endpoint": ("canary", "folder", "host", "mixed", "port", "router", "served_name"),
    "What clients may ask": (
        "allow_files", "max_body", "max_image_pixels", "max_images", "max_tokens", "max_waiting", "timeout",
    ),
    "Checks to leave out": ("allow_other_base", "allow_other_calibration", "allow_problems", "allow_short"),
}  # fmt: skip
_PANEL_OF = {option: panel for panel, options in PANELS.items() for option in options}


class PanelledCommand(TyperCommand):
    """A verb whose options are shown in panels, and whose result is printed as JSON where `--json` asks for it.

    A verb either prints its JSON itself, or returns the result as plain data: then what it says for people goes to
    stderr under `--json`, and stdout holds the result alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if parameter.param_type_name == "option" and parameter.name in _PANEL_OF:
                parameter.rich_help_panel = _PANEL_OF[parameter.name]  # type: ignore[attr-defined]

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        if not ctx.params.get("as_record"):
            return super().invoke(ctx)
        out = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            result = super().invoke(ctx)
        if result is not None:
            print(json.dumps(result, indent=2, ensure_ascii=False, default=str), file=out)
        return result
