"""The tasks the model is trained and judged on: text with facts in it, and questions.

Everything is text and plain Python, so that the evaluation through the daemon's API can use it
without torch. A `Case` is a set of needles (sentences to hide) with their questions; a haystack is
book text. Generators take a random.Random, so a printed seed reproduces every case.
"""
import random
import string
import uuid

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


class Needle:
    """`text` to hide in a haystack; `questions`: [(question text, answer text)]; `key`: what it is
    about, so that no haystack holds two answers to one question."""

    def __init__(self, kind, text, questions, key):
        self.kind, self.text, self.questions, self.key = kind, text, questions, key


def number(rng, digits=7):
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def ruler_key(rng):
    return rng.choice(ADJECTIVES) + "-" + rng.choice(NOUNS)


ACKNOWLEDGED = "I will remember that."


def plain_question(question):
    return f"\nQuestion: {question}\nAnswer:"


def chat_question(question):
    return f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def fragments(rng, count):
    """A run of text that no language model could guess."""
    out = ""
    for _ in range(count):
        out += rng.choice(["", " "]) + "".join(
            rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 4))
        )
    return out.strip()


def passkey(rng):
    value = number(rng) if rng.random() < 0.7 else fragments(rng, 10)
    return Needle(
        "passkey",
        f"\n|The passkey is: {value}|",
        [("\n|What is the passkey? The passkey is", f" {value}|")],
        "passkey",
    )


def niah_value(rng, kind):
    if kind == "numbers":
        return number(rng)
    if kind == "words":
        return ruler_key(rng)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def niah(rng, kind=None, key=None):
    kind = kind or rng.choices(["numbers", "words", "uuids"], [6, 2, 2])[0]
    key, value, one = key or ruler_key(rng), niah_value(rng, kind), kind[:-1]
    question = (
        f"\nWhat is the special magic {one} for {key} mentioned in the provided text? The "
        f"special magic {one} for {key} mentioned in the provided text is"
    )
    return Needle(
        "niah_" + kind,
        f" One of the special magic {kind} for {key} is: {value}.",
        [(question, f" {value}.")],
        key,
    )


def niah_intro(kind, single=True):
    one = kind[:-1]
    if single:
        return (
            f"A special magic {one} is hidden within the following text. Make sure to memorize "
            f"it. I will quiz you about the {one} afterwards.\n"
        )
    return (
        f"Some special magic {kind} are hidden within the following text. Make sure to memorize "
        f"them. I will quiz you about the {kind} afterwards.\n"
    )


NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back " "again. "
)


def phone(rng, name=None):
    name = name or f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    value = f"{number(rng, 3)}-{number(rng, 3)}-{number(rng, 4)}"
    return Needle("phone", f"\n{name}: {value}", [(f"\n{name}:", f" {value}\n")], name)


def _places(rng):
    return f"{rng.choice(PLACES)} {rng.randrange(10, 100)}"


