"""The runner: order, resume after kill -9, retention, refusal of a foreign directory. Fakes only, no torch."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from holdfast.errors import RunError, StorageError
from holdfast.share import Share
from holdfast.stream import runner
from holdfast.stream.protocol import Checkpoint
from holdfast.stream.runner import _lock

SCRIPT = Path(__file__).with_name("fake_stream.py")


def whole_run(fakes, out, **changes):
    run = fakes.make_run(out, **changes)
    evaluator = fakes.FakeEvaluator()
    with run.claimed():
        run.evaluate_theta_0(evaluator)
        return run.run_method(fakes.FakeMethod(), evaluator)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run directory, with timings taken out."""
    found = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name == ".lock":
            continue
        data = path.read_bytes()
        if path.name == "record.json":
            record = json.loads(data)
            assert all(s >= 0 for s in record.pop("seconds").values())
            assert set(record.pop("peak_bytes")) <= {"begin", "train", "end", "evaluate"}
            data = json.dumps(record).encode()
        if path.name == "phases.json":
            marks = json.loads(data)
            data = json.dumps({k: v.get("checkpoint") for k, v in marks.items()}).encode()
        found[str(path.relative_to(out))] = data
    return found


def test_every_task_is_learned_from_the_one_before(fakes, tmp_path):
    records = whole_run(fakes, tmp_path / "run")
    assert [r.t for r in records] == [1, 2, 3]
    assert [list(r.scores) for r in records] == [["count"], ["count", "read aloud"], ["count", "read aloud", "caption"]]
    assert set(records[0].seconds) == {"begin", "train", "end", "evaluate"}
    theta_0 = fakes.make_run(tmp_path / "run").directory.read_record(tmp_path / "run" / "theta_0")
    assert list(theta_0.scores) == list(fakes.TASKS)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_runs_seed_reaches_every_phase_of_every_task_and_every_record(fakes, tmp_path, seed):
    seen = []

    class Watched(fakes.FakeMethod):
        def begin_task(self, ctx):
            seen.append(("begin", ctx.step, ctx.seed))
            super().begin_task(ctx)

        def train_task(self, ctx):
            seen.append(("train", ctx.step, ctx.seed))
            return super().train_task(ctx)

        def end_task(self, ctx, trained):
            seen.append(("end", ctx.step, ctx.seed))
            return super().end_task(ctx, trained)

    run = fakes.make_run(tmp_path / "run", seed=seed)
    with run.claimed():
        theta_0 = run.evaluate_theta_0(fakes.FakeEvaluator())
        records = run.run_method(Watched(), fakes.FakeEvaluator())
    assert seen == [(phase, step, seed) for step in range(3) for phase in ("begin", "train", "end")]
    assert [record.seed for record in (theta_0, *records)] == [seed] * 4


def test_another_seed_gives_other_weights(fakes, tmp_path):
    found = set()
    for seed in (0, 1, 2):
        records = whole_run(fakes, tmp_path / str(seed), seed=seed, start=tmp_path / "start")
        found.add(Path(records[-1].checkpoint.base, "weights").read_bytes())
    assert len(found) == 3


def test_a_stream_that_grows_at_its_end_goes_on_and_ends_as_if_it_had_been_whole(fakes, tmp_path):
    def of(names: tuple[str, ...]):
        digests = {name: f"digest of {name}" for name in names}
        config = {"stream": {"name": "fake", "tasks": list(names)}, "tasks": None, "data_sha256": digests}
        grows = ("stream.tasks", "tasks", "data_sha256")
        return {"stream": names, "task_names": names, "config": config, "grows": grows, "start": tmp_path / "start"}

    whole_run(fakes, tmp_path / "whole", **of(fakes.TASKS))
    out = tmp_path / "grown"
    whole_run(fakes, out, **of(fakes.TASKS[:2]))
    steps = {path: path.stat().st_mtime_ns for path in out.glob("methods/fake/*/record.json")}
    assert len(steps) == 2
    whole_run(fakes, out, **of(fakes.TASKS))
    assert all(path.stat().st_mtime_ns == before for path, before in steps.items()), "finished steps are not made again"
    assert contents(out) == contents(tmp_path / "whole")
    # What came before stays what it was.
    for names in (("count", "caption", "read aloud"), ("read aloud", "count", "caption", "more"), ("count",)):
        with pytest.raises(RunError, match=r"another configuration(.|\n)*(data_sha256|stream\.tasks)"):
            whole_run(fakes, out, **of(names))
    changed = of((*fakes.TASKS, "more"))
    changed["config"]["data_sha256"]["count"] = "other data"
    with pytest.raises(RunError, match=r"data_sha256\.count: 'digest of count' -> 'other data'"):
        whole_run(fakes, out, **changed)
    assert contents(out) == contents(tmp_path / "whole")


