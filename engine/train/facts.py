"""Facts as people tell them, and the questions that ask for them: conversation memory.

A form is a line `how it is told || how it is asked || the answer`, alternatives between `|`, with the
slots of words.py in braces.
"""
import words
from needle import Needle, chat_question, one, plain_question

# EVAL's twenty forms; trained on.
TRAINED = """
My {relation} {first} keeps the {colour} {thing} in {place}. || Where does my {relation} {first} keep the {colour} {thing}? | In which place is the {colour} {thing} of {first}? || In {place}.
The secret code of {first}'s locker is {value}. || What is the secret code of {first}'s locker? | Which code opens the locker of {first}? || {value}.
{first}'s phone number is {value}. || What is {first}'s phone number? | Which number do I call to reach {first}? || {value}.
The password for the {colour} {thing} is {value}. || What is the password for the {colour} {thing}? | Tell me the password of the {colour} {thing}. || {value}.
I parked the car at level {n}, {colour} zone. || Where did I park the car? | At which level and zone is my car? || At level {n}, {colour} zone.
{first} was born in {town}. || Where was {first} born? | In which town was {first} born? || In {town}.
{first} lives at {n} {last} Street in {town}. || Where does {first} live? | What is the address of {first}? || At {n} {last} Street in {town}.
My {animal} is called {first}. || What is my {animal} called? | What is the name of my {animal}? || {first}.
The train to {town} leaves from platform {n}. || From which platform does the train to {town} leave? | Where do I board the train to {town}? || From platform {n}.
{first} owes {first2} {n} pounds. || How much does {first} owe {first2}? | How many pounds must {first} pay {first2}? || {n} pounds.
The favourite colour of {first} is {colour}. || What is the favourite colour of {first}? | Which colour does {first} like best? || {colour}.
The meeting with {first} {last} takes place in room {n}. || In which room is the meeting with {first} {last}? | Where do I meet {first} {last}? || In room {n}.
The combination of the {colour} safe is {value}. || What is the combination of the {colour} safe? | How do I open the {colour} safe? || {value}.
Remember that {first}'s flight number is {value}. || What is {first}'s flight number? | Which flight does {first} take? || {value}.
{first} married {first2} {last}. || Whom did {first} marry? | Who is married to {first}? || {first2} {last}.
The {thing} belongs to {first} {last}. || To whom does the {thing} belong? | Who owns the {thing}? || {first} {last}.
{first} hid the {thing} under the {colour} {noun}. || Where did {first} hide the {thing}? | Under what is the {thing} of {first}? || Under the {colour} {noun}.
The order number of the {thing} is {value}. || What is the order number of the {thing}? | Under which number was the {thing} ordered? || {value}.
{first} works as a guide in {town}. || In which town does {first} work? | Where does {first} work? || In {town}.
My {relation}'s name is {first} {last}. || What is my {relation}'s name? | Who is my {relation}? || {first} {last}.
"""

# EVAL's five forms that are held out, to see whether the skill carries over to forms never seen.
HELD_OUT = """
You can reach {first} under extension {n}. || What is {first}'s extension? | Which extension reaches {first}? || {n}.
The {colour} {thing} was bought in {town}. || Where was the {colour} {thing} bought? | In which town did we buy the {colour} {thing}? || In {town}.
{first} moved to {town} last year. || Where did {first} move? | To which town did {first} move? || To {town}.
The serial number of the {thing} is {value}. || What is the serial number of the {thing}? | Which serial number does the {thing} have? || {value}.
The guest in room {n} is {first} {last}. || Who is the guest in room {n}? | Who stays in room {n}? || {first} {last}.
"""

