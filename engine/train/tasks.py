"""The tasks the model is trained and judged on: text with facts in it, and questions.

Everything is text and plain Python, so that the evaluation through the daemon's API can use it
without torch. Generators take a random.Random, so a printed seed reproduces every case. facts.py
has those of a conversation.
"""
import string
import uuid

import facts
import grammar
import words
from needle import Needle, one

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def fragments(rng, count):
    """A run of text that no language model could guess."""
    out = ""
    for _ in range(count):
        out += rng.choice(["", " "]) + "".join(
            rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 4))
        )
    return out.strip()


def letters(rng):
    return fragments(rng, 5)


def passkey(rng, numbers=0.7):
    """`numbers`: how many are one, of the others to be told letter by letter."""
    value = words.number(rng) if rng.random() < numbers else fragments(rng, 10)
    return Needle(
        "passkey",
        [f"\n|The passkey is: {value}|"],
        [one("\n|What is the passkey? The passkey is", f" {value}|")],
        "passkey",
    )


# RULER's needles.


def niah_kind(rng):
    return rng.choices(["numbers", "words", "uuids"], [6, 2, 2])[0]


def identifier(rng):
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def niah_value(rng, kind):
    """`kind`: those of RULER, and letters that nothing but the place itself tells."""
    kinds = {"numbers": words.number, "words": words.pair, "uuids": identifier, "letters": letters}
    return kinds[kind](rng)


def niah_sentence(kind, key, value):
    return f" One of the special magic {kind} for {key} is: {value}."


def niah(rng, kind=None, key=None):
    """One value for one key."""
    kind = kind or niah_kind(rng)
    key = key or (words.pair(rng) if rng.random() < 0.93 else identifier(rng))
    value, a = niah_value(rng, kind), kind[:-1]
    question = (
        f"\nWhat is the special magic {a} for {key} mentioned in the provided text? The "
        f"special magic {a} for {key} mentioned in the provided text is"
    )
    sentence = niah_sentence(kind, key, value)
    return Needle("niah_" + kind, [sentence], [one(question, f" {value}.")], key, [value])


def niah_all_question(kind, keys):
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    return (
        f"\nWhat are all the special magic {kind} for {query} mentioned in the provided text? The "
        f"special magic {kind} for {query} mentioned in the provided text are"
    )


def niah_multivalue(rng, kind=None, count=None, begun=0):
    """Several values of one key. The newest is said first, as retrieval reads the newest first.
    `begun`: at most so many of them, any in any order, are said already."""
    kind, count, key = kind or niah_kind(rng), count or rng.choice([2, 3, 4, 4, 4, 4, 5, 6]), words.pair(rng)
    values = [niah_value(rng, kind) for _ in range(count)]
    said = rng.sample(range(count), min(begun, count - 1))
    order = [i for i in reversed(range(count)) if i not in said]
    question = niah_all_question(kind, [key]) + "".join(f" {values[i]}," for i in said)
    parts = [(f" {values[i]}{'.' if i == order[-1] else ','}", i) for i in order]
    return Needle(
        "niah_multivalue",
        [niah_sentence(kind, key, value) for value in values],
        [(question, parts)],
        key,
        values,
    )


def niah_multiquery(rng, kind=None, count=None):
    """Several keys asked for at once: each is said again before its value."""
    kind, count = kind or niah_kind(rng), count or rng.randint(2, 4)
    keys = [words.pair(rng) for _ in range(count)]
    values = [niah_value(rng, kind) for _ in keys]
    asked = list(range(count))
    rng.shuffle(asked)
    parts = [(f" {keys[i]}: {values[i]}{'.' if i == asked[-1] else ','}", i) for i in asked]
    return Needle(
        "niah_multiquery",
        [niah_sentence(kind, key, value) for key, value in zip(keys, values)],
        [(niah_all_question(kind, [keys[i] for i in asked]), parts)],
        keys[0],
        values,
    )


def niah_intro(kind, single=True):
    a = kind[:-1]
    if single:
        return (
            f"A special magic {a} is hidden within the following text. Make sure to memorize "
            f"it. I will quiz you about the {a} afterwards.\n"
        )
    return (
        f"Some special magic {kind} are hidden within the following text. Make sure to memorize "
        f"them. I will quiz you about the {kind} afterwards.\n"
    )