# (sentence, question, another wording, answer): the first twenty are trained on; the last five are
# held out, to see whether the skill carries over to forms never seen.
def fact_forms(rng):
    first, other = rng.sample(FIRST, 2)
    relation, thing, colour = rng.choice(RELATIONS), rng.choice(THINGS), rng.choice(COLOURS)
    place, town, value = _places(rng), rng.choice(TOWNS), number(rng)
    small, animal, last = str(rng.randrange(10, 1000)), rng.choice(ANIMALS), rng.choice(LAST)
    return [
        (
            f"My {relation} {first} keeps the {colour} {thing} in {place}.",
            f"Where does my {relation} {first} keep the {colour} {thing}?",
            f"In which place is the {colour} {thing} of {first}?",
            f"In {place}.",
        ),
        (
            f"The secret code of {first}'s locker is {value}.",
            f"What is the secret code of {first}'s locker?",
            f"Which code opens the locker of {first}?",
            f"{value}.",
        ),
        (
            f"{first}'s phone number is {value}.",
            f"What is {first}'s phone number?",
            f"Which number do I call to reach {first}?",
            f"{value}.",
        ),
        (
            f"The password for the {colour} {thing} is {value}.",
            f"What is the password for the {colour} {thing}?",
            f"Tell me the password of the {colour} {thing}.",
            f"{value}.",
        ),
        (
            f"I parked the car at level {small}, {colour} zone.",
            "Where did I park the car?",
            "At which level and zone is my car?",
            f"At level {small}, {colour} zone.",
        ),
        (
            f"{first} was born in {town}.",
            f"Where was {first} born?",
            f"In which town was {first} born?",
            f"In {town}.",
        ),
        (
            f"{first} lives at {small} {last} Street in {town}.",
            f"Where does {first} live?",
            f"What is the address of {first}?",
            f"At {small} {last} Street in {town}.",
        ),
        (
            f"My {animal} is called {first}.",
            f"What is my {animal} called?",
            f"What is the name of my {animal}?",
            f"{first}.",
        ),
        (
            f"The train to {town} leaves from platform {small}.",
            f"From which platform does the train to {town} leave?",
            f"Where do I board the train to {town}?",
            f"From platform {small}.",
        ),
        (
            f"{first} owes {other} {small} pounds.",
            f"How much does {first} owe {other}?",
            f"How many pounds must {first} pay {other}?",
            f"{small} pounds.",
        ),
        (
            f"The favourite colour of {first} is {colour}.",
            f"What is the favourite colour of {first}?",
            f"Which colour does {first} like best?",
            f"{colour}.",
        ),
        (
            f"The meeting with {first} {last} takes place in room {small}.",
            f"In which room is the meeting with {first} {last}?",
            f"Where do I meet {first} {last}?",
            f"In room {small}.",
        ),
        (
            f"The combination of the {colour} safe is {value}.",
            f"What is the combination of the {colour} safe?",
            f"How do I open the {colour} safe?",
            f"{value}.",
        ),
        (
            f"Remember that {first}'s flight number is {value}.",
            f"What is {first}'s flight number?",
            f"Which flight does {first} take?",
            f"{value}.",
        ),
        (
            f"{first} married {other} {last}.",
            f"Whom did {first} marry?",
            f"Who is married to {first}?",
            f"{other} {last}.",
        ),
        (
            f"The {thing} belongs to {first} {last}.",
            f"To whom does the {thing} belong?",
            f"Who owns the {thing}?",
            f"{first} {last}.",
        ),
        (f"{first} hid the {thing} under the {colour} {rng.choice(NOUNS)}.", None, None, None),
        (
            f"The order number of the {thing} is {value}.",
            f"What is the order number of the {thing}?",
            f"Under which number was the {thing} ordered?",
            f"{value}.",
        ),
        (
            f"{first} works as a guide in {town}.",
            f"In which town does {first} work?",
            f"Where does {first} work?",
            f"In {town}.",
        ),
        (
            f"My {relation}'s name is {first} {last}.",
            f"What is my {relation}'s name?",
            f"Who is my {relation}?",
            f"{first} {last}.",
        ),
        # Held out.
        (
            f"You can reach {first} under extension {small}.",
            f"What is {first}'s extension?",
            f"Which extension reaches {first}?",
            f"{small}.",
        ),
        (
            f"The {colour} {thing} was bought in {town}.",
            f"Where was the {colour} {thing} bought?",
            f"In which town did we buy the {colour} {thing}?",
            f"In {town}.",
        ),
        (
            f"{first} moved to {town} last year.",
            f"Where did {first} move?",
            f"To which town did {first} move?",
            f"To {town}.",
        ),
        (
            f"The serial number of the {thing} is {value}.",
            f"What is the serial number of the {thing}?",
            f"Which serial number does the {thing} have?",
            f"{value}.",
        ),
        (
            f"The guest in room {small} is {first} {last}.",
            f"Who is the guest in room {small}?",
            f"Who stays in room {small}?",
            f"{first} {last}.",
        ),
    ]


TRAINED_FORMS = 20


