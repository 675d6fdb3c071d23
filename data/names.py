"""Random names: columns, files and values that no table ever had.

A model that meets few column names learns them by heart and fails on the next table. Each training view of a table
therefore carries names drawn here, in the spellings that real headers have (`netPrice`, `NET_PRICE`, `net price (kg)`,
`np2`, `s_14`), so that the only thing worth learning is to copy.
"""

from __future__ import annotations

from collections.abc import Collection
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    "account action acre actor agent air album amount angle animal answer apple april arch area arm army atom "
    "author axis bag balance ball band bank base basket bath beam bean bed bell belt bench bill bird block blood "
    "board boat body bolt bond bone bonus book border bottle bottom bowl box boy brain branch brand bread brick "
    "bridge brush budget bus cable cake camera camp canal candle capacity captain car carbon card cargo carpet case "
    "cash cat cattle cause cell cent center chain chair chance change channel charge chart check cheese chest chief "
    "child circle citizen city claim class clay client clock cloth cloud club coach coal coast coat code coffee "
    "coin cold color column comet cook copy corn corner cost cotton count court cover cow cream credit crew crop "
    "cross crowd cup curve cycle damage dance data date day deal death debt deck deer degree delay demand density "
    "depth desk device diet dinner dish distance doctor dog door dose draft dream dress drink drive drop dust duty "
    "ear earth east edge effort egg energy engine entry error event exam exit export eye face factor fall family "
    "fan farm fat fee field film finger fire fish flag flight floor flow flower food foot force forest fork frame "
    "fruit fuel fund game gap garden gas gate gift girl glass goal gold grade grain grass group growth guest guide "
    "hair hall hand harbor hat head health heart heat height hill home hook horse hospital hotel hour house ice "
    "idea image import index insect iron island item job juice jump key kitchen knee knife lake lamp land language "
    "law lead leaf leg length lesson letter level library light limit line lion list load loan lock log loss lunch "
    "machine mail map march mark market mass match meal measure meat medal member memory metal meter milk mill mind "
    "minute model month moon motor mountain mouth music nail name needle nerve nest net night noise north nose note "
    "nurse oil orange order oven owner page paint pair pan paper park part party path patient payment peak pen "
    "people pepper phase phone picture piece pig pipe plane plant plate player pocket point pool port potato pound "
    "power press pressure price print prize profit pump pupil queue race radio rail rain range rank rate ratio "
    "record region rent report rest result rice ring risk river road rock role roof room root rope route row rule "
    "salt sample sand scale school score screw sea season seat second seed sense session shade shape share sheep "
    "sheet shelf ship shirt shoe shop side signal silk silver site size skin sky sleep snow soap sock soil song "
    "soup south space speed spice sponge spoon spring square stage stamp star state station steam steel step stock "
    "stone store storm street stress sugar summer sun table tail tank tax team temper tent term test theory thread "
    "thunder ticket tide time title toe tool tooth top total tower town toy trade train tray tree trip truck tube "
    "turn type unit user valley value van vessel view village visit voice volume vote wage walk wall watch water "
    "wave weight well west wheel width wind window wine wing winter wire wood wool work worker yard year yield zone "
)
QUALIFIERS = _words(
    "abs adj avg base big cold cum daily dry end est ex final first gross high hot in init last late local long low "
    "main max mean mid min net new next no norm old open out own per post pre prev pub raw real rel short start std "
    "sub sum tot true up var wet worst "
)
UNITS = ("cm", "mm", "kg", "g", "m", "km", "s", "h", "usd", "eur", "pct", "%", "deg", "kw", "mg", "in")
ONSETS = _words(
    "b c d f g h j k l m n p r s t v w z b c d f g h l m n p r s t br ch cl dr fl gr kr pl pr qu sh sk sp st th tr "
)
VOWELS = _words("a e i o u a e i o u a e i o u ai ea ee io oo ou y")
CODAS = (*[""] * 25, *_words("b ck d g l m n nd ng nt p r rd rt s st t th x"))
CONSONANTS = "bcdfghjklmnpqrstvwxz"
SPELLINGS = ("lower", "snake", "upper", "camel", "title", "spaced", "code", "dotted", "upper_snake")
MAX_LENGTH = 12


