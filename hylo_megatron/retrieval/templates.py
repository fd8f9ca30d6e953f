"""The wording of synthetic retrieval samples, as a table: facts, keys, values and instructions.

No run of three words here may occur in the needle evaluation (``evaluate/needle.py``), because a model should learn
retrieval, not the test's phrases. ``tests/retrieval/test_templates.py`` checks this.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A statement to hide and a way to ask for it. ``{k}`` is its key, ``{v}`` (in the statement only) its value.

    The answer is ``prefix``, a space, the value and ``suffix``. ``numeric``: only numbers make sense as values.
    """

    statement: str
    question: str
    prefix: str
    suffix: str = "."
    numeric: bool = False

    def fill(self, key: str, value: str, bare: bool) -> "Needle":
        """Return the fact with key and value. ``bare``: the answer is the value alone."""
        statement, question = self.statement.format(k=key, v=value), self.question.format(k=key)
        if bare:
            return Needle(statement, question, "", value, "")
        prefix = self.prefix.format(k=key)
        return Needle(statement, question, f"{prefix} " if prefix else "", value, self.suffix)


@dataclass(frozen=True)
class Needle:
    """A fact with its key and value. ``prefix``, ``value`` and ``suffix`` make up the answer."""

    statement: str
    question: str
    prefix: str
    value: str
    suffix: str


