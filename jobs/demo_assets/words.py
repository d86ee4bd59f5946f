"""Word pools that every family draws from: common English words, sorted into categories, pairs and names."""

CATEGORIES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "fruit": "apple lemon pear grape plum mango cherry banana melon fig peach orange berry kiwi lime olive",
        "animal": "dog cat horse tiger rabbit goat lion sheep wolf bear monkey camel zebra mouse deer fox",
        "bird": "eagle owl crow duck swan robin parrot goose hawk dove gull stork raven wren turkey finch",
        "color": "red blue green yellow purple brown black white pink gray violet crimson maroon scarlet indigo beige",
        "tool": "hammer saw drill wrench knife axe shovel rake chisel file ladder brush spade pliers hoe clamp",
        "vehicle": "car truck bus train boat plane bicycle tram van ship taxi rocket wagon canoe tractor ferry",
        "drink": "water milk tea coffee juice soda wine beer cocoa cider lemonade broth punch ale tonic syrup",
        "sport": "tennis soccer golf hockey rugby boxing chess judo rowing skiing surfing cricket archery polo diving fencing",
        "job": "doctor teacher farmer baker pilot nurse lawyer painter sailor judge miner tailor clerk chef plumber guard",
        "furniture": "table chair sofa bed desk shelf stool bench lamp couch cabinet dresser wardrobe mirror cradle rug",
        "metal": "iron copper tin zinc lead nickel steel bronze brass chrome cobalt mercury titanium platinum tungsten aluminum",
        "cloth": "shirt coat hat sock shoe glove scarf dress skirt belt boot jacket vest sweater cap tie",
        "body": "hand foot eye ear nose arm leg knee neck finger toe elbow chin tongue heart shoulder",
        "plant": "oak pine rose tulip daisy fern moss ivy maple willow cactus lily bamboo birch cedar clover",
        "music": "drum flute piano guitar violin harp trumpet horn cello banjo organ whistle bell tuba oboe bugle",
        "weather": "rain snow wind storm fog hail thunder sleet frost cloud sunshine mist breeze drizzle blizzard lightning",
    }.items()
}

PAIRS: tuple[tuple[str, str], ...] = tuple(
    (left, right)
    for left, right in (
        pair.split("-")
        for pair in (
            "hot-cold big-small tall-short fast-slow old-young rich-poor hard-soft wet-dry full-empty light-dark "
            "high-low near-far early-late open-closed clean-dirty happy-sad strong-weak thick-thin wide-narrow "
            "loud-quiet sweet-sour smooth-rough sharp-dull deep-shallow brave-afraid kind-cruel safe-dangerous "
            "cheap-costly true-false right-wrong alive-dead asleep-awake first-last top-bottom "
            "inside-outside up-down front-back day-night summer-winter north-south east-west "
            "begin-end give-take buy-sell push-pull win-lose love-hate laugh-cry remember-forget arrive-leave "
            "rise-fall float-sink build-destroy enter-exit accept-refuse lend-borrow attack-defend freeze-melt "
            "war-peace friend-enemy question-answer success-failure past-future heaven-hell "
            "always-never many-few more-less everything-nothing above-below before-after with-without "
            "polite-rude lazy-busy simple-complex ancient-modern public-private guilty-innocent "
            "visible-hidden raw-cooked tight-loose straight-curved proud-humble wild-tame"
        ).split()
    )
)

GIRLS: tuple[str, ...] = tuple(
    "Ann Sue Mary Emma Lucy Kate Rosa Nina Julia Clara Ruth Alice Eva Grace Helen Ida Lena Olga Paula Tina".split()
)
BOYS: tuple[str, ...] = tuple(
    "Tom Bob John Paul Max Leo Adam Peter Carl Hugo Ivan Jack Luke Mark Nick Oscar Ralph Sam Victor Will".split()
)
NAMES: tuple[str, ...] = GIRLS + BOYS
OBJECTS: tuple[str, ...] = tuple(
    "ball key book cup pen coin ring doll map box kite rope candle spoon letter ticket stone basket phone bottle "
    "bag clock plate button wallet camera pencil blanket umbrella needle".split()
)
PLACES: tuple[str, ...] = tuple(
    "garden kitchen park school market office station library forest beach garage cellar church museum hotel farm "
    "hospital bakery stable theater".split()
)
MOODS: tuple[str, ...] = tuple("tired hungry angry late ill thirsty bored glad lost ready nervous calm".split())
MEETINGS: tuple[str, ...] = tuple("met saw called helped followed visited thanked greeted".split())
ORDINALS: tuple[str, ...] = ("first", "second", "third", "fourth", "fifth")
# adjective, the question word for the greatest, and for the least
COMPARISONS: tuple[tuple[str, str, str], ...] = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
    ("stronger", "strongest", "weakest"),
)

CATEGORY_OF: dict[str, str] = {word: name for name, words in CATEGORIES.items() for word in words}
ALL_WORDS: tuple[str, ...] = tuple(CATEGORY_OF)


def article(word: str) -> str:
    """The word with its indefinite article: `an apple`, `a pear`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
