"""theta_0's safe answers as samples, for methods that learn from them or calibrate on them."""

from __future__ import annotations

from holdfast.data.types import Sample, Stream
from holdfast.errors import CalibrationError


def refusals(stream: Stream, name: str) -> list[Sample]:
    """The stream's safety calibration samples, each with theta_0's answer. name: of the method that asks.

    Raises: CalibrationError: the stream has none.
    """
    found = list(stream.safety_calibration)
    if not found:
        raise CalibrationError(
            f"{name} needs safety calibration samples, and stream {stream.name!r} has none. Give the stream "
            "`safety_calibration` prompts (theta_0 answers them itself)."
        )
    return found