def test_kill_at_twenty_random_moments_resumes_to_the_same_bytes(fakes, tmp_path):
    whole_run(fakes, tmp_path / "straight" / "run", start=tmp_path / "start")
    expected = contents(tmp_path / "straight" / "run")

    rng = random.Random(3)
    for number in range(5):
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        journal = folder / "journal"
        # Four kills, then to the end: a machine under load must not be killed before it gets anywhere.
        for after_s in (*(rng.uniform(0.0, 0.25) for _ in range(4)), 60.0):
            marked = finished_phases(folder / "run")
            before = lines_of(journal)
            completed = run_and_kill(folder / "run", tmp_path / "start", after_s=after_s)
            again = marked & set(lines_of(journal)[len(before) :])
            assert not again, f"finished phases were made again: {again}"
        assert completed
        assert contents(folder / "run") == expected


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def run_and_kill(out: Path, start: Path, *, after_s: float) -> bool:
    """Run the script; True when it ended by itself, False when it was killed `after_s` seconds into its work."""
    command = [sys.executable, str(SCRIPT), str(out), str(start), "0.012"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        try:
            assert process.wait(timeout=after_s) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return False
    return True


def finished_phases(out: Path) -> set[str]:
    found = set()
    for path in out.glob("methods/*/*/phases.json"):
        step = int(path.parent.name.split("-")[0]) - 1
        found |= {f"fake {step} {phase}" for phase in json.loads(path.read_text())}
    return found


def test_a_second_call_makes_nothing_again(fakes, tmp_path):
    whole_run(fakes, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    whole_run(fakes, tmp_path / "run")
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before


def test_only_the_last_two_checkpoints_and_the_small_files_stay(fakes, tmp_path):
    whole_run(fakes, tmp_path / "run")
    steps = sorted((tmp_path / "run" / "methods" / "fake").iterdir())
    steps = [s for s in steps if s.is_dir()]
    assert [s.name for s in steps] == ["1-count", "2-read-aloud", "3-caption"]
    assert [(s / "checkpoint").exists() for s in steps] == [False, True, True]
    assert [(s / "carry").exists() for s in steps] == [False, False, True]
    assert not any((s / "scratch").exists() for s in steps)
    assert all((s / "edit.json").is_file() and (s / "record.json").is_file() for s in steps)


def test_a_checkpoint_that_a_later_one_builds_on_stays(fakes, tmp_path):
    class Experts(fakes.FakeMethod):
        def end_task(self, ctx, trained):
            own = super().end_task(ctx, trained)
            return Checkpoint(base=own.base, adapters=(*ctx.previous.adapters, own.base))

    run = fakes.make_run(tmp_path / "run")
    with run.claimed():
        run.run_method(Experts(), fakes.FakeEvaluator())
    assert len(list((tmp_path / "run").glob("methods/fake/*/checkpoint"))) == 3


def test_what_a_killed_write_left_is_removed_file_or_folder(fakes, tmp_path):
    """A folder is published by one rename, too: killed before it, it stands there half written."""

    class Killed(fakes.FakeMethod):
        def end_task(self, ctx, trained):
            if ctx.step == 1:
                raise InterruptedError
            return super().end_task(ctx, trained)

    start = tmp_path / "start"
    whole_run(fakes, tmp_path / "whole", start=start)
    run = fakes.make_run(tmp_path / "run", start=start)
    with run.claimed():
        run.evaluate_theta_0(fakes.FakeEvaluator())
        with pytest.raises(InterruptedError):
            run.run_method(Killed(), fakes.FakeEvaluator())
    method = tmp_path / "run" / "methods" / "fake"
    places = [tmp_path / "run", method / "1-count", method / "2-read-aloud", method / "2-read-aloud" / "scratch"]
    for place in places:
        for folder in (place / ".cram.tmp", place / ".cram.tmp" / ".inner.tmp", place / "..expert.part.tmp"):
            folder.mkdir(parents=True)
            (folder / "weights").write_bytes(b"x")
        (place / ".record.json.abc.tmp").write_text("{")
    whole_run(fakes, tmp_path / "run", start=start)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_removal_that_was_killed_half_way_is_finished(fakes, tmp_path):
    whole_run(fakes, tmp_path / "run")
    left = tmp_path / "run" / "methods" / "fake" / "1-count" / ".scratch.removed"
    left.mkdir()
    (left / "weights").write_bytes(b"x")
    whole_run(fakes, tmp_path / "run")
    assert not left.exists()


def test_what_the_previous_checkpoint_alone_builds_on_stays_until_the_next_step_is_done(fakes, tmp_path):
    """Step 2 lies on step 1's folder, step 3 on its own: after step 3 the checkpoint before it must still be whole."""

    class Skipping(fakes.FakeMethod):
        def end_task(self, ctx, trained):
            own = super().end_task(ctx, trained)
            return Checkpoint(base=own.base, adapters=(ctx.previous.base,) if ctx.step == 1 else ())

    run = fakes.make_run(tmp_path / "run")
    with run.claimed():
        records = run.run_method(Skipping(), fakes.FakeEvaluator())
    for record in records[-2:]:
        assert all(Path(path).is_dir() for path in record.checkpoint.paths), record.checkpoint
    run = fakes.make_run(tmp_path / "longer", stream=(*fakes.TASKS, "more"), task_names=(*fakes.TASKS, "more"))
    with run.claimed():
        run.run_method(Skipping(), fakes.FakeEvaluator())
    kept = sorted(path.parent.name for path in (tmp_path / "longer").glob("methods/fake/*/checkpoint"))
    assert kept == ["3-caption", "4-more"], "and goes with it"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_kill_in_the_middle_of_a_removal_never_leaves_half_a_checkpoint_under_its_name(tmp_path, monkeypatch, kind):
    path = tmp_path / "checkpoint"
    if kind == "file":
        path.write_bytes(b"weights")
    else:
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "weights").write_bytes(b"weights")
    names = []

    def killed(doomed, *args, **kwargs):
        if doomed.exists():
            names.append(doomed.name)
            if doomed.is_dir():
                (doomed / "weights").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner.shutil, "rmtree", killed)
        patched.setattr(Path, "unlink", killed) if kind == "file" else None
        with pytest.raises(KeyboardInterrupt):
            runner._remove(path)
    assert not path.exists() and names == [".checkpoint.removed"]
    runner._remove(path)
    assert list(tmp_path.iterdir()) == []


