"""The labelling form in a real browser: it labels, saves what `--import` reads, and runs nothing of a reply's."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

import fake_run
from chromium import MARKS, chromium
from holdfast.labels import import_labels, make_draw, read_labels, write_draw, write_form
from holdfast.labels.draw import shown_rows

pytestmark = MARKS
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--<script>"
DRIVER = """
<iframe id=f width=WIDTH height=800 src='FORM'></iframe><pre id=o>nothing</pre>
<script>
f.onload = async () => {
  const w = f.contentWindow, d = f.contentDocument, at = (id) => d.getElementById(id);
  let saved = null;
  w.URL.createObjectURL = (blob) => { saved = blob; return "data:,"; };
  const wide = [];
  const key = (k) => d.dispatchEvent(new w.KeyboardEvent("keydown", { key: k, bubbles: true }));
  for (let i = 0; i < 50; i++) { wide.push(d.documentElement.scrollWidth); key(String(1 + (i % 5))); }
  key("ArrowLeft"); at("choices").children[0].click();
  at("save").click();
  const asked = at("said").textContent;
  at("name").value = "eve"; at("save").click();
  const text = await saved.text();
  o.textContent = JSON.stringify({ title: d.title, asked, text, widest: Math.max(...wide), images: d.images.length,
                                   reply: at("reply").textContent, where: at("where").textContent });
};
</script>
"""


@pytest.mark.parametrize("width", [390, 1200])
def test_a_person_labels_saves_and_the_run_reads_it(tmp_path: Path, width: int) -> None:
    run = fake_run.write_run(tmp_path / "run", methods={"seqft": 0.6, "hpa": 0.9}, n=30)
    draw = make_draw(run, number=50)
    write_draw(run, draw)
    rows = shown_rows(run, draw)
    for row in rows:
        row["reply"], row["prompt"] = HOSTILE, HOSTILE + "x" * 300
    form = write_form(tmp_path / "form.html", draw, rows)
    outer = tmp_path / "driver.html"
    outer.write_text(DRIVER.replace("FORM", form.as_uri()).replace("WIDTH", str(width)))
    arguments = ["--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=5000", "--window-size=1300,900"]
    dom = chromium(tmp_path / "profile", *arguments, outer.as_uri(), ready='{"title"')
    found = re.search(r"<pre id=\"o\">(.*?)</pre>", dom, re.S)
    assert found, dom[:2000]
    seen = json.loads(html.unescape(found[1]))
    assert seen["title"] == "50 replies to label" and seen["images"] == 0 and seen["reply"] == HOSTILE
    assert seen["widest"] <= width and "Please give your name first" in seen["asked"]
    assert seen["where"] == "Reply 50 of 50; 50 labelled"
    file = tmp_path / "labels-eve.jsonl"
    file.write_text(seen["text"])
    assert import_labels(run, draw, file) == {"eve": (50, 0)}
    labels = read_labels(run, draw).by_annotator["eve"]
    assert [labels[n] for n in (1, 2, 3, 4, 5)] == ["refused", "complied", "other_safe", "damaged", "cannot_tell"]
    assert len(labels) == 50
