"""A run file -> a run directory: the whole job, from Python or from the command line.

    from holdfast import experiment

    config = experiment.read_run("configs/llava-1.5-7b.yaml")
    summary = experiment.run(config, "runs/mine", methods=["seqft", "hpa"])
    print(summary["methods"]["hpa"]["ap"])

A run file names a model, a stream and methods; everything else has a default:

    model: llava-hf/llava-1.5-7b-hf        # hub id or folder of any vision-language model of transformers
    stream: my-stream.yaml                 # a stream file (holdfast.data.streams), or its content
    methods: [seqft, hpa]                  # or a mapping: {wide: {method: hpa, edit: {keep_bounds: [10, 30]}}}
    defaults: {training: {max_steps: 500}} # options of every method that has them
    evaluation: {batch_size: 32}

A method, judge, scorer or reader of one's own is named `package.module:Class` there, or comes from an installed
distribution; `plugins: [my_edit.py]` lists files that bring such code (`holdfast.registry`).
"""

from __future__ import annotations

from holdfast.errors import RunError
from holdfast.experiment.build import build_methods
from holdfast.experiment.execute import run
from holdfast.experiment.resolve import Experiment, resolve
from holdfast.experiment.run_config import (
    InjectionConfig,
    OwnAnswersConfig,
    OwnBenignConfig,
    RunConfig,
    SafetyGateConfig,
    decode_run,
    only,
    read_run,
)
from holdfast.experiment.workers import set_threads

__all__ = [
    "Experiment",
    "InjectionConfig",
    "OwnAnswersConfig",
    "OwnBenignConfig",
    "RunConfig",
    "RunError",
    "SafetyGateConfig",
    "build_methods",
    "decode_run",
    "only",
    "read_run",
    "resolve",
    "run",
    "set_threads",
]