VT_INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def vt(rng, hops=None):
    """RULER's variable tracking: one chain, told in its order."""
    hops = hops or rng.choice([1, 2, 3, 4, 4, 4])
    names = ["".join(rng.choice(string.ascii_uppercase) for _ in range(5)) for _ in range(hops + 1)]
    value = str(rng.randint(10000, 99999))
    before, after = rng.choice([("\n", "\n"), (" ", ""), (" ", "."), ("\n", "")])
    told = [value] + [f"VAR {name}" for name in names]
    pieces = [f"{before}VAR {name} = {what}{after}" for name, what in zip(names, told)]
    question = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.\n"
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{hops + 1} variables are assigned the value {value}, they are: "
    )
    if rng.random() < 0.5:
        question = question.replace("\nAnswer", " Answer")
    parts = [(f"{' ' if i else ''}{name}", i) for i, name in enumerate(names)]
    if rng.random() < 0.3:  # without the space that RULER ends its question with
        question, parts[0] = question[:-1], (" " + parts[0][0], 0)
    return Needle("vt", pieces, [(question, parts)], value, names)


def fwe(rng, count, dots=False):
    """RULER's frequent words: (text of `count` made-up words, question, the three in order). With
    `dots` those are yet more frequent, and not to be counted."""
    vocabulary = ["".join(rng.choice(string.ascii_lowercase) for _ in range(6)) for _ in range(60)]
    vocabulary[:0] = ["...."] if dots else []
    weights = [(rank + 1) ** -2.0 for rank in range(len(vocabulary))]
    drawn = rng.choices(vocabulary, weights, k=count)
    most = sorted(vocabulary[dots:], key=lambda word: -drawn.count(word))[:3]
    intro = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words. "
    )
    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text? Answer: According to the "
        "coded text above, the three most frequently appeared words are:"
    )
    return intro + " ".join(drawn), question, most


# Phone books, of "Repeat After Me".


def phone_line(rng):
    value = f"{words.number(rng, 3)}-{words.number(rng, 3)}-{words.number(rng, 4)}"
    return words.person(rng), value


def phone(rng):
    """One line of a book that is spread over the text."""
    name, value = phone_line(rng)
    return Needle("phone", [f"\n{name}: {value}"], [one(f"\n{name}:", f" {value}\n")], name)


def phone_book(rng, count=None):
    """A whole book, and two solved examples before the name that is asked for."""
    lines = dict(phone_line(rng) for _ in range(count or rng.choice([4, 8, 12, 20, 20, 24, 32])))
    names = rng.sample(list(lines), 3)
    examples = "".join(f"\n{name}: {lines[name]}" for name in names[:2])
    return Needle(
        "phone_book",
        ["\n" + "\n".join(f"{name}: {value}" for name, value in lines.items()) + "\n"],
        [one(f"{examples}\n{names[2]}:", f" {lines[names[2]]}\n")],
        names[2],
    )


def pair(rng, taken, letters, digits):
    """The dense curriculum's atom: a short key and a few digits."""
    while True:
        key = "".join(rng.choice(string.ascii_letters) for _ in range(letters))
        if key not in taken:
            taken.add(key)
            break
    value = "".join(rng.choice(string.digits) for _ in range(digits))
    return Needle("pair", [f" {key}{value}"], [one(f" {key}", value)], key)


KINDS = {
    "passkey": passkey,
    "letters": lambda rng: passkey(rng, 0.0),
    "niah": niah,
    "niah_multivalue": lambda rng: niah_multivalue(rng, begun=rng.choice([0, 0, 0, 1, 2, 3])),
    "niah_multiquery": niah_multiquery,
    "vt": vt,
    "phone": phone,
    "phone_book": phone_book,
    "fact": facts.fact,
    "family": facts.family,
    "statement": facts.statement,
    "event": facts.event,
    "relation": grammar.relation,
}


def mixed(rng, mix):
    """One needle; `mix` says how often which of KINDS."""
    return KINDS[rng.choices(list(mix), list(mix.values()))[0]](rng)
