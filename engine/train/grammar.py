"""Facts whose parts are drawn apart: who or what, what is said of it, in which words it is told and in
which asked. No sentence form is common, so the skill must not lean on one.

The forms that facts.py holds out, and their words (moved to, bought in, serial number, extension, the
guest in a room), are not among these.
"""
import facts
import words
from needle import Needle

TRAVELS = """travelled/travel drove/drive sailed/sail flew/fly went/go returned/return walked/walk
emigrated/emigrate hurried/hurry cycled/cycle wandered/wander hastened/hasten escaped/escape fled/flee
ran/run rode/ride came/come retired/retire migrated/migrate withdrew/withdraw""".split()
COMINGS = """returned/return came/come fled/flee arrived/arrive sailed/sail escaped/escape wrote/write
flew/fly telephoned/telephone started/start""".split()
TAILS = """yesterday|last month|last week|last spring|in the autumn|in May|two years ago|with the children|by
train|for good|after the war|on Monday|in a hurry|last night|this year|long ago|without a word|for a
year""".replace("\n", " ").split("|")
DONE = """found/find/found made/make/made sold/sell/sold repaired/repair/repaired seen/see/saw
stolen/steal/stole painted/paint/painted lost/lose/lost hidden/hide/hid ordered/order/ordered
buried/bury/buried built/build/built delivered/deliver/delivered kept/keep/kept restored/restore/restored
photographed/photograph/photographed dropped/drop/dropped rented/rent/rented borrowed/borrow/borrowed
packed/pack/packed described/describe/described cleaned/clean/cleaned weighed/weigh/weighed
forgotten/forget/forgot shown/show/showed""".split()
NUMBERS = """invoice account model policy case customer registration ticket membership patent chassis
reference batch lot catalogue permit file passport bank tax insurance inventory parcel version stock
contract delivery claim docket article""".split()
CHANNELS = """call/on/line|find/in/office|meet/at/gate|write to/at/box|see/in/booth|visit/in/ward|
ring/on/number|join/at/table|find/on/deck|hear/on/channel|meet/on/platform|see/in/studio|
talk to/on/frequency|fetch/at/door|find/at/desk|message/on/line|meet/at/pier|find/in/tent"""
CHANNELS = CHANNELS.replace("\n", "").split("|")
OCCUPANTS = """patient/bed/lies prisoner/cell/sits tenant/flat/lives passenger/seat/sits student/desk/works
clerk/office/works sailor/cabin/sleeps speaker/hall/speaks teacher/class/teaches traveller/compartment/sits
guard/tower/waits painter/studio/works lodger/house/lives witness/box/waits doctor/ward/works
driver/car/sits camper/tent/sleeps visitor/hall/waits inmate/block/lives merchant/stall/sells""".split()
LIKES = """prefers/prefer collects/collect studies/study admires/admire fears/fear hates/hate enjoys/enjoy
sells/sell repairs/repair breeds/breed grows/grow needs/need wants/want loves/love paints/paint
misses/miss understands/understand carries/carry""".split()
ROLES = """dentist lawyer landlord tutor rival partner captain secretary heir guardian employer coach
godmother bride tailor driver agent editor banker nurse assistant manager""".split()
OCCASIONS = """concert lecture wedding dinner auction exam rehearsal parade trial picnic interview
festival debate ceremony inspection match premiere feast ball hearing voyage""".split()
SIZES = """inches/long/length feet/deep/depth yards/wide/width ounces/heavy/weight years/old/age
miles/long/length inches/thick/thickness feet/tall/height days/late/delay pounds/heavy/weight""".split()
PARTS = """doors/door windows/window rooms/room steps/step pages/page legs/leg wheels/wheel drawers/drawer
strings/string chapters/chapter bells/bell keys/key oars/oar shelves/shelf""".split()
CONTROLS = """lever/pull button/press switch/turn cord/pull handle/lift dial/turn pedal/push bell/ring
screw/loosen chain/drop valve/close""".split()
EFFECTS = """open the {}|stop the {}|start the {}|light the {}|lower the {}|wake the {}|lock the {}|
drain the {}|move the {}|call the {}|raise the {}|empty the {}""".replace("\n", "").split("|")
VOTES = "captain mayor chairman treasurer abbot consul speaker umpire marshal steward bishop".split()
BEFORE = ["Note: ", "By the way: ", "For the record: ", "Please remember this: ", "Listen. ", "Hello! "]
BEFORE += ["One more thing. ", "Just so you know: ", "News: ", "Good morning. ", "In case you need it: "]
ASKING = ["Tell me: ", "I forgot. ", "Quick question. ", "Hello! ", "Do you remember? ", "One thing: "]
ASKING += ["Once more: ", "Please help me. ", "Thank you. "]


