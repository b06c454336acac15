"""What is hidden in a haystack, and what is asked about it."""


class Needle:
    """`pieces`: the texts to hide, each at a place of its own, in this order. `questions`:
    [(question, [(part of the answer, the number of the piece that it is read from)])]. `key`: what
    it is about, so that no haystack holds two answers to one question. `references`: None where an
    answer must be right to the letter, else the strings that RULER looks for in the output."""

    def __init__(self, kind, pieces, questions, key, references=None):
        self.kind, self.pieces, self.questions, self.key = kind, pieces, questions, key
        self.references = references


def one(question, answer):
    """A question whose answer is read from one piece."""
    return question, [(answer, 0)]


def answer_text(parts):
    return "".join(text for text, _ in parts)


def plain_question(question):
    return f"\nQuestion: {question}\nAnswer:"


def chat_question(question):
    return f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def distinct(needles):
    """The first needle of each key."""
    return list({needle.key: needle for needle in reversed(needles)}.values())