def fact(rng, held_out=False):
    while True:
        forms = fact_forms(rng)
        sentence, question, other, answer = rng.choice(
            forms[TRAINED_FORMS:] if held_out else forms[:TRAINED_FORMS]
        )
        if question is None:  # the object needs drawing once for both halves
            first, thing, noun = rng.choice(FIRST), rng.choice(THINGS), rng.choice(NOUNS)
            colour = rng.choice(COLOURS)
            sentence = f"{first} hid the {thing} under the {colour} {noun}."
            question, other = (
                f"Where did {first} hide the {thing}?",
                f"Under what is the {thing} of {first}?",
            )
            answer = f"Under the {colour} {noun}."
        wording = question if rng.random() < 0.5 else other
        if rng.random() < 0.5:
            asked = (plain_question(wording), " " + answer)
        else:
            asked = (chat_question(wording), answer + "<|im_end|>")
        return Needle("fact", rng.choice([" ", "\n"]) + sentence, [asked], question)


ATTRIBUTES = """code number name password price address colour owner date age weight place title
secret pin room birthday combination size score rank length nickname licence balance flavour motto
token capital origin level deadline target score height width volume temperature amount total
rent salary fine debt reward passphrase username callsign channel frequency""".split()
MONTHS = """January February March April May June July August September October November
December""".split()


def _value(rng):
    kind = rng.randrange(12)
    if kind < 4:
        return number(rng, rng.choice([1, 2, 3, 4, 4, 5, 6, 7, 8]))
    return [
        ruler_key(rng),
        rng.choice(NOUNS),
        f"{rng.choice(FIRST)} {rng.choice(LAST)}",
        rng.choice(TOWNS),
        f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1700, 2030)}",
        f"{rng.choice(string.ascii_uppercase)}{rng.randrange(1, 100)}-"
        f"{rng.randrange(100)}{rng.choice(string.ascii_uppercase)}",
        f"{rng.randint(0, 23)}:{rng.randint(10, 59)}",
        f"the {rng.choice(ADJECTIVES)} one",
    ][kind - 4]


def _subject(rng):
    first, noun, adjective = rng.choice(FIRST), rng.choice(NOUNS), rng.choice(ADJECTIVES)
    return rng.choice(
        [
            f"the {adjective} {noun}",
            f"the {rng.choice(THINGS)} of {first}",
            f"{first}'s {noun}",
            f"{first}'s {adjective} {rng.choice(THINGS)}",
            f"the {noun} in {rng.choice(TOWNS)}",
            f"the {noun} near the {rng.choice(NOUNS)}",
            f"my {rng.choice(RELATIONS)}'s {noun}",
            f"project {noun.capitalize()}",
            f"{first} {rng.choice(LAST)}",
            f"my {adjective} {noun}",
            f"the {rng.choice(COLOURS)} {noun}",
            f"the {adjective} {noun} club",
        ]
    )


def statement(rng):
    """A fact of no fixed form: the user's own facts are of none either."""
    subject, attribute, value = _subject(rng), rng.choice(ATTRIBUTES), _value(rng)
    if rng.random() < 0.2:
        attribute = f"{rng.choice(ADJECTIVES)} {attribute}"
    of = f"the {attribute} of {subject}"
    whose = f"{subject}'s {attribute}" if rng.random() < 0.5 else of
    if rng.random() < 0.25:
        whose = of = rng.choice([f"the {attribute} for {subject}", f"the {attribute} to {subject}"])
    told = rng.choice(
        [
            f"{of[0].upper()}{of[1:]} is {value}.",
            f"{whose[0].upper()}{whose[1:]} is {value}.",
            f"Remember that {of} is {value}.",
            f"Please note: {whose} is {value}.",
            f"I changed {of} to {value}.",
            f"They say that {whose} is {value}.",
            f"By the way, {whose} is {value}.",
            f"From today on {of} is {value}.",
            f"{of[0].upper()}{of[1:]} was set to {value}.",
            f"{of[0].upper()}{of[1:]}: {value}.",
        ]
    )
    question = rng.choice(
        [
            f"What is {of}?",
            f"What is {whose}?",
            f"What was {of}?",
            f"Tell me {of}.",
            f"Do you remember {whose}?",
            f"What did I say about {of}?",
            f"Which is {of}?",
        ]
    )
    form = plain_question if rng.random() < 0.6 else chat_question
    end = "<|im_end|>" if form is chat_question else ""
    lead = " " if form is plain_question else ""
    return Needle(
        "statement",
        rng.choice([" ", "\n"]) + told,
        [(form(question), f"{lead}{value}.{end}")],
        f"{attribute} {subject}",
    )