def test_a_moved_run_directory_resumes(fakes, tmp_path):
    whole_run(fakes, tmp_path / "run", task_names=fakes.TASKS)
    (tmp_path / "run").rename(tmp_path / "moved")
    records = whole_run(fakes, tmp_path / "moved")
    assert records[-1].checkpoint.base == str(tmp_path / "moved" / "methods" / "fake" / "3-caption" / "checkpoint")


def test_another_configuration_is_refused_with_the_difference(fakes, tmp_path):
    whole_run(fakes, tmp_path / "run")
    config = {"stream": {"name": "fake", "tasks": [*fakes.TASKS]}, "training": {"lr": 0.002, "rank": 8}}
    with pytest.raises(RunError, match=r"training\.lr: 0\.001 -> 0\.002\n  training\.rank: absent -> 8\nGo back"):
        whole_run(fakes, tmp_path / "run", config=config)
    with pytest.raises(RunError, match=r"methods\.fake\.rank: 4 -> 5"):
        whole_run(fakes, tmp_path / "run", methods={"fake": {"rank": 5}})


def test_another_method_joins_the_directory(fakes, tmp_path):
    whole_run(fakes, tmp_path / "run")
    run = fakes.make_run(tmp_path / "run", methods={"other": {"rank": 5}})
    with run.claimed():
        run.run_method(fakes.FakeMethod("other"), fakes.FakeEvaluator())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["methods"] == {
        "fake": {"rank": 4},
        "other": {"rank": 5},
    }
    assert run.directory.methods() == ["fake", "other"]


