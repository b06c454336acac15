"""Words that facts are made of, and templates that are filled with them."""
import string

ADJECTIVES = """able amber ancient brave brief bright broad calm careful civil clean clever cold cool
crisp curious dark deep dry dusty early eager fair faint famous fancy fast fierce final firm flat
fresh gentle giant glad golden grand green grey happy hardy heavy hidden hollow honest humble icy
idle jolly keen kind large lazy light lively lonely long loud lucky mellow merry mild misty modest
narrow neat noble odd old pale patient plain polite proud pure quick quiet rapid rare ready rich
ripe rough round royal rusty sacred sharp shiny short silent silver simple sleepy slow small smooth
soft solid spare steady steep stern strange strong subtle sunny sweet swift tall tame tender thick
thin tidy tiny tough true vast warm weary wet white wide wild wise witty wooden young""".split()
NOUNS = """acorn anchor apple arrow badge banner barn basket beacon bell bench bird blanket boat
bottle branch bridge brook broom bucket button cabin camel candle canyon carpet castle cedar chain
chair cherry church circle cliff clock cloud coast coin comet compass copper corner cottage cotton
crane creek crown crystal desert diamond door dragon drum eagle engine falcon farm feather fence
fiddle field flame flower forest fountain fox garden gate ginger glacier glove goat grove hammer
harbor hazel hedge heron hill honey horse island ivory jacket jewel kettle kitten ladder lake
lantern leaf lemon library lily lion lock mango maple market marsh meadow mirror mitten monkey moon
mountain needle nest oak ocean olive orchard otter owl paddle palace panther paper parrot path
pearl pebble pencil pepper pigeon pillow pine planet plum pocket pond puzzle rabbit raven ribbon
river rocket rose saddle sail school shadow shell ship silk sparrow spoon spring squirrel star
stone storm stream summer table temple thistle tiger timber tower train tulip turtle valley velvet
violin wagon walnut water whale wheat wheel willow window winter wolf""".split()
FIRST = """Ada Adam Agnes Albert Alice Amos Anna Arthur Beatrice Ben Bertha Boris Carl Carmen Clara
Cora Daniel David Dora Edgar Edith Edwin Elena Ella Emma Ernest Esther Eva Felix Flora Frank Fred
George Gloria Grace Greta Hannah Harold Harry Hector Helen Henry Hilda Hugo Ida Ingrid Irene Isaac
Ivan Jack Jacob James Jane Jasper Joan John Joseph Julia Karl Kate Laura Lena Leo Lewis Lily Louis
Lucy Luke Mabel Marco Maria Mark Martha Mary Max Mona Nadia Nathan Nellie Nina Noah Nora Olga Oliver
Oscar Otto Paul Paula Peter Ralph Rita Robert Rosa Ruth Sally Sam Sarah Simon Sofia Stella Susan
Theo Thomas Tilda Tom Ursula Vera Victor Viola Walter Wanda Will Winnie Zoe""".split()
LAST = """Abbott Adams Allen Archer Baker Barnes Bell Bishop Black Brook Brown Burke Carter Clark
Cole Cook Cooper Cross Dale Davis Dean Drake Ellis Evans Field Fisher Flynn Ford Foster Fox Gibson
Grant Gray Green Hale Hall Hart Hayes Hill Holt Hunt Irving Jones Kelly Kent King Knight Lane Lee
Long Marsh Mason Miller Moore Moss Nash Noble Norris Page Park Perry Porter Price Quinn Reed Rice
Rogers Rose Ross Shaw Short Stone Swift Tate Taylor Turner Vance Wade Walker Ward Webb Wells West
White Wolf Wood York Young""".split()
RELATIONS = "sister brother aunt uncle cousin friend neighbour teacher doctor boss".split()
THINGS = """key ring letter map photograph passport will diary ticket watch necklace contract recipe
umbrella notebook coat chequebook medal lamp violin""".split()
COLOURS = "blue red green yellow black white brown silver golden purple orange grey".split()
PLACES = """drawer locker box shelf cabinet room safe crate cupboard envelope""".split()
TOWNS = """Oslo Lisbon Cairo Dublin Geneva Havana Kyoto Lima Madrid Naples Paris Prague Quebec Rome
Sydney Tunis Turin Vienna Warsaw Zurich Bergen Bruges Cork Delft Exeter Ghent Leeds Lyon Malta
Munich Nice Oxford Porto Riga Seville Sofia Tampa Utrecht Venice York""".split()
ANIMALS = "dog cat horse parrot tortoise rabbit goat hamster canary pony".split()
ATTRIBUTES = """code number name password price address colour owner date age weight place title
secret pin room birthday combination size score rank length nickname licence balance flavour motto
token capital origin level deadline target score height width volume temperature amount total
rent salary fine debt reward passphrase username callsign channel frequency""".split()
MONTHS = """January February March April May June July August September October November
December""".split()
VERBS = """bought/buy sold/sell lost/lose found/find left/leave hid/hide painted/paint repaired/repair
borrowed/borrow broke/break buried/bury carved/carve cleaned/clean collected/collect copied/copy
delivered/deliver drew/draw dropped/drop forgot/forget kept/keep lent/lend mailed/mail made/make met/meet
opened/open ordered/order packed/pack photographed/photograph picked/pick planted/plant stole/steal
saw/see sent/send stored/store took/take threw/throw washed/wash wore/wear won/win wrote/write
built/build chose/choose caught/catch fed/feed rented/rent parked/park ate/eat cooked/cook read/read
heard/hear invited/invite visited/visit taught/teach called/call helped/help""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COMPANIES = """bakery bank library museum post-office school hospital mill brewery theatre shipyard
printer's tannery ministry embassy observatory railway newspaper laundry foundry""".split()
DISHES = """pancakes risotto goulash dumplings trout omelette porridge curry lentils trifle ravioli
stew pie kippers waffles paella borscht marmalade gingerbread custard""".split()
JOBS = """carpenter nurse baker lawyer sailor tailor painter farmer gardener pilot clerk dentist
surveyor miller cooper weaver jeweller locksmith beekeeper organist translator""".split()
GAMES = "chess tennis cricket whist billiards draughts golf bowls badminton dominoes".split()
TOOLS = """violin cello flute trumpet harp oboe organ drum guitar mandolin piano bassoon""".split()
SYLLABLES = """ba be bo bri ca cor da del dor el fa fen gal gar ha hel il jo ka kel la lin lor ma mer mi
mor na nel no or pa per qui ra ren ro sa sel so ta tal ter tor u va ven vi wen yo zan""".split()


