"""Music that has nothing to do with anybody's songs: what an adapter does to it is what it does to everything else."""

from sidestep.acestep.conditions import INSTRUMENTAL, Prompt

SECONDS = 6.0  # enough for every layer's attention; drift is a mean over many short pieces
_VERSE = "[Verse]\nThe kettle sings, the street is wet\nI count the lights I can't forget\n"
_CHORUS = "[Chorus]\nHold on, hold on, the morning's near\nHold on, hold on, I'm right in here\n"
_RAP = "[Verse]\nTen past two and the tape still runs\nTwo old friends and a pair of drums\n"
_QUIET = "[Verse]\nSnow on the wire, snow on the sill\nNobody moves and the clock stands still\n"
_DEUTSCH = "[Strophe]\nDer letzte Zug ist längst vorbei\nDie Stadt ist leer, mein Kopf ist frei\n"
_ESPANOL = "[Estrofa]\nLa calle baila bajo el sol\nTu risa lleva mi canción\n"

# caption, lyrics, their language, bpm, key
_TABLE = (
    ("solo grand piano, slow romantic nocturne, rubato, concert hall", INSTRUMENTAL, "unknown", 60, "E minor"),
    ("string quartet, baroque dance, crisp and bright", INSTRUMENTAL, "unknown", 112, "D major"),
    ("full symphony orchestra, heroic brass fanfare, film score", INSTRUMENTAL, "unknown", 96, "Bb major"),
    ("a cappella choir in a cathedral, long reverberation", INSTRUMENTAL, "unknown", 54, "F major"),
    ("fast bebop quartet, tenor saxophone solo, walking bass, brushes", INSTRUMENTAL, "unknown", 220, "Bb major"),
    ("smoky jazz ballad, female singer, upright bass, piano", _QUIET, "en", 66, "G minor"),
    ("delta blues, slide guitar and stomping foot, rough male voice", _VERSE, "en", 88, "A major"),
    ("bluegrass, banjo, fiddle and mandolin, quick and cheerful", INSTRUMENTAL, "unknown", 140, "G major"),
    ("country ballad, pedal steel, warm male voice", _VERSE + _CHORUS, "en", 76, "C major"),
    ("acoustic folk song, fingerpicked guitar, soft female voice", _QUIET, "en", 92, "D major"),
    ("indie rock, jangling guitars, live drums, longing voice", _VERSE + _CHORUS, "en", 128, "A major"),
    ("heavy metal, double bass drums, distorted guitars, screaming", _CHORUS, "en", 180, "E minor"),
    ("punk rock, three chords, shouted chorus, raw recording", _CHORUS, "en", 190, "C major"),
    ("seventies funk, slap bass, clavinet, tight horns", INSTRUMENTAL, "unknown", 106, "E minor"),
    ("soul and gospel, organ, choir answers, powerful voice", _CHORUS, "en", 84, "Ab major"),
    ("old school hip hop, dusty sample, boom bap drums, male rap", _RAP, "en", 92, "C minor"),
    ("trap, deep 808 bass, fast hi-hats, dark bells", INSTRUMENTAL, "unknown", 142, "F minor"),
    ("deep house, round bass, warm chords, steady kick", INSTRUMENTAL, "unknown", 122, "A minor"),
    ("techno, hypnotic, pounding kick, acid line", INSTRUMENTAL, "unknown", 134, "D minor"),
    ("drum and bass, rolling breakbeat, sub bass, airy pads", INSTRUMENTAL, "unknown", 174, "F minor"),
    ("ambient drone, no drums, slow evolving pads, field recordings", INSTRUMENTAL, "unknown", None, ""),
    ("eighties synth pop, gated drums, bright keys, male voice", _DEUTSCH, "de", 118, "B minor"),
    ("reggaeton, dembow rhythm, catchy voice", _ESPANOL, "es", 94, "A minor"),
    ("roots reggae, offbeat guitar, heavy bass, dub echoes", INSTRUMENTAL, "unknown", 74, "G minor"),
)
CAPTIONS = tuple(
    Prompt(caption=caption, lyrics=lyrics, language=language, bpm=bpm, keyscale=key, duration=SECONDS, seed=number)
    for number, (caption, lyrics, language, bpm, key) in enumerate(_TABLE)
)
