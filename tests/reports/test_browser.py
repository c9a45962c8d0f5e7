"""The report in a real browser: it draws, follows light and dark, and does not overflow a phone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

import fake_run
from chromium import MARKS, chromium
from holdfast.reports import write_report

pytestmark = MARKS


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = fake_run.write_run(tmp_path_factory.mktemp("runs") / "one", methods={"seqft": 0.6, "hpa": 0.9})
    return write_report([run]).html


@pytest.mark.parametrize(("scheme", "background"), [("light", (255, 255, 255)), ("dark", (18, 22, 28))])
def test_the_page_follows_the_colour_scheme(
    page: Path, tmp_path: Path, scheme: str, background: tuple[int, int, int]
) -> None:
    shot = tmp_path / "shot.png"
    # 0 = dark, 1 = light (blink::mojom::PreferredColorScheme).
    setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    chromium(tmp_path / "p", "--window-size=1100,3600", setting, f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as image:
        rgb = image.convert("RGB")
    assert rgb.getpixel((3, 3)) == background
    colours = {c for _, c in rgb.getcolors(maxcolors=2**24) or []}
    # Text in the page's ink and bars in the series' colours: figures were drawn, not only the frame.
    assert {(127, 135, 148), (31, 119, 208)} <= colours


def test_nothing_overflows_a_phone(page: Path, tmp_path: Path) -> None:
    outer = tmp_path / "phone.html"
    outer.write_text(
        f"<iframe id=f width=390 height=844 style='border:0' src='{page.as_uri()}'></iframe><pre id=o></pre>"
        "<script>f.onload=()=>{const d=f.contentDocument.documentElement;"
        "o.textContent='width '+d.scrollWidth+' height '+d.scrollHeight}</script>"
    )
    dom = chromium(
        tmp_path / "p",
        "--allow-file-access-from-files",
        "--virtual-time-budget=4000",
        "--dump-dom",
        outer.as_uri(),
        ready="width ",
    )
    found = re.search(r"width (\d+) height (\d+)", dom)
    assert found, dom[-500:]
    assert int(found.group(1)) == 390
    assert int(found.group(2)) > 2000


def test_safety_figures_are_in_sight_on_a_phone(page: Path, tmp_path: Path) -> None:
    outer = tmp_path / "phone.html"
    outer.write_text(
        f"<iframe id=f width=390 height=844 style='border:0' src='{page.as_uri()}'></iframe><pre id=o></pre>"
        "<script>f.onload=()=>{const d=f.contentDocument;let seen=0,cut=0;"
        "for(const c of d.querySelectorAll('td,th[scope=row],figcaption,.verdict p,nav a')){"
        "const r=c.getBoundingClientRect();if(!r.width)continue;seen++;if(r.right>390||r.left<0)cut++}"
        "const m=[...d.querySelectorAll('td')]"
        ".filter(c=>c.dataset.head.includes('MASR')&&c.getBoundingClientRect().width>0);"
        "const s=[...d.querySelectorAll('svg')].filter(v=>v.getBoundingClientRect().right>390).length;"
        "o.textContent='seen '+seen+' cut '+cut+' masr '+m.length+' wide '+s}</script>"
    )
    dom = chromium(
        tmp_path / "p",
        "--allow-file-access-from-files",
        "--virtual-time-budget=4000",
        "--dump-dom",
        outer.as_uri(),
        ready="seen ",
    )
    found = re.search(r"seen (\d+) cut (\d+) masr (\d+) wide (\d+)", dom)
    assert found, dom[-500:]
    seen, cut, masr, wide = map(int, found.groups())
    assert seen > 40 and cut == 0 and masr >= 3 and wide == 0