def draw(rng, listed):
    return rng.choice(listed).split("/")


def whom(rng):
    return words.SLOTS["who"](rng)


def travel(rng):
    (did, do), who, town, tail = draw(rng, TRAVELS), whom(rng), words.town(rng), rng.choice(TAILS)
    told = [f"{who} {did} to {town}.", f"{who} {did} to {town} {tail}.", f"{tail}, {who} {did} to {town}."]
    asked = [f"Where did {who} {do}?", f"To which town did {who} {do}?", f"Where did {who} {do} to?"]
    return told, asked, f"To {town}."


def coming(rng):
    (did, do), who, town, tail = draw(rng, COMINGS), whom(rng), words.town(rng), rng.choice(TAILS)
    told = [f"{who} {did} from {town}.", f"{who} {did} from {town} {tail}."]
    asked = [f"From where did {who} {do}?", f"From which town did {who} {do}?"]
    return told, asked, f"From {town}."


def done(rng):
    """Where, by whom, when, or for how much: two of them are told, one is asked for."""
    (was, do, did), what, town = draw(rng, DONE), words.object_(rng), words.town(rng)
    name, date, year = words.person(rng), words.date(rng), rng.randint(1700, 2030)
    price = f"{rng.randint(2, 999)} {words.SLOTS['coin'](rng)}"
    we = rng.choice(["we", "they", "I"])
    ways = [
        (f"in {town}", [f"Where was {what} {was}?", f"In which town was {what} {was}?"]),
        (f"in {town}", [f"In which town did {we} {do} {what}?", f"Where did {we} {do} {what}?"]),
        (f"by {name}", [f"By whom was {what} {was}?"]),
        (f"on {date}", [f"When was {what} {was}?", f"On which day was {what} {was}?"]),
        (f"in {year}", [f"In which year was {what} {was}?", f"When did {we} {do} {what}?"]),
        (f"for {price}", [f"For how much was {what} {was}?"]),
    ]
    (part, asked), (other, _) = rng.sample(ways, 2)
    extra = "" if rng.random() < 0.5 or other[:3] == part[:3] else " " + other
    told = [f"{what} was {was} {part}{extra}.", f"{we} {did} {what} {part}."]
    if part.startswith("by"):
        told = [f"{what} was {was} {part}{extra}.", f"{name} {did} {what}{extra}."]
    return told, asked, part + "."


def numbered(rng):
    kind, what, value = rng.choice(NUMBERS), words.object_(rng), words.SLOTS["big"](rng)
    if rng.random() < 0.3:
        what = f"the {rng.choice(words.THINGS)}"
    if rng.random() < 0.15:
        value = words.SLOTS["code"](rng)
    told = [f"the {kind} number of {what} is {value}.", f"{what} has the {kind} number {value}."]
    told.append(f"{value} is the {kind} number of {what}.")
    asked = [f"What is the {kind} number of {what}?", f"Which {kind} number does {what} have?"]
    return told, asked, f"{value}."


def reachable(rng):
    (do, at, place), first = draw(rng, CHANNELS), words.first(rng)
    n = rng.randint(2, 9999)
    told = [f"you can {do} {first} {at} {place} {n}.", f"to {do} {first}, use {place} {n}."]
    told.append(f"{first} is {at} {place} {n}.")
    if rng.random() < 0.3:
        return told, [f"{at} which {place} can I {do} {first}?"], f"{at} {place} {n}."
    return told, [f"What is {first}'s {place}?", f"Which {place} is {first}'s?"], f"{n}."


