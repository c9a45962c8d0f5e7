"""One tiny LLaVA per session: building it costs less than importing transformers, but not nothing."""

from pathlib import Path

import pytest

import model_zoo
from holdfast.data.types import Sample, Turn
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_zoo.save("llava", tmp_path_factory.mktemp("zoo") / "llava")


@pytest.fixture(scope="session")
def loaded(llava_folder: Path) -> LoadedModel:
    return load(llava_folder, device="cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    return [model_zoo.picture(folder / f"{i}.png", colour) for i, colour in enumerate(colours)]


@pytest.fixture(scope="session")
def samples(pictures: list[Path]) -> list[Sample]:
    """Text only, one image, two images, several turns: what one batch may hold."""
    return [
        Sample.single("text", "Say hello.", "Hello there."),
        Sample.single("image", "<image>\nWhat colour is it?", "Red", images=pictures[:1]),
        Sample.single("two", "<image> or <image>: which is green?", "the second one", images=pictures[:2]),
        Sample(
            id="turns",
            turns=(
                Turn(role="user", text="<image>\nWhat is this?"),
                Turn(role="assistant", text="A square."),
                Turn(role="user", text="Sure?"),
                Turn(role="assistant", text="Yes."),
            ),
            images=(pictures[2],),
        ),
        Sample.single("unmarked", "Describe the picture.", "It is blue.", images=pictures[2:]),
    ]
