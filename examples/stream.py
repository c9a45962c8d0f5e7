"""Tune a small model on two tasks with two methods, from Python: `holdfast run` as a function.

python examples/stream.py
"""

from pathlib import Path

from holdfast import experiment
from holdfast.tiny import model_path
from holdfast.tiny.stream import StreamSize, write_stream

size = StreamSize(train=96, test=6, validation=1, safety=2, safety_validation=1, calibration=8)
stream = write_stream("example-stream", seed=0, size=size, task_names=["classify", "tally"])

# What a run file says, as plain data. Twelve optimizer steps a task: enough to see it work, not to mean anything.
training = {"rank": 16, "alpha": 32, "dropout": 0.0, "learning_rate": 2e-3, "max_steps": 12, "batch_size": 8}
run = {
    "model": str(model_path("aligned")),
    "stream": str(stream),
    "methods": ["seqft", "hpa"],
    "defaults": {"training": training, "task_samples": 8},
    "evaluation": {"judges": [{"name": "keyword"}], "limit_between": 0},
    "safety_calibration": {"max_new_tokens": 32},
    "store_dtype": "float32",
    "threads": 1,
}
summary = experiment.run(experiment.decode_run(run, base=Path.cwd()), "example-run")

for name, figures in summary["methods"].items():
    print(f"{name:<6} skill kept (AP) {figures['ap']:.2f}  not refused (MASR) {figures['masr']:.2f}")
