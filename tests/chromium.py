"""Headless Chromium for the tests that look at pages, tried again where it hangs (now and then, on a busy machine)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; install one to look at the pages"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-extensions",
]
ATTEMPTS, SECONDS = 4, 50


def chromium(profile: Path, *arguments: str, ready: str = "") -> str:
    """What Chromium prints. A run that hangs is killed with its children, and tried again with a fresh profile.

    `ready`: what the printed page must hold; a page that was printed before its script ran is asked again.
    """
    out = ""
    for attempt in range(ATTEMPTS):
        command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}-{attempt}", *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        ) as process:
            try:
                out, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                continue
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode == 0 and ready in out:
            return out
    raise AssertionError(f"Chromium gave no page in {ATTEMPTS} attempts of {SECONDS} s; last: {out[-500:]!r}")