VERBS = """bought/buy sold/sell lost/lose found/find left/leave hid/hide painted/paint repaired/repair
borrowed/borrow broke/break buried/bury carved/carve cleaned/clean collected/collect copied/copy
delivered/deliver drew/draw dropped/drop forgot/forget kept/keep lent/lend mailed/mail made/make met/meet
opened/open ordered/order packed/pack photographed/photograph picked/pick planted/plant stole/steal
saw/see sent/send stored/store took/take threw/throw washed/wash wore/wear won/win wrote/write
built/build chose/choose caught/catch fed/feed rented/rent parked/park ate/eat cooked/cook read/read
heard/hear invited/invite visited/visit taught/teach called/call helped/help""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def event(rng):
    """Somebody did something somewhere: any part of it may be asked for."""
    done, do = rng.choice(VERBS).split("/")
    who = rng.choice(
        [
            rng.choice(FIRST),
            f"{rng.choice(FIRST)} {rng.choice(LAST)}",
            f"my {rng.choice(RELATIONS)}",
            f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
        ]
    )
    what = rng.choice(
        [
            f"the {rng.choice(COLOURS)} {rng.choice(NOUNS)}",
            f"a {rng.choice(THINGS)}",
            f"the {rng.choice(ADJECTIVES)} {rng.choice(THINGS)}",
            f"{rng.randint(2, 99)} {rng.choice(NOUNS)}s",
            f"her {rng.choice(THINGS)}",
        ]
    )
    where = rng.choice(
        [
            f"in {rng.choice(TOWNS)}",
            f"in {_places(rng)}",
            f"at {rng.choice(FIRST)}'s house",
            f"under the {rng.choice(NOUNS)}",
            f"near the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
            f"behind the {rng.choice(NOUNS)}",
            f"at {rng.randint(1, 999)} {rng.choice(LAST)} Street",
        ]
    )
    when = rng.choice(
        [
            f"on {rng.choice(DAYS)}",
            f"in {rng.choice(MONTHS)}",
            f"at {rng.randint(1, 12)} o'clock",
            f"on {rng.randint(1, 28)} {rng.choice(MONTHS)}",
            f"in {rng.randint(1700, 2030)}",
        ]
    )
    price = f"for {rng.randint(2, 999)} {rng.choice(['pounds', 'dollars', 'crowns', 'guineas'])}"
    parts, asked = f"{who} {done} {what}", [
        (f"Who {done} {what}?", who),
        (f"What did {who} {do}?", what),
    ]
    if rng.random() < 0.7:
        parts += " " + where
        asked += [
            (f"Where did {who} {do} {what}?", where),
            (f"In which place did {who} {do} {what}?", where),
        ]
    if rng.random() < 0.4:
        parts += " " + when
        asked.append((f"When did {who} {do} {what}?", when))
    if rng.random() < 0.25:
        parts += " " + price
        asked.append((f"For how much did {who} {do} {what}?", price))
    question, answer = rng.choice(asked)
    answer = f"{answer[0].upper()}{answer[1:]}."
    told = f"{parts[0].upper()}{parts[1:]}."
    form = (
        (plain_question(question), " " + answer)
        if rng.random() < 0.6
        else (chat_question(question), answer + "<|im_end|>")
    )
    return Needle("event", rng.choice([" ", "\n"]) + told, [form], f"{who} {done} {what}")


def pair(rng, taken, letters, digits):
    """The dense curriculum's atom: a short key and a few digits."""
    while True:
        key = "".join(rng.choice(string.ascii_letters) for _ in range(letters))
        if key not in taken:
            taken.add(key)
            break
    value = "".join(rng.choice(string.digits) for _ in range(digits))
    return Needle("pair", f" {key}{value}", [(f" {key}", value)], key)


KINDS = {
    "passkey": passkey,
    "niah": niah,
    "fact": fact,
    "statement": statement,
    "event": event,
    "phone": phone,
}


def mixed(rng, mix):
    """One needle; `mix` says how often which of KINDS."""
    return KINDS[rng.choices(list(mix), list(mix.values()))[0]](rng)


def distinct(needles):
    """The first needle of each key."""
    return list({needle.key: needle for needle in reversed(needles)}.values())
