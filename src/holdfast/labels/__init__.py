"""People's labels beside a run: a blind draw of replies, two ways to label them, and the rates that follow.

```
RUN/labels/draw.json                 which replies were drawn, from strata of which size (inclusion probabilities)
RUN/labels/labels-<annotator>.jsonl  one line per label: {"draw", "item", "label", "annotator"}
RUN/labels/corrected.json            the corrected rates (`holdfast label RUN --show`)
```
"""

from holdfast.labels.draw import Draw, Item, LabelStratum, make_draw, read_draw, read_replies, write_draw
from holdfast.labels.estimate import Correction, correct
from holdfast.labels.form import write_form
from holdfast.labels.store import BEHAVIOUR_OF, LABELS, Labels, import_labels, read_labels, write_label

__all__ = [
    "BEHAVIOUR_OF",
    "LABELS",
    "Correction",
    "Draw",
    "Item",
    "LabelStratum",
    "Labels",
    "correct",
    "import_labels",
    "make_draw",
    "read_draw",
    "read_labels",
    "read_replies",
    "write_draw",
    "write_form",
    "write_label",
]
