"""The words of the mini world's attributes; a scene stores positions in these lists."""

__all__ = [
    "BRIGHTNESS",
    "COLORS",
    "ENVELOPES",
    "INSTRUMENTS",
    "LARGER",
    "LETTERS",
    "MELODIES",
    "MOTIONS",
    "NOISES",
    "NUMBERS",
    "PITCHES",
    "PLACES",
    "PLURALS",
    "PROPORTIONS",
    "RHYTHMS",
    "SHAPES",
    "SIZES",
    "SOLIDS",
    "SPEEDS",
    "SURFACES",
    "SYNONYMS",
    "TEXTURES",
    "TILTS",
]

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
BRIGHTNESS = ("dark", "gray", "light")
NUMBERS = ("zero", "one", "two", "three", "four")

MOTIONS = ("left", "right", "up", "down", "still", "grow", "shrink", "turn")
"""The first four are directions; "turn" is a change of colour."""
SPEEDS = ("slowly", "quickly")

INSTRUMENTS = ("flute", "organ", "guitar", "bell", "violin", "drum")
PITCHES = ("low", "medium", "high")
ENVELOPES = ("steady", "louder", "quieter")
RHYTHMS = ("even", "faster", "slower")
NOISES = ("silence", "rain", "humming", "clicks")

SOLIDS = ("sphere", "cube", "cylinder", "cone", "torus", "pyramid")
PROPORTIONS = ("regular", "tall", "flat")
SURFACES = ("smooth", "rough")

PLACES = ("top left", "top right", "bottom left", "bottom right", "center")
"""Second visit: where a thing sits in the image."""
MELODIES = ("level", "rising", "falling")
"""Second visit: how the pitch moves from note to note."""
TILTS = ("upright", "leaning", "lying")
"""Second visit: how a single solid stands."""
LARGER = ("first", "second", "equal")
"""Second visit: which of two solids is larger."""

LETTERS = ("A", "B", "C", "D")

SYNONYMS = {
    "large": ("large", "big"),
    "small": ("small", "tiny"),
    "quickly": ("quickly", "fast"),
    "slowly": ("slowly", "gently"),
}
"""Words that captions exchange freely and a second annotator may prefer."""
