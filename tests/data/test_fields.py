"""The fields of a song: what people write, and the one form in which it reaches a prompt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.data.fields import FIELDS, FieldError, field_named, parse_field
from sidestep.metadata import LANGUAGES

WITH_MEANING = [
    ("bpm", "120", 120),
    ("bpm", 119.6, 120),
    ("bpm", "120 BPM", 120),
    ("bpm", "~ 92,5", 93),
    ("bpm", 30, 30),
    ("bpm", "300", 300),
    ("bpm", 0, None),
    ("bpm", "N/A", None),
    ("keyscale", "Am", "A minor"),
    ("keyscale", "a minor", "A minor"),
    ("keyscale", "A MINOR", "A minor"),
    ("keyscale", "C", "C major"),
    ("keyscale", "Cmaj", "C major"),
    ("keyscale", "C M", "C major"),
    ("keyscale", "F♯m", "F# minor"),
    ("keyscale", "Bb", "Bb major"),
    ("keyscale", "bb minor", "Bb minor"),
    ("keyscale", "E♭ major", "Eb major"),
    ("keyscale", "E flat major", "Eb major"),
    ("keyscale", "c sharp moll", "C# minor"),
    ("keyscale", "8A", "A minor"),
    ("keyscale", "8B", "C major"),
    ("keyscale", "12A", "C# minor"),
    ("keyscale", "1B", "B major"),
    ("keyscale", "1m", "A minor"),
    ("keyscale", "1d", "C major"),
    ("keyscale", "unknown", None),
    ("timesignature", "4/4", "4"),
    ("timesignature", "6 / 8", "6"),
    ("timesignature", 3, "3"),
    ("timesignature", 2.0, "2"),
    ("timesignature", "", None),
    ("language", "EN", "en"),
    ("language", "eng", "en"),
    ("language", "Japanese", "ja"),
    ("language", "日本語", "ja"),
    ("language", "pt-BR", "pt"),
    ("language", "zh_CN", "zh"),
    ("language", "instrumental", None),
    ("duration", "3:25", 205.0),
    ("duration", "1:00:05", 3605.0),
    ("duration", "30.5 s", 30.5),
    ("is_instrumental", "Yes", True),
    ("is_instrumental", False, False),
    ("prompt_override", "Genre", "genre"),
    ("prompt_override", None, None),
    ("repeat", "3", 3),
    ("caption", "  a\n  dreamy \t song ", "a dreamy song"),
    ("genre", ["pop", "rock"], "pop, rock"),
    ("lyrics", "\n\n[Verse]  \r\nla la\r\n\n", "[Verse]\nla la"),
    ("lyrics", ["la", "li"], "la\nli"),
    ("lyrics", "[ar:Me]\n[00:01.50] la\n\n[00:03.00]li", "[00:01.50] la\n\n[00:03.00]li"),
    ("caption", "null\0byte end", "nullbyte end"),
]
WITHOUT_MEANING = [
    ("bpm", "fast"),
    ("bpm", 29),
    ("bpm", 301),
    ("bpm", "120-130"),
    ("bpm", float("nan")),
    ("bpm", True),
    ("bpm", [120]),
    ("keyscale", "H"),
    ("keyscale", "A dorian"),
    ("keyscale", "13A"),
    ("keyscale", 7),
    ("timesignature", "5/4"),
    ("timesignature", "12/8"),
    ("language", "klingon"),
    ("duration", -3),
    ("duration", "long"),
    ("is_instrumental", "maybe"),
    ("prompt_override", "lyrics"),
    ("repeat", 0),
    ("repeat", 1.5),
    ("caption", {"a": 1}),
    ("lyrics", 5),
]


@pytest.mark.parametrize(("field", "written", "meant"), WITH_MEANING)
def test_a_value_is_brought_into_one_form(field, written, meant):
    assert parse_field(field, written) == meant


@pytest.mark.parametrize(("field", "written"), WITHOUT_MEANING)
def test_a_value_that_means_nothing_is_told(field, written):
    with pytest.raises(FieldError):
        parse_field(field, written)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("BPM", "bpm"),
        ("Tempo", "bpm"),
        ("Key", "keyscale"),
        ("scale", "keyscale"),
        ("Time Signature", "timesignature"),
        ("signature", "timesignature"),
        ("lang", "language"),
        ("Custom-Tag", "custom_tag"),
        ("trigger", "custom_tag"),
        ("is_instrumental", "is_instrumental"),
        ("prompt override", "prompt_override"),
        ("mood", None),
        ("", None),
    ],
)
def test_a_field_goes_by_the_names_people_give_it(key, field):
    assert field_named(key) == field


def test_every_language_the_model_knows_is_its_own_code():
    assert len(LANGUAGES) == 50
    assert all(parse_field("language", code) == code for code in LANGUAGES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)


@settings(deadline=None)
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_any_value_at_all_is_parsed_or_told_and_parsed_twice_the_same(field, value):
    try:
        parsed = parse_field(field, value)
    except FieldError as error:
        told = str(error)
        assert told
        return
    if parsed is not None:
        assert parse_field(field, parsed) == parsed
        if isinstance(parsed, str):
            parsed.encode("utf-8")
