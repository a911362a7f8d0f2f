"""The text that the bundled models learn from: every document drawn from a seed, nothing downloaded.

Used by `train_tiny.py`, and good as text of known structure elsewhere. Six kinds of document:

    fact        countries, capitals and continents, in several phrasings (to be memorised)
    arithmetic  sums, differences and products of small numbers
    sequence    counting, letters, days, months
    list        lists of letters copied, turned round, sorted (what takes more than one layer of attention)
    story       template stories with real choice in them (so that the next token is often truly open)
    chat        short conversations about all of these, in the ChatML form of the models' chat template

Stories and chats never combine a hero, a place and a thing that `is_held_out` names, except when held-out
text is asked for: the validation loss is measured on combinations never seen in training.
"""

from __future__ import annotations

import csv
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random

from realm_jax.errors import RealmError

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_PROMPT = "You are a helpful assistant."
_HELD_OUT_SHARE = 16  # one combination of hero, place and thing in this many is held out


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    continent: str

    @property
    def title(self) -> str:
        """The name as a sentence begins with it."""
        return self.name[0].upper() + self.name[1:]


def _read_countries() -> tuple[Country, ...]:
    with Path(__file__).with_name("tiny_countries.csv").open(encoding="utf-8", newline="") as file:
        return tuple(Country(row["country"], row["capital"], row["continent"]) for row in csv.DictReader(file))


COUNTRIES = _read_countries()


def documents(kind: str, count: int, seed: int, *, held_out: bool = False) -> list[str]:
    """`count` documents of one kind; equal arguments give equal text on every machine.

    Raises RealmError for an unknown kind.
    """
    if kind not in _WRITERS:
        raise RealmError(f"unknown kind of document {kind!r}; known kinds: {', '.join(KINDS)}")
    rng = Random(f"{kind} {seed} {'held out' if held_out else 'train'}")
    return [_WRITERS[kind](rng, held_out) for _ in range(count)]


def is_held_out(hero: str, place: str, thing: str) -> bool:
    """Whether stories with this combination belong to the held-out text alone."""
    return zlib.crc32(f"{hero}|{place}|{thing}".encode()) % _HELD_OUT_SHARE == 0


# --- facts ---------------------------------------------------------------------------------------------------

_FACT_FORMS = (
    "The capital of {c.name} is {c.capital}.",
    "The capital of {c.name} is {c.capital}.",
    "{c.capital} is the capital of {c.name}.",
    "The capital city of {c.name} is called {c.capital}.",
    "{c.title} is a country in {c.continent}. Its capital is {c.capital}.",
    "{c.capital} lies in {c.name}.",
    "Question: What is the capital of {c.name}? Answer: {c.capital}.",
    "Question: Which country has {c.capital} as its capital? Answer: {c.title}.",
    "Question: On which continent is {c.name}? Answer: {c.continent}.",
)


def _fact(rng: Random, held_out: bool) -> str:
    form = rng.choice((None, *_FACT_FORMS))  # a document keeps to one form, or mixes them all
    countries = rng.sample(COUNTRIES, rng.randint(2, 10))
    joint = rng.choice((" ", "\n"))
    return joint.join((form or rng.choice(_FACT_FORMS)).format(c=country) for country in countries)


# --- numbers and sequences -----------------------------------------------------------------------------------

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("January", "February", "March", "April", "May", "June")
_MONTHS += ("July", "August", "September", "October", "November", "December")
_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def equation(rng: Random) -> tuple[int, str, str, int, int]:
    """(left, sign, the sign in words, right, result); sums stay under 100, differences at or above 0."""
    sign = rng.choice("++--*")
    if sign == "*":
        left, right = rng.randint(0, 10), rng.randint(0, 10)
        return left, sign, "times", right, left * right
    total = rng.randint(0, rng.choice((20, 99)))
    part = rng.randint(0, total)
    return (part, "+", "plus", total - part, total) if sign == "+" else (total, "-", "minus", part, total - part)


def _arithmetic(rng: Random, held_out: bool) -> str:
    spoken, joint = rng.random() < 0.3, rng.choice((" ", "\n"))
    sentences = []
    for _ in range(rng.randint(4, 12)):
        left, sign, word, right, result = equation(rng)
        sentences.append(f"{left} {word} {right} is {result}." if spoken else f"{left} {sign} {right} = {result}")
    return (joint if spoken else "\n").join(sentences)


def _sequence(rng: Random, held_out: bool) -> str:
    if rng.random() < 0.6:
        step = rng.choice((1, 1, 1, 2, 5, 10))
        start = rng.choice((0, step, step * rng.randint(0, 20)))
        numbers = range(start, start + step * rng.randint(5, 15), step)
        return ", ".join(map(str, reversed(numbers) if rng.random() < 0.25 else numbers)) + "."
    cycle = rng.choice((_DAYS, _MONTHS, _LETTERS))
    start = rng.randrange(len(cycle))
    return ", ".join(cycle[(start + i) % len(cycle)] for i in range(rng.randint(5, 12))) + "."


