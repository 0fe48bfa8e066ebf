"""Text files as people's editors leave them, in whatever encoding."""

import random
import time

import pytest

from sidestep.data.sidecars import Sidecars
from sidestep.data.text import UNREADABLE, decode_text

RUSSIAN = "Я иду по пустой дороге\nИ никто не ждёт меня дома\nТолько ветер поёт мне тихо\n"
CHINESE = "月亮代表我的心\n你问我爱你有多深\n我爱你有几分\n"

WRITTEN = [
    ("cp932", "[Verse]\n桜の花が咲いている\n君を待っていた\n"),
    ("cp932", "caption: 夜の街を歩く\n"),
    ("cp932", "[Verse]\nスキップビート\n"),
    ("euc_jp", "[Verse]\n桜の花が咲いている\n君を待っていた\n"),
    ("cp1251", "caption: грустная песня под гитару\nlanguage: ru\n"),
    ("cp1251", RUSSIAN),
    ("cp1251", f"[Verse]\n{RUSSIAN}[Chorus]\nBaby, любовь моя\n"),
    ("koi8_r", RUSSIAN),
    ("koi8_r", "caption: грустная песня\n"),
    ("gbk", f"[Verse]\n{CHINESE}"),
    ("gbk", "caption: 悲伤的情歌，女声\n"),
    ("gb18030", "[主歌]\n夜空中最亮的星\n能否听清\n那仰望的人心底的孤独和叹息\n"),
    ("big5", "[Verse]\n月亮代表我的心\n你問我愛你有多深\n我愛你有幾分\n"),
    ("big5", "caption: 悲傷的情歌，女聲\n"),
    ("euc_kr", "[Verse]\n나 보기가 역겨워 가실 때에는\n말없이 고이 보내 드리우리다\n"),
    ("cp949", "caption: 슬픈 발라드, 여성 보컬\nlanguage: ko\n"),
    ("cp1252", "caption: Ça va, señor\nlyrics: äöü\n"),
    ("cp1252", "[Verse]\nDans mon cœur il y a l’été\nÀ la claire fontaine, où j’étais allée\n"),
    ("cp1252", "[Strophe]\nÜber den Dächern weht der Wind, für dich wär's schön\nGrüße aus München\n"),
    ("cp1252", "caption: naïve\nlyrics:\n[Verse]\n" + "walking down the road and singing\n" * 30),
    ("cp1252", "it’s 100€ — “ok”"),
    ("cp1252", "caption: 5° below\n"),
    ("cp1252", "Motörhead"),
    ("cp1252", "BEYONCÉ"),
    ("cp1250", "[Zwrotka]\nŻółta jaźń gęślą nuci, świat się kręci\nwłaśnie tak\n"),
    ("cp1253", "[Verse]\nΣτο περιγιάλι το κρυφό κι άσπρο σαν περιστέρι\nδιψάσαμε το μεσημέρι\n"),
]


@pytest.mark.parametrize(("encoding", "text"), WRITTEN)
def test_text_comes_out_as_it_was_written_and_the_guess_is_told(encoding, text):
    decoded, problem = decode_text(text.encode(encoding))
    assert decoded == text
    assert problem is not None
    assert "is no UTF-8 and was read as" in problem


@pytest.mark.parametrize("snippet", ["爱", "사랑해", "ÄÖÜ", "ГРУСТНАЯ ПЕСНЯ", "愛"])
def test_a_snippet_that_may_be_anything_is_never_taken_for_certain(snippet):
    for encoding in ("gbk", "cp949", "cp1252", "cp1251", "cp932"):
        try:
            data = snippet.encode(encoding)
        except UnicodeEncodeError:
            continue
        assert decode_text(data)[1] is not None


UTF_8 = ["", "plain", "é", "沈むように", RUSSIAN, "tab\tand form feed\f"]


@pytest.mark.parametrize("text", UTF_8)
def test_valid_utf_8_is_never_guessed_at(text):
    assert decode_text(text.encode()) == (text, None)


RUBBISH = {
    "noise": random.Random(0).randbytes(400),
    "an mp3": b"ID3\x04\0\0\0\0\x0f\x76TIT2\0\0\0\x05\0\0\x03song"
    + b"\xff\xfb\x90\x64"
    + random.Random(1).randbytes(300),
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x02\0\0\0\x02\0\x08\x06\0\0\0\xf4x\xd4\xfa"
    + random.Random(2).randbytes(99),
    "all bytes": bytes(range(256)) * 3,
    "zeros": bytes(500),
    "controls that are valid UTF-8": b"\x01\x02a\x03\x04b\x05\x06" * 20,
}


@pytest.mark.parametrize("name", RUBBISH)
def test_bytes_that_are_no_text_reach_no_prompt_and_are_told(name, tmp_path):
    assert decode_text(RUBBISH[name]) == ("", UNREADABLE)
    for suffix in (".json", ".txt", ".caption.txt", ".lyrics.txt", ".lrc"):
        (tmp_path / f"song{suffix}").write_bytes(RUBBISH[name])
    found = Sidecars([tmp_path / "song.wav"]).of(tmp_path / "song.wav")
    assert len(found) == 5
    assert all(known.values == {} and known.problems == [UNREADABLE] for known in found)


@pytest.mark.parametrize("text", ["für dich ist es schön, Grüße über alles hinweg", RUSSIAN, CHINESE * 3])
@pytest.mark.parametrize("damage", [b"\xff", b"\xc3", b"\xe6\x9c"])
def test_a_damaged_byte_is_left_out_of_utf_8(text, damage):
    data = text.encode()
    at = data.index(b"\n") + 1 if "\n" in text else len("für ".encode())
    assert decode_text(data[:at] + damage + data[at:]) == (
        text,
        "is damaged UTF-8; what could not be read was left out",
    )


@pytest.mark.parametrize(("encoding", "text"), WRITTEN[::4])
def test_a_long_file_is_told_by_its_letters_wherever_they_stand(encoding, text):
    whole = "words of plain letters\n" * 20_000 + text * 4_000
    started = time.process_time()
    assert decode_text(whole.encode(encoding))[0] == whole
    assert time.process_time() - started < 20