def occupant(rng):
    (who, place, does), n, name = draw(rng, OCCUPANTS), rng.randint(2, 999), words.person(rng)
    at = f"in {place} {n}"
    told = [f"the {who} {at} is {name}.", f"{name} is the {who} {at}.", f"{name} {does} {at}."]
    asked = [f"Who is the {who} {at}?", f"Who {does} {at}?"]
    asked.append(f"What is the name of the {who} {at}?")
    return told, asked[1:2] if rng.random() < 0.4 else asked, f"{name}."


def liking(rng):
    (likes, like), who = draw(rng, LIKES), whom(rng)
    what = rng.choice(
        [
            f"{rng.choice(words.COLOURS)} {rng.choice(words.NOUNS)}s",
            f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.THINGS)}s",
            rng.choice(words.DISHES),
            f"the {rng.choice(words.TOOLS)}",
        ]
    )
    told = [f"{who} {likes} {what}.", f"what {who} {likes} is {what}.", f"{who} {likes} {what} most."]
    return told, [f"What does {who} {like}?", f"What is it that {who} {likes}?"], f"{what}."


def role(rng):
    what, who, name = rng.choice(ROLES), words.first(rng), words.person(rng)
    told = [f"{who}'s {what} is {name}.", f"{name} is the {what} of {who}."]
    told.append(f"{who} has a {what} called {name}.")
    if rng.random() < 0.25:
        return told, [f"Whose {what} is {name}?"], f"{who}'s."
    return told, [f"Who is {who}'s {what}?", f"What is the name of {who}'s {what}?"], f"{name}."


def occasion(rng):
    what = f"the {rng.choice(words.ADJECTIVES)} {rng.choice(OCCASIONS)}"
    if rng.random() < 0.4:
        what = f"{words.first(rng)}'s {rng.choice(OCCASIONS)}"
    slots = {name: words.SLOTS[name](rng) for name in ("town", "date", "time", "day", "place", "month")}
    part, asked = rng.choice(
        [
            (f"in {slots['town']}", [f"Where is {what}?", f"In which town is {what}?"]),
            (f"in {slots['place']}", [f"Where is {what}?", f"In what place is {what}?"]),
            (f"on {slots['date']}", [f"When is {what}?", f"On which day is {what}?"]),
            (f"on {slots['day']}", [f"When is {what}?", f"On which day is {what}?"]),
            (f"at {slots['time']}", [f"When does {what} begin?", f"At what time is {what}?"]),
            (f"in {slots['month']}", [f"When is {what}?", f"In which month is {what}?"]),
        ]
    )
    told = [f"{what} is {part}.", f"{what} takes place {part}.", f"{what} will be held {part}."]
    return told, asked, f"{part}."


def measured(rng):
    (unit, how, quality), what, n = draw(rng, SIZES), words.object_(rng), rng.randint(2, 999)
    told = [f"{what} is {n} {unit} {how}.", f"the {quality} of {what} is {n} {unit}."]
    told.append(f"with {n} {unit}, {what} is not very {how}.")
    asked = [f"How {how} is {what}?", f"What is the {quality} of {what}?", f"How many {unit} is {what}?"]
    return told, asked, f"{n} {unit}."


def counted(rng):
    (many, one), what, n = draw(rng, PARTS), words.object_(rng), rng.randint(2, 99)
    told = [f"{what} has {n} {many}.", f"there are {n} {many} to {what}.", f"I counted {n} {many} on {what}."]
    if rng.random() < 0.3:
        colour = rng.choice(words.COLOURS)
        told = [f"{number} {one} of {what} is {colour}." for number in ("the first", "the last", "every")]
        told, asked = [rng.choice(told)], f"{one} of {what}"
        which = told[0][: told[0].index(" " + one)]
        asked = f"{which} {asked}"
        return told, [f"Which colour is {asked}?", f"What colour has {asked}?"], f"{colour}."
    return told, [f"How many {many} has {what}?", f"How many {many} are there to {what}?"], f"{n}."