# More ways to say things, so that no form stands for all.
FAMILIES = """
{Who} works at the {company} in {town}. | {Who} has a post at the {company} of {town}. || Where does {who} work? | What is the workplace of {who}? | Who employs {who}? || At the {company} in {town}.
{Who} is a {job}. | {Who} makes a living as a {job}. || What is {who}'s profession? | What does {who} do for a living? | Which trade does {who} follow? || A {job}.
The gate opens at {time}. | They open the gate at {time}. || When does the gate open? | At what time is the gate opened? || At {time}.
The {noun} meeting starts at {time} on {day}. | On {day} at {time} we hold the {noun} meeting. || When is the {noun} meeting? | On which day and at what time does the {noun} meeting start? || On {day} at {time}.
{Who} paid {big} {coin} for {object}. | {Object} cost {who} {big} {coin}. || How much did {who} pay for {object}? | What did {object} cost? || {big} {coin}.
{Who} lent {object} to {name}. | {name} borrowed {object} from {who}. || Who has {object} now? | Who borrowed {object}? | To whom was {object} lent? || {name}.
{Who} left {object} in {place}. | {Object} was left in {place} by {who}. || Where did {who} leave {object}? | Where can I find {object}? || In {place}.
{Object} hangs behind the {noun2}. | Behind the {noun2} hangs {object}. || Where does {object} hang? | Behind what is {object}? || Behind the {noun2}.
{Who} plays the {tool}. | The {tool} is what {who} plays. || Which instrument does {who} play? | What does {who} play? || The {tool}.
{Who} is fond of {dish}. | What {who} likes to eat is {dish}. || Which dish does {who} like? | What is {who}'s favourite dish? | What should I cook for {who}? || {dish}.
{Who} is {few} years old. | The age of {who} is {few}. || How old is {who}? | What is the age of {who}? || {few}.
{Who} was {n} miles from {town} at noon. | At noon {who} had {n} miles to go to {town}. || How many miles was {who} from {town}? | How far was {who} from {town} at noon? || {n} miles.
{name} teaches {game} in {town}. | In {town} it is {name} who teaches {game}. || Who teaches {game} in {town}? | Who is the {game} teacher in {town}? || {name}.
{name} teaches {game} in {town}. || What does {name} teach? | Which game is taught by {name}? || {game}.
The captain of the {adjective} {noun} is {name}. | {name} commands the {adjective} {noun}. || Who commands the {adjective} {noun}? | Who is the captain of the {adjective} {noun}? || {name}.
{name} wrote the book about the {noun}. | The book about the {noun} is by {name}. || Who wrote the book about the {noun}? | Who is the author of the book about the {noun}? || {name}.
{name} painted the picture of the {noun} in {year}. | In {year} the picture of the {noun} was painted by {name}. || Who painted the picture of the {noun}? | Which painter made the picture of the {noun}? || {name}.
{name} painted the picture of the {noun} in {year}. | In {year} the picture of the {noun} was painted by {name}. || When was the picture of the {noun} painted? | In which year did {name} paint the {noun}? || In {year}.
The bridge at {town} was built in {year}. | They built the bridge at {town} in {year}. || When was the bridge at {town} built? | In which year was the bridge of {town} built? || In {year}.
{first} and {first2} met in {town}. | It was in {town} that {first} met {first2}. || Where did {first} meet {first2}? | In which town did {first} and {first2} meet? || In {town}.
{first}'s birthday is on {date}. | On {date} we celebrate {first}'s birthday. || When is {first}'s birthday? | On which day was {first} born? || On {date}.
The wedding of {first} and {first2} is on {date}. | {first} and {first2} marry on {date}. || When is the wedding of {first} and {first2}? | On which day do {first} and {first2} marry? || On {date}.
The ship to {town} sails on {date}. | On {date} the ship leaves for {town}. || When does the ship to {town} sail? | On which day is there a ship to {town}? || On {date}.
The ferry to {town} costs {n} {coin}. | A ticket for the ferry to {town} is {n} {coin}. || How much is the ferry to {town}? | What does the ferry to {town} cost? || {n} {coin}.
There are {big} books in the library of {town}. | The library of {town} holds {big} books. || How many books are in the library of {town}? | What number of books does the library of {town} hold? || {big}.
{big} people live in {town}. | {town} has {big} inhabitants. || How many people live in {town}? | What is the population of {town}? || {big}.
The tower of {town} is {n} feet high. | In {town} there stands a tower of {n} feet. || How high is the tower of {town}? | What is the height of the tower in {town}? || {n} feet.
The code word for {day} is {word}. | On {day} use the code word {word}. || What is the code word for {day}? | Which word do I use on {day}? || {word}.
The motto of the {noun} club is {word} and {word2}. | {word} and {word2} is the motto of the {noun} club. || What is the motto of the {noun} club? | Tell me the motto of the {noun} club. || {word} and {word2}.
The winner of the {game} match was {name}. | {name} won the {game} match. || Who won the {game} match? | Who was the winner of the {game} match? || {name}.
The winner of the {game} match in {town} got {n} {coin}. | In {town} they gave {n} {coin} to the winner of the {game} match. || How much did the winner of the {game} match get? | What was the prize of the {game} match in {town}? || {n} {coin}.
{Who} is allergic to {dish}. | Never give {dish} to {who}. || What is {who} allergic to? | What must I never give to {who}? || {dish}.
{Who} wants {object} for the birthday. | For the birthday {who} would like {object}. || What does {who} want for the birthday? | What shall I give {who}? || {object}.
{Who} is afraid of the {adjective} {noun}. | The {adjective} {noun} frightens {who}. || What is {who} afraid of? | What frightens {who}? || The {adjective} {noun}.
My appointment with doctor {last} is at {time}. | Doctor {last} will see me at {time}. || When does doctor {last} see me? | At what time is my appointment with doctor {last}? || At {time}.
My seat in the theatre is row {few}, number {n}. | In the theatre I sit in row {few}, number {n}. || Where do I sit in the theatre? | What is my seat in the theatre? || Row {few}, number {n}.
The licence plate of {who}'s car is {code}. | {Who} drives a car with the plate {code}. || What is the licence plate of {who}'s car? | Which plate does {who}'s car have? || {code}.
The parcel from {town} has the mark {code}. | {code} is the mark of the parcel from {town}. || Which mark does the parcel from {town} have? | How is the parcel from {town} marked? || {code}.
The wireless password at {first}'s house is {code}. | At {first}'s house, type {code} for the wireless. || What is the wireless password at {first}'s house? | What do I type at {first}'s house? || {code}.
The {animal} of {who} is named {made}. | {Who} has a {animal} named {made}. || What is the name of {who}'s {animal}? | How does {who} call the {animal}? || {made}.
{Who} owns a {animal} and a {animal2}. | A {animal} and a {animal2} belong to {who}. || Which animals does {who} own? | What pets has {who}? || A {animal} and a {animal2}.
The {colour} house is {name}'s. | {name} owns the {colour} house. | In the {colour} house lives {name}. || Who lives in the {colour} house? | Whose is the {colour} house? || {name}.
The {colour} door leads to the {noun}. | Behind the {colour} door is the {noun}. || Where does the {colour} door lead? | What is behind the {colour} door? || The {noun}.
{Who} takes the {few} o'clock bus to {town}. | The {few} o'clock bus takes {who} to {town}. || Where does {who} go by bus? | To which town does {who} take the bus? || To {town}.
{Who} speaks the language of {town} and of {town2}. || Which languages does {who} speak? | What languages are known to {who}? || Those of {town} and {town2}.
{first} is the {relation} of {name}. | {name}'s {relation} is {first}. || Who is the {relation} of {name}? | What is the name of {name}'s {relation}? || {first}.
The landlord of {first} is called {name}. | {first} rents from {name}. || Who is the landlord of {first}? | From whom does {first} rent? || {name}.
The rent of {first}'s flat is {n} {coin}. | {first} pays {n} {coin} of rent. || How much rent does {first} pay? | What is the rent of {first}'s flat? || {n} {coin}.
{first} weighs {n} pounds. | The weight of {first} is {n} pounds. || How much does {first} weigh? | What is the weight of {first}? || {n} pounds.
The {noun} project is led by {name}. | {name} is in charge of the {noun} project. || Who leads the {noun} project? | Who is in charge of the {noun} project? || {name}.
The deadline of the {noun} project is {date}. | The {noun} project must be done by {date}. || When must the {noun} project be done? | What is the deadline of the {noun} project? || {date}.
The budget of the {noun} project is {big} {coin}. | For the {noun} project we have {big} {coin}. || What is the budget of the {noun} project? | How much money is there for the {noun} project? || {big} {coin}.
{Who} prefers tea with {noun} and {noun2}. || How does {who} take tea? | What does {who} want in the tea? || With {noun} and {noun2}.
{Who} will arrive by the {time} train. | The {time} train brings {who}. || By which train does {who} arrive? | When will {who} arrive? || By the {time} train.
{Who} studied in {town}. | It was in {town} that {who} went to school. || Where did {who} study? | In which town did {who} go to school? || In {town}.
{Who} comes from {town}. | {town} is where {who} grew up. || Where does {who} come from? | Where did {who} grow up? || From {town}.
{Who} is buried in {town}. | The grave of {who} is in {town}. || Where is {who} buried? | Where is the grave of {who}? || In {town}.
{Who} spent the summer in {town}. | In summer {who} was in {town}. || Where did {who} spend the summer? | Where was {who} in summer? || In {town}.
{Object} is made of {noun2} and {noun3}. || What is {object} made of? | Of what does {object} consist? || Of {noun2} and {noun3}.
{Object} was a present from {name}. | {name} gave me {object}. || Who gave me {object}? | From whom did I get {object}? || {name}.
{Object} was made by {name} in {town}. | {name} of {town} made {object}. || Who made {object}? | Who is the maker of {object}? || {name}.
{Object} weighs {n} pounds. | The weight of {object} is {n} pounds. || How much does {object} weigh? | What is the weight of {object}? || {n} pounds.
{Object} stands on the {adjective} {noun2}. | On the {adjective} {noun2} you see {object}. || Where does {object} stand? | On what do you see {object}? || On the {adjective} {noun2}.
{Object} is worth {big} {coin}. | They say that {object} is worth {big} {coin}. || How much is {object} worth? | What is the value of {object}? || {big} {coin}.
{Object} must be fed every {few} days. || How often must {object} be fed? | When must {object} be fed? || Every {few} days.
{Object} was sold to {name} for {n} {coin}. | {name} bought {object} for {n} {coin}. || Who bought {object}? | To whom was {object} sold? || {name}.
{Object} was sold to {name} for {n} {coin}. | {name} bought {object} for {n} {coin}. || For how much was {object} sold? | What did {name} pay for {object}? || {n} {coin}.
Turn left at the {noun} to get to {who}'s house. | To reach {who}'s house, turn left at the {noun}. || Where do I turn left to get to {who}'s house? | At what must I turn for {who}'s house? || At the {noun}.
The key to the {noun} is under the {adjective} {noun2}. | Look under the {adjective} {noun2} for the key to the {noun}. || Where is the key to the {noun}? | Where do I find the key to the {noun}? || Under the {adjective} {noun2}.
Page {n} of the diary tells of the {noun}. | The {noun} is mentioned on page {n} of the diary. || On which page does the diary tell of the {noun}? | Where in the diary is the {noun}? || On page {n}.
Question {few} of the test is about the {noun}. || Which question of the test is about the {noun}? | What is the number of the question about the {noun}? || {few}.
The recipe for {dish} needs {n} grams of sugar. | For {dish} take {n} grams of sugar. || How much sugar does the recipe for {dish} need? | How many grams of sugar go into {dish}? || {n} grams.
The next train after {time} goes at {time2}. || When does the train after {time} go? | At what time is the next train after {time}? || At {time2}.
{Who} said that the {noun} would be {adjective}. || What did {who} say about the {noun}? | What did {who} say the {noun} would be? || That it would be {adjective}.
{Who} dreamt of a {adjective} {noun}. | In the dream {who} saw a {adjective} {noun}. || What did {who} dream of? | What did {who} see in the dream? || A {adjective} {noun}.
The spy in {town} goes by the name of {made}. | {made} is the name of the spy in {town}. || What is the name of the spy in {town}? | Under which name does the spy in {town} go? || {made}.
The dog's vaccination is due in {month}. | In {month} the dog must be vaccinated. || When is the dog's vaccination due? | In which month must the dog be vaccinated? || In {month}.
Our table at the restaurant is number {few}. | At the restaurant we have table {few}. || Which table do we have at the restaurant? | What is the number of our table? || {few}.
{Who} holds ticket {big}. | Ticket {big} is {who}'s. || Which ticket does {who} hold? | What is the number of {who}'s ticket? || {big}.
{Who} holds ticket {big}. | Ticket {big} is {who}'s. || Who holds ticket {big}? | Whose is ticket {big}? || {who}.
The bus number {n} goes to {town}. | To get to {town}, take bus {n}. || Which bus goes to {town}? | What bus do I take to {town}? || {n}.
Box {n} holds {object}. | {Object} is in box {n}. || What does box {n} hold? | What is in box {n}? || {object}.
The member with the number {big} is {name}. | {name} has the member number {big}. || Who has the member number {big}? | Which member has the number {big}? || {name}.
"""