FACTS = (
    Fact("The access code for the {k} is {v}.", "Which access code does the {k} have?",
         "The access code for the {k} is"),
    Fact("{k} was given registration {v} at the front desk.", "Which registration was given to {k}?",
         "{k} was given registration"),
    Fact("Remember that the locker of {k} opens with {v}.", "With which combination does the locker of {k} open?",
         "The locker of {k} opens with"),
    Fact("In the ledger, {k} is entered under {v}.", "Under which entry is {k} found in the ledger?",
         "In the ledger, {k} is entered under"),
    Fact("The parcel for {k} carries the label {v}.", "What does the label on the parcel for {k} say?",
         "The label says"),
    Fact("Note: the reference of {k} is {v}.", "Give the reference of {k}.", "The reference of {k} is"),
    Fact("It should be added that {k} weighs {v} grams.", "How many grams does {k} weigh?", "{k} weighs",
         " grams.", True),
    Fact("The telephone extension of {k} is {v}.", "Which telephone extension does {k} have?",
         "The extension of {k} is", numeric=True),
    Fact("{k} = {v}", "To which value is {k} set above?", "The value of {k} is"),
    Fact("My friend told me the password of {k}, which is {v}.", "My friend told me a password for {k}. Which one?",
         "According to your friend it is"),
    Fact("Ticket {v} belongs to {k}.", "Which ticket belongs to {k}?", "The ticket of {k} is"),
    Fact("A sticker on the {k} reads {v}.", "Quote what the sticker on the {k} reads.", ""),
    Fact("The lucky digits of {k}: {v}.", "Tell me the lucky digits of {k}.", "The lucky digits of {k} are",
         numeric=True),
    Fact("{k}: {v}", "Look up {k}.", "{k}:", ""),
    Fact("By the way, the PIN for {k} is {v}.", "I forgot the PIN for {k}. Can you look it up?",
         "The PIN for {k} is", numeric=True),
    Fact("Whoever calls about {k} should quote case {v}.", "Which case should callers quote when they ask about {k}?",
         "Callers should quote case"),
    Fact("The serial on the back of the {k} says {v}.", "Read me the serial from the back of the {k}.",
         "The serial says"),
    Fact("They keep {k} in room {v}.", "In which room do they keep {k}?", "{k} is kept in room"),
    Fact("Bus {v} stops near {k}.", "Which bus stops near {k}?", "The bus near {k} is", numeric=True),
    Fact("The budget of {k} came to {v} dollars.", "How many dollars did the budget of {k} come to?",
         "The budget of {k} came to", " dollars.", True),
    Fact("Exactly {v} people signed the petition for {k}.", "How many people signed the petition for {k}?",
         "The petition for {k} was signed by", " people.", True),
    Fact("The safe behind the {k} unlocks with {v}.", "How do I unlock the safe behind the {k}?", "Use"),
    Fact("Invoice {v} covers the repair of the {k}.", "Which invoice covers the repair of the {k}?",
         "The repair is covered by invoice"),
    Fact("When asked for a name, {k} answered {v}.", "What did {k} answer when asked for a name?", "{k} answered"),
    Fact("On the map, {k} is marked with {v}.", "How is {k} marked on the map?", "On the map {k} is marked with"),
    Fact("The library shelves {k} at {v}.", "Where does the library shelve {k}?", "The library shelves {k} at"),
    Fact("Flight {v} was delayed because of {k}.", "Which flight was delayed because of {k}?",
         "Because of {k} they delayed flight"),
    Fact("The old sign over {k} still shows {v}.", "What does the old sign over {k} still show?", "It still shows"),
    Fact("Our meter for {k} stood at {v} this morning.", "Where did our meter for {k} stand this morning?",
         "This morning it stood at", numeric=True),
    Fact("Send letters for {k} to box {v}.", "To which box do letters for {k} go?", "Letters for {k} go to box"),
    Fact("The recipe called {k} needs {v}.", "According to its recipe, what does {k} need?", "{k} needs"),
    Fact("In the catalogue, item {v} stands for {k}.", "Which catalogue item stands for {k}?", "{k} is item"),
    Fact("The distance to {k} was measured as {v} metres.", "How far away is {k}, in metres?",
         "The distance to {k} is", " metres.", True),
    Fact("Version {v} of {k} was released yesterday.", "Which version of {k} came out yesterday?",
         "Yesterday they released version"),
    Fact("She whispered that {k} means {v}.", "She whispered a meaning for {k}. Which?", "She said that {k} means"),
    Fact("The asteroid {k} is also listed as {v}.", "Under which other designation is the asteroid {k} listed?",
         "It is also listed as"),
    Fact("Team {k} finished with {v} points.", "With how many points did team {k} finish?", "Team {k} finished with",
         " points.", True),
    Fact("For {k}, dial {v}.", "Whom should I dial for {k}?", "For {k}, dial", numeric=True),
    Fact("The wifi at {k} uses the passphrase {v}.", "Which passphrase gets me onto the wifi at {k}?", "Use"),
    Fact("Container {v} holds the {k}.", "In which container will I find the {k}?", "The {k} is in container"),
    Fact("The archive number assigned to {k} was {v}.", "Under which archive number was {k} filed?",
         "{k} was filed under"),
    Fact("set {k} to {v}", "What has {k} been set to?", "{k} has been set to"),
    Fact('{{"name": "{k}", "value": "{v}"}}', 'Which value goes with the name "{k}"?', "The value is"),
    Fact("# {k} -> {v}", "Where does the arrow after {k} point?", "It points to"),
    Fact("| {k} | {v} |", "Read the table row of {k}: which entry is in its second column?", "The entry is"),
    Fact("The guard wrote down that {k} arrived with badge {v}.", "With which badge did {k} arrive?",
         "{k} arrived with badge"),
    Fact("A population of {v} was counted in {k}.", "How large a population was counted in {k}?",
         "In {k} they counted", numeric=True),
    Fact("The customer known as {k} has account {v}.", "Which account does the customer known as {k} have?",
         "The account of {k} is"),
)  # fmt: skip

SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions about the text you are given.",
    "Be brief and exact.",
    "You are a careful reader. Answer from the document alone.",
)
INTROS = (  # texts before the passage; the questions follow it
    "",
    "Document:\n\n",
    "Text:\n",
    "Read this document; questions about it come afterwards.\n\n",
    "Here is a text with a few details hidden in it. Keep them in mind.\n\n",
    "Please go through this carefully. Later I ask for some of its details.\n\n",
    "Below is a long passage. Answer the questions after it.\n\n",
    "I pasted my notes here. I need to look something up in them.\n\n",
    "Study what follows, then answer from it.\n\n",
    "This is the file we talked about:\n\n",
    "Context:\n",
    "Some of the lines below matter more than others. You will see why at the end.\n\n",
)
INTROS_ASKING = (  # texts before the passage that contain the first question
    "{question} The answer is somewhere in this text:\n\n",
    "Answer from the document: {question}\n\nDocument:\n",
    "While you read, look for this: {question}\n\n",
    "{question}\n\n",
)
CONTINUE = (
    "Continue this text:\n\n",
    "Please write what comes next.\n\n",
    "Here is the beginning of a document. Go on with it.\n\n",
    "Carry on from where this stops:\n\n",
    "Keep writing in the same style:\n\n",
    "What would the author write next?\n\n",
)
QUOTE = (  # instruction after the text, and beginning of the answer; the cue follows each
    ("Quote the passage above that begins with:", "Here is the passage:"),
    ("Repeat the part of the text that starts with the words", "The text says:"),
    ("Which words follow these?", "The passage reads:"),
    ("Copy the sentence that starts here:", "Copied:"),
    ("Find this place and go on quoting from there:", "From there it reads:"),
    ("Please recite, word for word, from:", "Certainly:"),
    ("How does the text go on after this?", "It goes:"),
)


KEY_SHAPES = (8, 4, 4, 3, 2, 1, 1, 1)  # weights of the shapes of make_key
NUMBER, CODE, WORDS = range(3)
VALUE_KINDS = (13, 4, 3)  # weights of the kinds of values
DIGITS = (3, 4, 5, 6, 6, 7, 7, 8)
LOOK_ALIKE = 0.4  # share of the groups of facts whose keys begin with the same word
BARE = 0.2  # share of the answers that are only a value
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


def make_key(shape: int, words: list[str], rng: random.Random, first: str | None = None) -> str:
    """Return a key of one of ``KEY_SHAPES``. ``first``: its first word, so that keys can look alike."""
    one, two, three = first or rng.choice(words), rng.choice(words), rng.choice(words)
    return (
        f"{one}-{two}",
        f"{one} {two}",
        f"{one.capitalize()} {two.capitalize()}",
        f"{one}_{two}",
        f"{one} {two} {three}",
        f"{one}-{rng.randint(100, 999)}",
        f"{one.capitalize()}{two.capitalize()}",
        f"{one[:2].upper()}{rng.randint(1000, 9999)}",
    )[shape]


def make_value(kind: int, digits: int, words: list[str], rng: random.Random) -> str:
    """Return a number with ``digits`` digits, a code with one digit less, or one or two words."""
    if kind == NUMBER:
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    if kind == CODE:
        letters = rng.choice(LETTERS) + rng.choice(LETTERS)
        return f"{letters}-{rng.randrange(10 ** (digits - 2), 10 ** (digits - 1))}"
    return " ".join(rng.sample(words, 1 + digits % 2))


def fill_alike(count: int, words: list[str], taken: set[str], rng: random.Random) -> list[Needle]:
    """Return ``count`` facts that differ only in key and value, so that only the key tells which one is asked for.

    No key is in ``taken``, to which the new keys are added.
    """
    fact, digits = rng.choice(FACTS), rng.choice(DIGITS)
    (shape,) = rng.choices(range(len(KEY_SHAPES)), KEY_SHAPES)
    (kind,) = rng.choices(range(len(VALUE_KINDS)), VALUE_KINDS)
    if fact.numeric:
        kind = NUMBER
    first = rng.choice(words) if rng.random() < LOOK_ALIKE else None
    needles = []
    for _ in range(count):
        key = make_key(shape, words, rng, first)
        while key in taken:
            key = make_key(shape, words, rng)
        taken.add(key)
        needles.append(fact.fill(key, make_value(kind, digits, words, rng), bare=rng.random() < BARE))
    return needles
