"""The `holdfast` command: one file per verb, each with a function `command` that imports heavy things inside."""

from __future__ import annotations

import importlib
import os

import typer

from holdfast.cli import boundary
from holdfast.cli.panels import PanelledCommand
from holdfast.cli.root import root

# verb -> module. A verb's module must be cheap to import: torch and transformers are imported inside its `command`.
VERBS: dict[str, str] = {
    "demo": "holdfast.cli.demo",
    "init": "holdfast.cli.init",
    "run": "holdfast.cli.run",
    "plan": "holdfast.cli.plan",
    "sweep": "holdfast.cli.sweep",
    "list": "holdfast.cli.list",
    "new": "holdfast.cli.new",
    "doctor": "holdfast.cli.doctor",
    "score": "holdfast.cli.score",
    "example": "holdfast.cli.example",
    "restore": "holdfast.cli.restore",
    "gate": "holdfast.cli.gate",
    "calibrate": "holdfast.cli.calibrate",
    "calibrate-data": "holdfast.cli.calibrate_data",
    "calibrate-grams": "holdfast.cli.calibrate_grams",
    "edit": "holdfast.cli.edit",
    "sweep-edit": "holdfast.cli.sweep_edit",
    "inspect": "holdfast.cli.inspect",
    "evaluate": "holdfast.cli.evaluate",
    "report": "holdfast.cli.report",
    "label": "holdfast.cli.label",
    "route": "holdfast.cli.route",
    "merge-experts": "holdfast.cli.merge_experts",
    "serve": "holdfast.cli.serve",
    "check-served": "holdfast.cli.check_served",
    "export-router": "holdfast.cli.export_router",
    "push": "holdfast.cli.push",
}

# Heading of `holdfast --help` -> the verbs below it, in the order of the README's doors.
GROUPS: dict[str, tuple[str, ...]] = {
    "Look around": ("demo", "example", "doctor", "list"),
    "Deploy a tuned model": ("restore", "gate", "serve", "push"),
    "Tune task after task": ("init", "plan", "run", "sweep", "report", "new"),
    "Evaluate": ("evaluate", "score", "label"),
    "The edit, step by step": ("calibrate", "calibrate-data", "calibrate-grams", "edit", "sweep-edit", "inspect"),
    "Experts (CRAM)": ("route", "merge-experts", "export-router", "check-served"),
}

app = typer.Typer(
    name="holdfast",
    help="Tune a multimodal LLM again and again, and hold fast to what it knows and what it refuses.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


app.callback()(root)


def _register() -> None:
    heading_of = {verb: heading for heading, verbs in GROUPS.items() for verb in verbs}
    # In the order of the groups; one that stands in none comes last, under "Commands".
    for verb in [*heading_of, *(verb for verb in VERBS if verb not in heading_of)]:
        command = importlib.import_module(VERBS[verb]).command
        app.command(name=verb, cls=PanelledCommand, rich_help_panel=heading_of.get(verb))(command)


_register()


def main() -> None:
    """Entry point: every verb ends as `holdfast.cli.boundary` says, with a sentence and never with a traceback."""
    # Read when torch is first imported, which is later. OpenMP threads that spin while they wait cost a shared machine
    # several times the work; whoever has the cores alone may ask for them with OMP_WAIT_POLICY=active.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    boundary.run(app)