def parse(lines):
    """[(sentences, questions, answer)]"""
    split = lambda text, by: [part.strip() for part in text.split(by)]
    forms = [split(line, "||") for line in lines.strip().splitlines()]
    return [(split(told, "|"), split(asked, "|"), answer) for told, asked, answer in forms]


TRAINED, HELD_OUT, FAMILIES = parse(TRAINED), parse(HELD_OUT), parse(FAMILIES)
ACKNOWLEDGED = "I will remember that."


def capital(text):
    return text[0].upper() + text[1:]


def told(rng, sentence):
    """A sentence as it stands in a text, or told in a chat."""
    if rng.random() < 0.15:
        reply = rng.choice([ACKNOWLEDGED, "Noted.", "I see."])
        return (
            f"\n<|im_start|>user\n{sentence}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"
        )
    return rng.choice([" ", "\n"]) + sentence


def asked(rng, question, answer):
    """The question in the plain form or as a chat's, and the answer that ends accordingly."""
    if rng.random() < 0.5:
        return one(plain_question(question), " " + answer)
    return one(chat_question(question), answer + "<|im_end|>")


def fill(rng, kind, form):
    sentences, questions, answer = form
    slots = words.Slots(rng)
    text = told(rng, capital(rng.choice(sentences).format_map(slots)))
    question, answer = rng.choice(questions).format_map(slots), answer.format_map(slots)
    key = questions[0].format_map(slots)
    return Needle(kind, [text], [asked(rng, question, capital(answer))], key)


