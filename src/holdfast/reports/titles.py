"""What readers call a method, and one sentence about it: reports show these, and the code name beside them.

A method that is not listed (one of one's own, or a setting with a label of its own) is called by its label.
"""

from __future__ import annotations

# Name of a method -> (title, what it does).
TITLES: dict[str, tuple[str, str]] = {
    "seqft": ("Plain tuning", "each task is tuned on the model that the last one left, and nothing else is done"),
    "hpa": ("HPA", "after each task the weight columns that matter most for refusals get their old values back"),
    "hpa_benign": ("HPA, with harmless answers", "HPA, calibrated on answers to harmless requests too"),
    "hpa_eps": ("HPA, by safety alone", "HPA without looking at the task: its columns are chosen by safety alone"),
    "hpa_phi": ("HPA, by the difference", "HPA, its columns chosen by the difference of safety and task alone"),
    "hpa_no_projection": ("HPA, no projection", "HPA without taking the projection on the old weights away"),
    "anchor": ("Anchored edit", "after each task the weights that serve it best while refusals and earlier tasks hold"),
    "anchor_no_past": ("Anchored edit, no past", "the anchored edit without statistics of earlier tasks"),
    "anchor_no_benign": ("Anchored edit, no harmless answers", "the anchored edit, calibrated on refusals alone"),
    "anchor_no_screen": (
        "Anchored edit, unscreened",
        "the anchored edit on task samples that may be forbidden requests",
    ),
    "interpolation": ("Interpolation", "control: every weight goes back a fixed part of the way"),
    "interpolation_matched": ("Interpolation, matched", "interpolation, in each layer as strong as HPA's edit"),
    "largest_change": ("Largest change back", "control: the columns that changed most get their old values back"),
    "largest_change_matched": ("Largest change, matched", "the largest change back, in each layer as strong as HPA"),
    "random_columns": ("Random columns back", "control: columns drawn at random get their old values back"),
    "random_columns_matched": ("Random columns, matched", "random columns back, in each layer as strong as HPA's edit"),
    "safe_delta": ("Safe Delta", "the change is kept where it serves the task, and compensated for its harm to safety"),
    "model_tailor": ("Model Tailor", "few of the tuned weights are kept, and compensated for the others"),
    "safe_lora": ("Safe LoRA", "adapters that leave the direction of the alignment are projected on it"),
    "dare": ("DARE", "changes are dropped at random, and the others scaled up"),
    "ties": ("TIES", "small changes are dropped, and the others merged where their signs agree"),
    "ewc": ("EWC", "elastic weight consolidation: weights that earlier tasks need are held while tuning"),
    "lwf": ("LwF", "learning without forgetting: while tuning, answers stay close to those of the model before"),
    "o_lora": ("O-LoRA", "each task's adapter is held orthogonal to those of earlier tasks"),
    "reg_lora": ("RegLoRA", "the largest entries of earlier adapters are held while tuning"),
    "replay": ("Replay", "some samples of earlier tasks are tuned on again"),
    "safety_replay": ("Safety replay", "a few refusals are learned beside every task's samples"),
    "one_shot": ("One-shot repair", "after each task the model is tuned again on one refusal"),
    "resta": ("RESTA", "the safety vector is added back to the tuned model"),
    "sppft": ("SPPFT", "blocks that safety rests on are not tuned"),
    "cgm": ("CGM", "an entry keeps its change as far as the new task needs it more than the old"),
    "cgm_plus": ("CGM+", "CGM; 95 % of each output's entries keep their whole change, the others none of it"),
    "safe_anchor": ("SafeAnchor", "tasks are tuned off what safety is sensitive to, and drift is repaired"),
    "many": ("MAny", "tasks are tuned apart and merged in closed form after each"),
    "guardspace": ("GuardSpace", "adapters begin where safety is not, and cannot reach it"),
    "osf": ("OSF", "only weak directions of the weights are tuned"),
    "intruders": ("Intruders reduced", "directions of an adapter that the old weight has nothing like are reduced"),
    "moelora": ("MoELoRA", "one mixture of adapters, with a router over tokens, is tuned on from task to task"),
    "frozen": ("Frozen base", "bound: nothing is learned"),
    "joint": ("Joint training", "bound: all tasks so far are tuned on at once, which needs all their data"),
    "cram": ("CRAM", "a small adapter for each task on an untouched base, found without a task id"),
    "cram_hpa": ("CRAM + HPA", "CRAM, with HPA's edit on every finished adapter"),
    "cram_anchor": ("CRAM + anchored edit", "CRAM, with the anchored edit on every finished adapter"),
    "cram_guard": ("CRAM + guard", "CRAM; what the untouched base would refuse, the base answers alone"),
    "cram_no_penalty": ("CRAM, no penalty", "CRAM without the orthogonality penalty"),
    "cram_fixed_rank": ("CRAM, fixed rank", "CRAM with the same rank for every task"),
    "cram_no_reuse": ("CRAM, one expert", "CRAM; the nearest adapter alone answers"),
    "cram_no_abstention": (
        "CRAM, never the base",
        "CRAM; a request that is like no task is answered by an adapter too",
    ),
    "cram_official": ("CRAM, released code", "CRAM with the thresholds and choices of its released code"),
}
BEFORE = "Before any task"


def title_of(label: str) -> str:
    """What a reader calls the method with this label in a run."""
    return TITLES[label][0] if label in TITLES else label


def sentence_of(label: str) -> str:
    """What the method does, in one sentence without its full stop."""
    return TITLES[label][1] if label in TITLES else "a method or setting of this run's own; its options stand below"
