"""What a folder of training tensors holds, as one short string."""

import hashlib
from collections.abc import Iterable

from sidestep.data.dataset import Song


def fingerprint(songs: Iterable[Song]) -> str:
    """Hex digest of every song's name, latents, conditions and repeats; the order does not matter."""
    digests = []
    for song in songs:
        digest = hashlib.blake2b(f"{song.name}\0{song.repeat}\0{tuple(song.latents.shape)}\0{tuple(song.conditions.shape)}".encode(), digest_size=16)
        for tensor in (song.latents, song.conditions):
            digest.update(tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
        digests.append(digest.hexdigest())
    return hashlib.blake2b("".join(sorted(digests)).encode(), digest_size=16).hexdigest()