def fact(rng, held_out=False):
    return fill(rng, "fact", rng.choice(HELD_OUT if held_out else TRAINED))


def family(rng):
    return fill(rng, "family", rng.choice(FAMILIES))


def _value(rng):
    kind = rng.randrange(12)
    if kind < 4:
        return words.number(rng, rng.choice([1, 2, 3, 4, 4, 5, 6, 7, 8]))
    return [
        words.pair(rng),
        rng.choice(words.NOUNS),
        words.person(rng),
        words.town(rng),
        f"{words.date(rng)} {rng.randint(1700, 2030)}",
        words.SLOTS["code"](rng),
        words.SLOTS["time"](rng),
        f"the {rng.choice(words.ADJECTIVES)} one",
    ][kind - 4]


def _subject(rng):
    first, noun, adjective = words.first(rng), rng.choice(words.NOUNS), rng.choice(words.ADJECTIVES)
    return rng.choice(
        [
            f"the {adjective} {noun}",
            f"the {rng.choice(words.THINGS)} of {first}",
            f"{first}'s {noun}",
            f"{first}'s {adjective} {rng.choice(words.THINGS)}",
            f"the {noun} in {words.town(rng)}",
            f"the {noun} near the {rng.choice(words.NOUNS)}",
            f"my {rng.choice(words.RELATIONS)}'s {noun}",
            f"project {noun.capitalize()}",
            f"{first} {words.last(rng)}",
            f"my {adjective} {noun}",
            f"the {rng.choice(words.COLOURS)} {noun}",
            f"the {adjective} {noun} club",
        ]
    )


