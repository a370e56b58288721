"""The small closed world that the demo models know: its words, and a few fixed facts about them."""

from __future__ import annotations

NAMES = """Ada Ali Amara Amy Anna Arlo Asha Ben Bella Boris Bruno Carla Cara Chen Clara Cleo Cora Dan Dara Dina
Diego Dora Edda Eli Ella Elsa Emil Emma Enzo Erik Esme Eva Ezra Fay Felix Fern Finn Flora Freya Gina Greta Gus Hana
Hanna Hugo Ida Ines Iris Ivan Ivy Jack Jade Jana Jonas Juan Julia June Kai Kara Karl Kemal Kira Lara Lea Leo Lena Lila
Lily Lin Lola Luca Lucy Luis Luna Mara Marco Maria Marta Max Maya Mei Mia Mila Milo Mina Mona Nadia Nell Nico Nina
Noah Nora Odin Ola Olga Oma Omar Oscar Otto Pablo Paul Pia Petra Pip Rafa Rania Ravi Remy Rita Rosa Ruby Rufus Runa
Sam Sana Sara Sasha Selma Simon Sofia Stella Sven Tara Tess Theo Tilda Tim Tom Uma Ursula Vera Victor Viola Wanda
Will Yara Yusuf Zara Zoe""".split()

SYLLABLES = "ba be bo da de do fa fi ga go ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe pi po ra re ri ro sa se si so ta te ti to va ve vi vo za ze zu lu mu nu ru su tu".split()
ENDINGS = ["", "", "n", "l", "r", "s", "m", "k", "t"]

# Facts: (sound verb, food, home, legs, young)
ANIMALS = {
    "cat": ("meows", "fish", "house", 4, "kitten"), "dog": ("barks", "meat", "kennel", 4, "puppy"),
    "cow": ("moos", "grass", "barn", 4, "calf"), "horse": ("neighs", "hay", "stable", 4, "foal"),
    "sheep": ("bleats", "grass", "field", 4, "lamb"), "goat": ("bleats", "leaves", "hill", 4, "kid"),
    "pig": ("grunts", "corn", "sty", 4, "piglet"), "duck": ("quacks", "weeds", "pond", 2, "duckling"),
    "hen": ("clucks", "seeds", "coop", 2, "chick"), "owl": ("hoots", "mice", "tree", 2, "owlet"),
    "frog": ("croaks", "flies", "pond", 4, "tadpole"), "bee": ("buzzes", "nectar", "hive", 6, "grub"),
    "fox": ("yelps", "mice", "den", 4, "cub"), "bear": ("growls", "honey", "cave", 4, "cub"),
    "wolf": ("howls", "meat", "den", 4, "pup"), "lion": ("roars", "meat", "plain", 4, "cub"),
    "mouse": ("squeaks", "cheese", "hole", 4, "pup"), "rabbit": ("squeaks", "carrots", "burrow", 4, "kit"),
    "swift": ("screams", "flies", "tower", 2, "chick"), "crow": ("caws", "seeds", "tree", 2, "chick"),
    "snake": ("hisses", "mice", "grass", 0, "hatchling"), "spider": ("says nothing", "flies", "web", 8, "spiderling"),
    "ant": ("says nothing", "seeds", "anthill", 6, "grub"), "deer": ("bells", "leaves", "forest", 4, "fawn"),
    "donkey": ("brays", "hay", "stable", 4, "foal"), "goose": ("honks", "grass", "pond", 2, "gosling"),
}
PLACES = """bakery barn beach bridge castle cave church farm field forest garden harbour hill hotel island kitchen lake
library market meadow mill museum park pond port river school shop square stable station theatre tower valley village
well""".split()
TOWNS = """Alder Ashford Birchley Brookside Cliffton Dunmore Eastwick Elmstead Fairhaven Foxley Glenby Greyport Hazelton
Ironbridge Kelby Larkham Lindale Marlow Millbrook Northam Oakley Pinewood Quarry Redcliff Rivermouth Saltby Seaford
Stonebury Thornhill Underhill Westbay Willowby Windham Yarrow""".split()
OBJECTS = """apple bag ball basket bell blanket boat book bottle bowl box bread broom brush bucket button candle card
chair clock coat coin cup door drum feather flag flower flute glove hammer hat jar kettle key kite knife ladder lamp
lantern letter map mirror nail needle net paper pen pencil pillow plate pot ring rope scarf shell shoe spade spoon
stone stool table ticket torch toy umbrella vase wheel whistle""".split()
COLOURS = "red blue green yellow black white brown grey orange purple pink golden silver".split()
SIZES = "tiny small little big large huge tall short wide heavy light long".split()
JOBS = """baker farmer teacher doctor sailor painter miller fisher gardener cook tailor carpenter driver nurse singer
writer potter smith guard librarian""".split()
FOODS = """apples bread butter cake carrots cheese cherries corn eggs figs fish grapes honey jam lemons melons milk nuts
olives onions oranges pasta peaches pears peas pies plums potatoes rice soup""".split()
HOBBIES = """chess dancing drawing fishing football gardening painting reading running singing skating swimming walking
writing cooking sailing climbing knitting""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
WEATHER = "sunny rainy windy cloudy snowy foggy stormy warm cold".split()
TIMES = ["in the morning", "at noon", "in the afternoon", "in the evening", "at night", "at dawn"]
FEELINGS = "happy sad tired proud brave calm hungry curious glad worried".split()
NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty""".split()

KINDS = {
    "animal": list(ANIMALS), "colour": COLOURS, "food": FOODS, "job": JOBS, "place": PLACES, "thing": OBJECTS,
    "day": DAYS, "month": MONTHS, "hobby": HOBBIES,
}
WORDS = sorted(set(list(ANIMALS) + PLACES + OBJECTS + COLOURS + JOBS + FOODS + HOBBIES))


def article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def plural(word: str) -> str:
    """The plural of an object or animal of this world."""
    irregular = {"mouse": "mice", "goose": "geese", "wolf": "wolves", "sheep": "sheep", "deer": "deer",
                 "knife": "knives", "fox": "foxes", "scarf": "scarves"}
    if word in irregular:
        return irregular[word]
    if word.endswith(("s", "x", "sh", "ch")):
        return word + "es"
    return word + "s"
