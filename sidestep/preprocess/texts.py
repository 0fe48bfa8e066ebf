"""The first pass over text, in one sweep: the text encoder alone on the device."""

from collections.abc import Sequence

from sidestep.acestep.conditions import LYRIC_TOKENS, TEXT_TOKENS, embed_lyrics, encode_text, token_ids
from sidestep.events import Notice
from sidestep.preprocess.fingerprint import differences
from sidestep.preprocess.job import Inspection, Job, Need
from sidestep.preprocess.songs import Prompts, Song
from sidestep.preprocess.space import watch
from sidestep.preprocess.tally import Pace, Tally
from sidestep.preprocess.work import TEXT


def encode_texts(job: Job, songs: Sequence[Song], tally: Tally) -> list[tuple[Song, Inspection]]:
    """Text and lyric states of each song that no other process has claimed, in the work folder.

    Returns the songs that are ready for the second pass, with what they need. The text encoder is loaded when the first song needs it.
    """
    ready: list[tuple[Song, Inspection]] = []
    pace = Pace(tally.report, "Pass 1: text", {song.key: 1.0 for song in songs}, "songs")
    encoder = _Encoder(job)
    for song in songs:
        if not tally.claims.take(song.key) or not tally.claims.holds(song.key):
            pace.end(song, worked=False)
            continue
        found = job.inspect(song)
        if found.need in (Need.METADATA, Need.CONDITIONS):
            ready.append((song, found))
        elif found.need == Need.NOTHING:
            tally.stands(song)
        else:  # its file changed a moment ago
            tally.claims.release(song.key)
        if found.need == Need.CONDITIONS:
            pace.begin(song)
            try:
                encoder.save_states(song, song.prompts(found.seconds), tally)
            except OSError as error:
                tally.fail_for(song, "text", error)
                ready.pop()
        pace.end(song)
    return ready


class _Encoder:
    """Text encoder and tokenizer, loaded at their first use."""

    def __init__(self, job: Job):
        self._job, self._model, self._tokenizer = job, None, None

    def save_states(self, song: Song, prompts: Prompts, tally: Tally) -> None:
        """Encode a song's prompts, unless that was done before; says how many tokens the model will not see."""
        job = self._job
        facts = job.work.facts(song.key, TEXT)
        if facts and not differences(facts.get("fingerprint", {}).get("text"), job.text_part(prompts)):
            return
        if self._model is None:
            self._model, self._tokenizer = job.checkpoint.load_text_encoder(job.device, job.dtype)
        text_ids, text_lost = token_ids(self._tokenizer, prompts.text, TEXT_TOKENS)
        lyric_ids, lyrics_lost = token_ids(self._tokenizer, prompts.lyrics, LYRIC_TOKENS)
        for what, lost, limit in (("text prompt", text_lost, TEXT_TOKENS), ("lyrics", lyrics_lost, LYRIC_TOKENS)):
            if lost:
                tally.report(
                    Notice(
                        message=f"{song.name}: the {what} is longer than the {limit} tokens the model reads; the last {lost} tokens are lost.", level="warning"
                    )
                )
        tensors = {"text": encode_text(self._model, text_ids), "lyrics": embed_lyrics(self._model, lyric_ids)}
        if job.with_hints:
            tensors["hints_text"] = encode_text(self._model, token_ids(self._tokenizer, prompts.hints_text, TEXT_TOKENS)[0])
        watch(job.config.tensor_output)
        facts = {"fingerprint": {"text": dict(job.text_part(prompts, made=True))}, "tokens_lost": {"text": text_lost, "lyrics": lyrics_lost}}
        job.work.save(song.key, TEXT, tensors, facts)
