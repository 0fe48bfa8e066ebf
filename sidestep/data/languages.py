"""Languages the model was taught to sing, and the ways people and programs write them."""

# code: ISO 639-2/3 codes and names, in English and in the language itself
_WRITTEN = {
    "ar": "ara arabic العربية",
    "az": "aze azerbaijani azərbaycan",
    "bg": "bul bulgarian български",
    "bn": "ben bengali bangla বাংলা",
    "ca": "cat catalan català",
    "cs": "cze ces czech čeština",
    "da": "dan danish dansk",
    "de": "ger deu german deutsch",
    "el": "gre ell greek ελληνικά",
    "en": "eng english",
    "es": "spa spanish español castilian",
    "fa": "per fas persian farsi فارسی",
    "fi": "fin finnish suomi",
    "fr": "fre fra french français",
    "he": "heb hebrew iw עברית",
    "hi": "hin hindi हिन्दी",
    "hr": "hrv croatian hrvatski",
    "ht": "hat haitian kreyòl",
    "hu": "hun hungarian magyar",
    "id": "ind indonesian in",
    "is": "ice isl icelandic íslenska",
    "it": "ita italian italiano",
    "ja": "jpn japanese jp 日本語",
    "ko": "kor korean kr 한국어",
    "la": "lat latin",
    "lt": "lit lithuanian lietuvių",
    "ms": "may msa malay",
    "ne": "nep nepali नेपाली",
    "nl": "dut nld dutch flemish nederlands",
    "no": "nor norwegian nb nob nn nno norsk",
    "pa": "pan punjabi panjabi ਪੰਜਾਬੀ",
    "pl": "pol polish polski",
    "pt": "por portuguese português",
    "ro": "rum ron romanian română",
    "ru": "rus russian русский",
    "sa": "san sanskrit",
    "sk": "slo slk slovak slovenčina",
    "sr": "srp serbian српски",
    "sv": "swe swedish svenska",
    "sw": "swa swahili kiswahili",
    "ta": "tam tamil தமிழ்",
    "te": "tel telugu తెలుగు",
    "th": "tha thai ไทย",
    "tl": "tgl tagalog filipino fil",
    "tr": "tur turkish türkçe",
    "uk": "ukr ukrainian українська",
    "ur": "urd urdu اردو",
    "vi": "vie vietnamese tiếng",
    "yue": "cantonese 粵語 粤语 廣東話 广东话",
    "zh": "chi zho cmn chinese mandarin cn 中文 普通话 國語 国语",
}
LANGUAGES = tuple(_WRITTEN)
_CODE_OF = {name: code for code, names in _WRITTEN.items() for name in (code, *names.split())}


def language_code(text: str) -> str | None:
    """The model's code of a language: "EN", "eng", "English", "en-US" → "en"; None where the model has no such language."""
    text = text.strip().casefold().replace("_", "-")
    return _CODE_OF.get(text) or _CODE_OF.get(text.split("-")[0])