def list_task(rng: Random) -> tuple[str, str]:
    """A list of letters with what to do with it, and the list that comes of that."""
    items = rng.sample(_LETTERS, rng.randint(3, 8))
    name, result = rng.choice((("Copy", items), ("Backwards", items[::-1]), ("Sorted", sorted(items))))
    return f"{name}: {' '.join(items)} ->", " ".join(result)


def _list(rng: Random, held_out: bool) -> str:
    return "\n".join(" ".join(list_task(rng)) for _ in range(rng.randint(2, 8)))


# --- stories -------------------------------------------------------------------------------------------------

_HEROES = {
    "she": ("Anna", "Mia", "Lucy", "Emma", "Nora", "Clara", "Ida", "Rosa", "Zoe", "Lily", "Sara", "Maya"),
    "he": ("Tom", "Ben", "Max", "Leo", "Sam", "Jack", "Oscar", "Felix", "Paul", "Noah", "Finn", "Omar"),
}
_HEROES_PRONOUN = {name: pronoun for pronoun, names in _HEROES.items() for name in names}
_POSSESSIVE = {"she": "her", "he": "his"}
_OBJECTIVE = {"she": "her", "he": "him"}
_ANIMALS = ("fox", "cat", "dog", "rabbit", "bear", "mouse", "bird", "horse", "frog", "duck", "goat", "turtle")
_NATURES = ("little", "old", "friendly", "shy", "clever", "hungry", "brave", "sleepy", "funny", "quiet")
_PLACES = (
    "in the forest", "by the river", "near the old mill", "on the beach", "in the garden", "at the market",
    "behind the school", "on the hill", "in the small village", "under the big tree", "at the lake", "in the barn",
    "by the bridge", "in the kitchen", "at the harbour", "in the park",
)  # fmt: skip
_THINGS = (
    "ball", "kite", "lantern", "key", "book", "map", "hat", "drum", "boat", "coin", "box", "bell", "letter", "shell",
    "basket", "scarf", "whistle", "clock", "ring", "stone",
)  # fmt: skip
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "golden", "silver", "brown", "purple")
_WEATHER = (
    "The sun was shining", "It was raining", "The wind was blowing", "It was snowing", "The sky was grey",
    "The air was warm", "It was very cold", "There was fog everywhere", "The moon was bright",
)  # fmt: skip
_FOODS = ("bread", "soup", "apples", "cake", "cheese", "honey", "berries", "pancakes", "nuts", "cookies")
_FEELINGS = ("happy", "proud", "tired", "surprised", "excited", "calm", "thankful", "curious")
_OPENINGS = ("One day", "One morning", "One evening", "Once upon a time", "Last summer", "A long time ago", "Yesterday")


@dataclass(frozen=True)
class _Scene:
    """Who and what one story is about; every template may use these fields."""

    hero: str
    place: str
    colour: str
    thing: str
    animal: str
    nature: str
    friend: str
    food: str
    feeling: str
    weather: str
    opening: str

    @property
    def she(self) -> str:
        return _HEROES_PRONOUN[self.hero]

    @property
    def She(self) -> str:
        return self.she.capitalize()

    @property
    def her(self) -> str:
        return _POSSESSIVE[self.she]

    @property
    def to_her(self) -> str:
        return _OBJECTIVE[self.she]

    @property
    def a_animal(self) -> str:
        return f"an {self.nature} {self.animal}" if self.nature[0] in "aeiou" else f"a {self.nature} {self.animal}"


_BEGINNINGS = (
    "{s.opening}, {s.hero} was {s.place}. {s.weather}.",
    "{s.opening}, {s.hero} and {s.friend} were playing {s.place}.",
    "{s.weather} when {s.hero} woke up. {s.She} wanted to go out and play {s.place}.",
    "{s.opening}, there lived {s.a_animal} {s.place}. {s.hero} was its best friend.",
    "{s.hero} liked to sit {s.place} and eat {s.food}. {s.weather}.",
)
_PLOTS = (
    (
        "{s.She} had a {s.colour} {s.thing}, but it was gone.",
        "{s.hero} looked for the {s.colour} {s.thing} all day.",
        "Then {s.a_animal} came by and asked what was wrong. \"I have lost my {s.thing},\" said {s.hero}.",
        "The {s.animal} found the {s.thing} {s.place} and gave it back to {s.to_her}.",
    ),
    (
        "There {s.she} found a {s.colour} {s.thing}.",
        "\"Whose {s.thing} is this?\" asked {s.hero}. Nobody knew.",
        "{s.She} showed the {s.thing} to {s.friend}, and {s.friend} said, \"It belongs to the {s.animal}!\"",
        "So {s.hero} took the {s.colour} {s.thing} back to the {s.nature} {s.animal}.",
    ),
    (
        "{s.She} met {s.a_animal}. The {s.animal} was hungry.",
        "{s.hero} gave the {s.animal} some {s.food}.",
        "\"Thank you,\" said the {s.animal}. \"Take this {s.colour} {s.thing} as a gift.\"",
        "{s.hero} put the {s.thing} in {s.her} bag and ran home.",
    ),
    (
        "It was {s.friend}'s birthday, and {s.hero} had no gift yet.",
        "{s.She} went to the market to buy a {s.colour} {s.thing}, but it cost too much.",
        "So {s.she} made {s.food} together with {s.a_animal}.",
        "{s.friend} liked the {s.food} more than any {s.thing}.",
    ),
    (
        "{s.friend} had built a {s.colour} {s.thing}, and {s.hero} wanted to try it.",
        "But the {s.thing} broke, and {s.friend} was sad.",
        "{s.hero} said sorry and asked {s.a_animal} for help.",
        "Together they mended the {s.thing}, and it was as good as new.",
    ),
)  # fmt: skip
_EXTRAS = (
    "The {s.animal} laughed.",
    "{s.friend} came too.",
    "They shared some {s.food}.",
    "{s.weather} the whole time.",
    "\"How {s.nature} you are!\" said {s.friend}.",
    "{s.hero} was a bit afraid.",
)  # fmt: skip
_ENDINGS = (
    "In the end, {s.hero} was very {s.feeling}.",
    "{s.hero} and the {s.animal} became good friends.",
    "That night {s.hero} slept well and dreamed of the {s.colour} {s.thing}.",
    "\"What a day!\" said {s.hero}, and {s.she} went home to eat {s.food}.",
    "{s.hero} never forgot the {s.nature} {s.animal}.",
    "From then on, {s.hero} and {s.friend} went there every day.",
)  # fmt: skip