def test_a_directory_of_something_else_is_refused(fakes, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"is not empty and holds no config\.json of holdfast \(found thesis\.tex\)"):
        whole_run(fakes, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock"] == ["thesis.tex"]


def test_two_processes_never_share_a_directory(fakes, tmp_path):
    with (
        _lock(tmp_path / "run"),
        pytest.raises(RunError, match="in use by another holdfast process"),
    ):
        whole_run(fakes, tmp_path / "run")


def test_a_damaged_record_is_named(fakes, tmp_path):
    whole_run(fakes, tmp_path / "run")
    path = tmp_path / "run" / "methods" / "fake" / "2-read-aloud" / "record.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RunError, match=r"2-read-aloud/record\.json is not valid JSON"):
        whole_run(fakes, tmp_path / "run")
    path.write_text("{}")
    with pytest.raises(RunError, match=r"format is None, expected 'holdfast\.record/1'"):
        whole_run(fakes, tmp_path / "run")
    path.unlink()
    with pytest.raises(RunError, match="task 'read aloud' has no record, but a later task has one"):
        whole_run(fakes, tmp_path / "run")


def test_a_lost_checkpoint_is_named(fakes, tmp_path):
    class Interrupted(fakes.FakeMethod):
        def end_task(self, ctx, trained):
            raise KeyboardInterrupt

    run = fakes.make_run(tmp_path / "run")
    with run.claimed(), pytest.raises(KeyboardInterrupt):
        run.run_method(Interrupted(), fakes.FakeEvaluator())
    (tmp_path / "run" / "methods" / "fake" / "1-count" / "scratch" / "trained").rename(tmp_path / "elsewhere")
    with run.claimed(), pytest.raises(RunError, match=r"phase 'train' is finished, but its checkpoint .* is gone"):
        run.run_method(fakes.FakeMethod(), fakes.FakeEvaluator())


def test_a_full_disk_is_a_sentence_and_resumable(fakes, tmp_path):
    class Full(fakes.FakeMethod):
        def end_task(self, ctx, trained):
            raise OSError(errno.ENOSPC, "No space left on device")

    run = fakes.make_run(tmp_path / "run")
    with run.claimed(), pytest.raises(StorageError, match=r"No space left .* same command"):
        run.run_method(Full(), fakes.FakeEvaluator())
    assert len(whole_run(fakes, tmp_path / "run")) == 3


def test_task_names_must_differ_as_folders(fakes, tmp_path):
    with pytest.raises(RunError, match="must differ as folder names"):
        fakes.make_run(tmp_path / "run", task_names=("a b", "a-b"))
    with pytest.raises(RunError, match="has no task"):
        fakes.make_run(tmp_path / "run", task_names=())


def test_a_directory_with_only_the_drawn_stream_is_a_new_one(fakes, tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    assert len(whole_run(fakes, tmp_path / "run")) == 3


def two(work):
    """`work(share)` in two threads that stand for two processes; their results, or errors, by rank."""
    barrier, told = threading.Barrier(2, timeout=20), [None]

    def tell(rank, value):
        if rank == 0:
            told[0] = json.loads(json.dumps(value))
        barrier.wait()
        found = told[0]
        barrier.wait()
        return found

    def run(rank):
        try:
            found[rank] = work(Share(rank=rank, world=2, wait=barrier.wait, tell=lambda v: tell(rank, v)))
        except RunError as error:
            found[rank] = error

    found = [None, None]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_of_two_processes_both_train_and_one_does_the_rest(fakes, tmp_path):
    expected = whole_run(fakes, tmp_path / "one" / "run", start=tmp_path / "start")

    def work(share):
        journal = tmp_path / f"journal{share.rank}"

        class Method(fakes.FakeMethod):
            def train_task(self, ctx):
                if share.chief:
                    trained = super().train_task(ctx)
                else:
                    self.note(f"{self.name} {ctx.step} train")
                    trained = Checkpoint(base="said by the first")
                share.wait()
                return trained

        class Evaluator(fakes.FakeEvaluator):
            def __call__(self, checkpoint, **rest):
                found = super().__call__(checkpoint, **rest) if share.chief else {"scores": {}, "safety": {}}
                share.wait()
                return found

        run = fakes.make_run(tmp_path / "two" / "run", share=share, start=tmp_path / "start")
        with run.claimed():
            theta_0 = run.evaluate_theta_0(Evaluator())
            return theta_0, run.run_method(Method(journal=journal), Evaluator())

    first, second = two(work)
    assert first == second, "both go on with what the first has written"
    scores = [[r.scores for r in records] for records in (first[1], expected)]
    assert scores[0] == scores[1]
    assert contents(tmp_path / "two" / "run") == contents(tmp_path / "one" / "run")
    lines = [(tmp_path / f"journal{rank}").read_text().split("\n")[:-1] for rank in range(2)]
    assert lines[0] == [f"fake {t} {phase}" for t in range(3) for phase in ("begin", "train", "end")]
    assert lines[1] == [f"fake {t} train" for t in range(3)]
    again = two(work)
    assert again == [first, second] and len((tmp_path / "journal1").read_text().splitlines()) == 3


def test_every_process_hears_that_a_directory_is_in_use(fakes, tmp_path):
    def work(share):
        with fakes.make_run(tmp_path / "run", share=share).claimed():
            raise AssertionError("it was held")

    with fakes.make_run(tmp_path / "run").claimed():
        first, second = two(work)
    assert "is in use by another" in str(first)
    assert str(second).startswith("The first process stopped: RunError: ") and "is in use by another" in str(second)