def statement(rng):
    """A fact of no fixed form: the user's own facts are of none either."""
    subject, attribute, value = _subject(rng), rng.choice(words.ATTRIBUTES), _value(rng)
    if rng.random() < 0.2:
        attribute = f"{rng.choice(words.ADJECTIVES)} {attribute}"
    of = f"the {attribute} of {subject}"
    whose = f"{subject}'s {attribute}" if rng.random() < 0.5 else of
    if rng.random() < 0.25:
        whose = of = rng.choice([f"the {attribute} for {subject}", f"the {attribute} to {subject}"])
    sentence = rng.choice(
        [
            f"{capital(of)} is {value}.",
            f"{capital(whose)} is {value}.",
            f"Remember that {of} is {value}.",
            f"Please note: {whose} is {value}.",
            f"I changed {of} to {value}.",
            f"They say that {whose} is {value}.",
            f"By the way, {whose} is {value}.",
            f"From today on {of} is {value}.",
            f"{capital(of)} was set to {value}.",
            f"{capital(of)}: {value}.",
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
    about = asked(rng, question, f"{value}.")
    return Needle("statement", [told(rng, sentence)], [about], f"{attribute} {subject}")


def event(rng):
    """Somebody did something somewhere: any part of it may be asked for."""
    done, do = rng.choice(words.VERBS).split("/")
    who = rng.choice(
        [
            words.first(rng),
            f"{words.first(rng)} {words.last(rng)}",
            f"my {rng.choice(words.RELATIONS)}",
            f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}",
        ]
    )
    what = rng.choice(
        [
            f"the {rng.choice(words.COLOURS)} {rng.choice(words.NOUNS)}",
            f"a {rng.choice(words.THINGS)}",
            f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.THINGS)}",
            f"{rng.randint(2, 99)} {rng.choice(words.NOUNS)}s",
            f"her {rng.choice(words.THINGS)}",
        ]
    )
    where = rng.choice(
        [
            f"in {words.town(rng)}",
            f"in {words.SLOTS['place'](rng)}",
            f"at {words.first(rng)}'s house",
            f"under the {rng.choice(words.NOUNS)}",
            f"near the {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}",
            f"behind the {rng.choice(words.NOUNS)}",
            f"at {rng.randint(1, 999)} {words.last(rng)} Street",
        ]
    )
    when = rng.choice(
        [
            f"on {rng.choice(words.DAYS)}",
            f"in {rng.choice(words.MONTHS)}",
            f"at {rng.randint(1, 12)} o'clock",
            f"on {words.date(rng)}",
            f"in {rng.randint(1700, 2030)}",
        ]
    )
    price = f"for {rng.randint(2, 999)} {rng.choice(['pounds', 'dollars', 'crowns', 'guineas'])}"
    parts, about = f"{who} {done} {what}", [
        (f"Who {done} {what}?", who),
        (f"What did {who} {do}?", what),
    ]
    if rng.random() < 0.7:
        parts += " " + where
        about += [
            (f"Where did {who} {do} {what}?", where),
            (f"In which place did {who} {do} {what}?", where),
        ]
    if rng.random() < 0.4:
        parts += " " + when
        about.append((f"When did {who} {do} {what}?", when))
    if rng.random() < 0.25:
        parts += " " + price
        about.append((f"For how much did {who} {do} {what}?", price))
    question, answer = rng.choice(about)
    return Needle(
        "event",
        [told(rng, capital(parts) + ".")],
        [asked(rng, question, capital(answer) + ".")],
        f"{who} {done} {what}",
    )