def _scene(rng: Random, held_out: bool) -> _Scene:
    while True:
        hero, friend = rng.sample(sorted(_HEROES_PRONOUN), 2)
        place, thing = rng.choice(_PLACES), rng.choice(_THINGS)
        if is_held_out(hero, place, thing) == held_out:
            break
    return _Scene(
        hero=hero,
        place=place,
        colour=rng.choice(_COLOURS),
        thing=thing,
        animal=rng.choice(_ANIMALS),
        nature=rng.choice(_NATURES),
        friend=friend,
        food=rng.choice(_FOODS),
        feeling=rng.choice(_FEELINGS),
        weather=rng.choice(_WEATHER),
        opening=rng.choice(_OPENINGS),
    )


def _tell(rng: Random, scene: _Scene) -> str:
    """A beginning, one plot with up to two extra sentences anywhere in it, and an ending."""
    middle = list(rng.choice(_PLOTS))
    for extra in rng.sample(_EXTRAS, rng.randint(0, 2)):
        middle.insert(rng.randint(1, len(middle)), extra)
    sentences = (rng.choice(_BEGINNINGS), *middle, rng.choice(_ENDINGS))
    return " ".join(sentence.format(s=scene) for sentence in sentences)


def _story(rng: Random, held_out: bool) -> str:
    return _tell(rng, _scene(rng, held_out))


# --- conversations -------------------------------------------------------------------------------------------

_SMALL_TALK = (
    (("Hello!", "Hi!", "Hello, who are you?", "Who are you?"), ("Hello! I am a tiny language model.",)),
    (("How are you?", "How are you today?"), ("I am fine, thank you.", "Very well, thank you.")),
    (("Thank you.", "Thanks!", "Thank you very much."), ("You are welcome.",)),
    (
        ("What can you do?", "How can you help me?"),
        ("I know capitals, I can count and add small numbers, and I tell stories.",),
    ),
)


def _exchange(rng: Random, held_out: bool) -> tuple[str, str]:
    """One question and its answer."""
    topic = rng.choice(("capital", "capital", "capital", "country", "number", "number", "count", "story", "talk"))
    if topic in ("capital", "country"):
        country = rng.choice(COUNTRIES)
        if topic == "country":
            return f"{country.capital} is the capital of which country?", f"{country.capital} is in {country.name}."
        form = rng.choice(("What is the capital of {}?", "Tell me the capital of {}.", "capital of {}?"))
        return form.format(country.name), f"The capital of {country.name} is {country.capital}."
    if topic == "number":
        left, sign, word, right, result = equation(rng)
        spoken = rng.random() < 0.5
        return f"What is {left} {word if spoken else sign} {right}?", f"{left} {sign} {right} = {result}"
    if topic == "count":
        start = rng.randint(0, 50)
        stop = start + rng.randint(3, 10)
        return f"Count from {start} to {stop}.", ", ".join(map(str, range(start, stop + 1))) + "."
    if topic == "story":
        scene = _scene(rng, held_out)
        return f"Tell me a story about {scene.hero} and a {scene.thing}.", _tell(rng, scene)
    questions, answers = rng.choice(_SMALL_TALK)
    return rng.choice(questions), rng.choice(answers)


def _chat(rng: Random, held_out: bool) -> str:
    turns = [("system", SYSTEM_PROMPT)] if rng.random() < 0.2 else []
    for _ in range(rng.randint(1, 4)):
        question, answer = _exchange(rng, held_out)
        turns += [("user", question), ("assistant", answer)]
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


_WRITERS = {
    "fact": _fact,
    "arithmetic": _arithmetic,
    "sequence": _sequence,
    "list": _list,
    "story": _story,
    "chat": _chat,
}
KINDS = tuple(_WRITERS)