def control(rng):
    (part, act), effect = draw(rng, CONTROLS), rng.choice(EFFECTS).format(rng.choice(words.NOUNS))
    which = f"the {rng.choice(words.COLOURS + words.ADJECTIVES)} {part}"
    told = [f"to {effect}, {act} {which}.", f"{act} {which} to {effect}.", f"{which} will {effect}."]
    if rng.random() < 0.3:
        return told, [f"What happens if I {act} {which}?", f"What will {which} do?"], f"{effect}."
    return told, [f"How do I {effect}?", f"What must I {act} to {effect}?"], f"{act} {which}."


def chosen(rng):
    post, town, name = rng.choice(VOTES), words.town(rng), words.person(rng)
    of = rng.choice([f"{post} of {town}", f"{post} of the {rng.choice(words.NOUNS)} club"])
    told = [f"{name} was elected {of}.", f"they chose {name} as {of}.", f"the new {of} is {name}."]
    return told, [f"Who was elected {of}?", f"Who is {of}?", f"Whom did they choose as {of}?"], f"{name}."


def translated(rng):
    word, town, noun = words.invented(rng).lower(), words.town(rng), rng.choice(words.NOUNS)
    told = [f"in {town} they say {word} for {noun}.", f"{word} means {noun} in {town}."]
    told.append(f"the people of {town} call a {noun} {word}.")
    if rng.random() < 0.5:
        return told, [f"What does {word} mean?", f"What is {word} in {town}?"], f"{noun}."
    asked = [f"What is the word for {noun} in {town}?", f"How do they call a {noun} in {town}?"]
    return told, asked, f"{word}."


def exchanged(rng):
    who, given, got = whom(rng), words.object_(rng), words.object_(rng)
    told = [f"{who} exchanged {given} for {got}.", f"for {given} {who} got {got}."]
    told.append(f"{who} gave {given} away and took {got}.")
    return told, [f"For what did {who} exchange {given}?", f"What did {who} get for {given}?"], f"{got}."


def reason(rng):
    who, what = whom(rng), f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"
    acts = "laughed/laugh cried/cry stayed/stay stopped/stop waited/wait sang/sing".split()
    (did, do), of = draw(rng, acts), rng.choice(["because of", "on account of", "thanks to"])
    told = [f"{who} {did} {of} {what}.", f"{of} {what} {who} {did}."]
    return told, [f"Why did {who} {do}?", f"Because of what did {who} {do}?"], f"because of {what}."


def limit(rng):
    place, n = f"the {rng.choice(words.NOUNS)} in {words.town(rng)}", rng.randint(2, 9999)
    told = [f"{place} has room for {n} people.", f"no more than {n} people may enter {place}."]
    told.append(f"{place} holds {n} people at most.")
    asked = [f"For how many people has {place} room?", f"How many people does {place} hold?"]
    return told, asked + [f"How many people may enter {place}?"], f"{n}."


def form(rng):
    """One of the forms of facts.py."""
    sentences, questions, answer = rng.choice(facts.TRAINED + facts.FAMILIES)
    slots = words.Slots(rng)
    told = [rng.choice(sentences).format_map(slots)]
    return told, [question.format_map(slots) for question in questions], answer.format_map(slots)


WAYS = [travel, coming, done, done, numbered, reachable, occupant, liking, role, occasion, form, form]
WAYS += [measured, counted, control, chosen, translated, exchanged, reason, limit]


def relation(rng):
    told, asked, answer = rng.choice(WAYS)(rng)
    sentence, key = facts.capital(rng.choice(told)), asked[0]
    question = facts.capital(rng.choice(asked))
    if rng.random() < 0.2:
        sentence = rng.choice(BEFORE) + sentence
    if rng.random() < 0.15:
        question = rng.choice(ASKING) + question
    about = facts.asked(rng, question, facts.capital(answer))
    return Needle("relation", [facts.told(rng, sentence)], [about], key)
