"""Everything that renames or deletes, under Windows' rule for open files (`tests/mandatory_locks.py`)."""

import gc
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.mandatory_locks import HELD, mandatory_locks  # noqa: F401 (a fixture)


@pytest.mark.usefixtures("mandatory_locks")
def test_the_simulation_refuses_what_windows_refuses(tmp_path):
    path, other = tmp_path / "inside" / "x.safetensors", tmp_path / "other"
    path.parent.mkdir()
    save_file({"a": torch.ones(9)}, path)
    other.write_bytes(b"x")
    attempts = (
        path.unlink,
        lambda: path.rename(tmp_path / "y"),
        lambda: other.replace(path),
        lambda: path.parent.replace(tmp_path / "moved"),
        lambda: shutil.rmtree(path.parent),
    )
    for hold in (lambda: path.open("rb"), lambda: load_file(path), lambda: safe_open(path, "pt")):
        held = hold()
        for attempt in attempts:
            with pytest.raises(PermissionError, match=HELD):
                attempt()
        del held
        gc.collect()
    with pytest.raises(FileExistsError):
        other.rename(path)
    other.replace(path)
    shutil.rmtree(path.parent)
    assert list(tmp_path.iterdir()) == []
