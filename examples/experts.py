"""Add a task as an expert of CRAM, then a second one; ask who would answer a request.

python examples/experts.py
"""

from pathlib import Path

from holdfast import experiment
from holdfast.data.streams import load_stream
from holdfast.tiny import model_path
from holdfast.tiny.stream import StreamSize, write_stream
from holdfast.tuners.cram.folder import open_folder

size = StreamSize(train=64, test=2, validation=1, safety=1, safety_validation=1, calibration=8)
stream = write_stream("example-tasks", seed=0, size=size, task_names=["classify", "digits"])
run = {
    "model": str(model_path("aligned")),
    "stream": str(stream),
    "methods": ["cram"],
    "defaults": {"training": {"learning_rate": 4e-3, "max_steps": 4, "batch_size": 8, "dropout": 0.0}},
    "evaluation": {"judges": [{"name": "keyword"}], "limit": 1, "limit_between": 0},
    "store_dtype": "float32",
    "threads": 1,
}

for tasks in (["classify"], ["classify", "digits"]):  # the second task comes later; the first expert is not touched
    experiment.run(experiment.decode_run({**run, "tasks": tasks}, base=Path.cwd()), "example-experts")

experts = open_folder(Path("example-experts/methods/cram/2-digits/cram"))
for task in load_stream(stream).tasks:
    (row,) = experts.explain(task.test[:1])
    print(task.name, "is answered by", {name: round(weight, 2) for name, weight in row["weights"].items()})
