"""What all tests of this folder need."""

import pytest

from src.models.pretrained import import_torchvision


@pytest.fixture(autouse=True)
def importable() -> None:
    import_torchvision()