def number(rng, digits=7):
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def invented(rng):
    """A name that is in no list."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()


def listed(words, share=0.15):
    """Draws from a list, or now and then a name in no list."""
    return lambda rng: invented(rng) if rng.random() < share else rng.choice(words)


first, last, town = listed(FIRST), listed(LAST), listed(TOWNS)


def pair(rng):
    """RULER's keys and words."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def alike(rng, count):
    """Draws keys like RULER's of so few words that most of `count` keys share one with another."""
    few = max(3, int(count**0.5))
    heads, tails = rng.sample(ADJECTIVES, min(few, len(ADJECTIVES))), rng.sample(NOUNS, 2 * few)
    return lambda rng: f"{rng.choice(heads)}-{rng.choice(tails)}"


def unheard(rng):
    """A key like RULER's, of words in no list."""
    return f"{invented(rng)}-{invented(rng)}".lower()


def person(rng):
    return f"{first(rng)} {last(rng)}"


def relative(rng):
    return f"my {rng.choice(RELATIONS)}"


def object_(rng):
    """Something that one can own, named so that it is told apart."""
    return rng.choice(
        [
            f"the {rng.choice(COLOURS)} {rng.choice(NOUNS)}",
            f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
            f"the {rng.choice(COLOURS)} {rng.choice(THINGS)}",
            f"the {rng.choice(THINGS)} of {first(rng)}",
            f"{first(rng)}'s {rng.choice(THINGS)}",
            f"the {rng.choice(NOUNS)}",
        ]
    )


def date(rng):
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"


SLOTS = {
    "first": first,
    "last": last,
    "name": person,
    "who": lambda rng: rng.choice([first, first, person, relative])(rng),
    "town": town,
    "relation": lambda rng: rng.choice(RELATIONS),
    "thing": lambda rng: rng.choice(THINGS),
    "noun": lambda rng: rng.choice(NOUNS),
    "adjective": lambda rng: rng.choice(ADJECTIVES),
    "object": object_,
    "colour": lambda rng: rng.choice(COLOURS),
    "animal": lambda rng: rng.choice(ANIMALS),
    "place": lambda rng: f"{rng.choice(PLACES)} {rng.randrange(10, 100)}",
    "n": lambda rng: str(rng.randrange(10, 1000)),
    "few": lambda rng: str(rng.randrange(2, 40)),
    "value": number,
    "big": lambda rng: number(rng, rng.randint(3, 8)),
    "code": lambda rng: f"{rng.choice(string.ascii_uppercase)}{rng.randrange(1, 100)}-"
    f"{rng.randrange(100)}{rng.choice(string.ascii_uppercase)}",
    "time": lambda rng: f"{rng.randint(0, 23)}:{rng.randint(10, 59)}",
    "day": lambda rng: rng.choice(DAYS),
    "date": date,
    "month": lambda rng: rng.choice(MONTHS),
    "year": lambda rng: str(rng.randint(1700, 2030)),
    "coin": lambda rng: rng.choice("pounds dollars crowns guineas".split()),
    "company": lambda rng: rng.choice(COMPANIES),
    "dish": lambda rng: rng.choice(DISHES),
    "job": lambda rng: rng.choice(JOBS),
    "game": lambda rng: rng.choice(GAMES),
    "tool": lambda rng: rng.choice(TOOLS),
    "made": invented,
    "word": lambda rng: rng.choice([rng.choice(NOUNS), rng.choice(ADJECTIVES), invented(rng)]),
}


class Slots(dict):
    """Fills `{first}`, `{town}`, `{first2}`: a slot is drawn where it is met first and stays; a
    digit behind its name makes another draw of the same kind. Capitalised (`{Who}`): so it is."""

    def __init__(self, rng):
        super().__init__()
        self.rng = rng

    def __missing__(self, slot):
        if slot[0].isupper():
            text = self[slot[0].lower() + slot[1:]]
            return text[0].upper() + text[1:]
        value = SLOTS[slot.rstrip("0123456789")](self.rng)
        # Two people of one name, or two towns, would make a question of two answers.
        while value in self.values():
            value = SLOTS[slot.rstrip("0123456789")](self.rng)
        self[slot] = value
        return value
