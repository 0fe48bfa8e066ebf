"""Audio out of the program: 24-bit FLAC."""

from pathlib import Path

import numpy as np
import soundfile

from sidestep.atomic import replacing


def write_flac(path: Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write float32 [2, S] as a whole file or not at all. Raises OSError."""
    with replacing(path) as temporary:
        try:
            soundfile.write(temporary, audio.T, sample_rate, format="FLAC", subtype="PCM_24")
        except soundfile.LibsndfileError as error:
            raise OSError(f"{path}: cannot be written ({error.error_string})") from error