def pseudo_word(rng: Random, syllables: int) -> str:
    """A pronounceable word that means nothing, such as `trelko`."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))


def part(rng: Random) -> str:
    """One lower-case piece of a name: a noun, a pseudo-word, a qualifier or an abbreviation."""
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(NOUNS)
    if draw < 0.65:
        return pseudo_word(rng, rng.choice((1, 2, 2, 2, 3)))
    if draw < 0.75:
        return rng.choice(QUALIFIERS)
    if draw < 0.85:
        return "".join(rng.choice(CONSONANTS) for _ in range(rng.randint(2, 4)))
    noun = rng.choice(NOUNS)
    return noun[: rng.randint(2, 4)]


def spell(parts: list[str], spelling: str, rng: Random) -> str:
    """Join `parts` in one of SPELLINGS."""
    if spelling == "snake":
        return "_".join(parts)
    if spelling == "upper_snake":
        return "_".join(parts).upper()
    if spelling == "upper":
        return "".join(parts).upper()
    if spelling == "camel":
        return parts[0] + "".join(piece.capitalize() for piece in parts[1:])
    if spelling == "title":
        return " ".join(piece.capitalize() for piece in parts)
    if spelling == "spaced":
        return " ".join(parts) + (f" ({rng.choice(UNITS)})" if rng.random() < 0.3 else "")
    if spelling == "dotted":
        return rng.choice((".", "-", "/")).join(parts)
    if spelling == "code":
        if rng.random() < 0.15:
            return str(rng.randint(1000, 2999))
        stem = "".join(rng.choice(CONSONANTS + "aeiouy") for _ in range(rng.randint(1, 4)))
        return rng.choice((stem, stem.upper())) + (str(rng.randint(0, 120)) if rng.random() < 0.7 else "")
    return "".join(parts)


class NameMaker:
    """Draws names that differ from each other and from `avoid`, whatever their letter case.

    Args:
        rng: the source of chance; the same state gives the same names.
        avoid: names that must never come up, for example the headers of the evaluation tables.
    """

    def __init__(self, rng: Random, avoid: Collection[str] = ()) -> None:
        self.rng = rng
        self.taken = {name.lower() for name in avoid}

    def _unique(self, draw: str) -> str:
        name = draw
        while name.lower() in self.taken or not name or len(name) > MAX_LENGTH:
            name = f"{draw[: MAX_LENGTH - 4]}{self.rng.randint(1, 999)}"
        self.taken.add(name.lower())
        return name

    def column(self, spelling: str | None = None, prefix: str = "") -> str:
        """One column name; `prefix` is put before it as a further part."""
        rng = self.rng
        spelling = spelling or rng.choice(SPELLINGS)
        count = 1 if prefix else rng.choice((1, 1, 1, 1, 1, 1, 2, 2))
        parts = ([prefix] if prefix else []) + [part(rng) for _ in range(count)]
        name = spell(parts, spelling, rng)
        if spelling != "code" and rng.random() < 0.1:
            name += rng.choice(("", "_")) + str(rng.randint(1, 99))
        return self._unique(name)

    def columns(self, count: int) -> list[str]:
        """`count` column names as one table has them: often one spelling, sometimes several with the same beginning."""
        rng = self.rng
        spelling = rng.choice(SPELLINGS) if rng.random() < 0.6 else None
        prefix = part(rng) if rng.random() < 0.3 else ""
        return [self.column(spelling, prefix if prefix and rng.random() < 0.6 else "") for _ in range(count)]

    def file(self) -> str:
        """A short name for a .csv file."""
        rng = self.rng
        stem = "_".join(part(rng) for _ in range(rng.choice((1, 1, 2))))
        return self._unique(stem[:9].rstrip("_")) + ".csv"

    def values(self, count: int) -> list[str]:
        """`count` different words for the cells of a text column."""
        rng = self.rng
        spelling = rng.choice(("lower", "lower", "title", "upper", "code", "snake"))
        parts = [[part(rng) for _ in range(rng.choice((1, 1, 2)))] for _ in range(count)]
        return [self._unique(spell(pieces, spelling, rng)) for pieces in parts]
