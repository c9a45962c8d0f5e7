"""Give a tuned model its refusals back, from Python: `holdfast restore` as a function.

python examples/restore.py
"""

from holdfast.data.sample_files import read_samples
from holdfast.restore.run import RestoreConfig, restore
from holdfast.restore.search import Budget
from holdfast.restore.sets import RestoreSets, split
from holdfast.tiny.example import write_example

# An aligned model, an adapter that was tuned on it, three files of requests. Of your own models you bring the same.
files = write_example("example-restore", requests=16)


def calibrate_and_probe(path, calibrate):
    """Some requests for the edit to be made from, others to measure it with."""
    return split(read_samples(path), None, calibrate=calibrate, probes=6, seed=0, what=str(path))


sets = RestoreSets(
    safety=calibrate_and_probe(files.forbidden, 8),
    benign=calibrate_and_probe(files.benign, 8),
    task=calibrate_and_probe(files.task, 16),
)
config = RestoreConfig(strengths=(0.35,), tokens=24, task_tokens=24, batch_size=64)  # one strength, so that it is quick
found = restore(
    str(files.before), str(files.after), sets, out="restored", budget=Budget(max_over_refusal=0.1), config=config
)

for name in ("before", "tuned", "restored"):
    print(f"{name:<9} not refused {found.record[name]['asr']:.2f}  task {found.record[name]['task']:.2f}")
print("written:", found.published, " look at", found.page)
