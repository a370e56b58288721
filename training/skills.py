"""The skills of the demo models: each function draws one exercise from a seeded generator.

A skill returns an `Exercise`: a few turns of chat that end with the assistant's answer. Whether an exercise belongs
to the training text or to the held-out test is decided by a hash of its `keys`, the combinations of values that fix
its answers, so a held-out question can only be answered by rule, never from memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from random import Random

from world import (
    ANIMALS, COLOURS, DAYS, ENDINGS, FEELINGS, FOODS, HOBBIES, JOBS, KINDS, MONTHS, MONTH_DAYS, NAMES, NUMBER_WORDS,
    OBJECTS, PLACES, SIZES, SYLLABLES, TIMES, TOWNS, WEATHER, WORDS, article, plural,
)


@dataclass
class Exercise:
    """One exercise.

    messages: OpenAI-style turns, the last one the assistant's; a turn may carry `think` (worked steps before the
      answer) and `tool_calls`. keys: what decides the split. answer: what the last turn must say. match: how an
      evaluation compares ("exact", "json", "tool" or "contains", the last with a list of words that must occur).
    thinking: True where the last turn thinks first, False where the prompt must close the thinking at once, None
      where the model answers plainly by default. tools: the functions offered, OpenAI-style.
    """

    skill: str
    messages: list[dict]
    keys: list[tuple]
    match: str = "exact"
    thinking: bool | None = None
    tools: list[dict] | None = None
    words: list[str] = field(default_factory=list)
    system: str | None = None

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def held_out(key: tuple) -> bool:
    """Whether the combination belongs to the test: one in ten does, by a hash that no seed changes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, think: str | None = None) -> dict:
    turn = {"role": "assistant", "content": text}
    if think is not None:
        turn["think"] = think
    return turn


def name(r: Random) -> str:
    """A name: mostly one of the world's, sometimes one that is put together from syllables."""
    if r.random() < 0.7:
        return r.choice(NAMES)
    return ("".join(r.choice(SYLLABLES) for _ in range(r.choice([2, 2, 3]))) + r.choice(ENDINGS)).capitalize()


def names(r: Random, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        candidate = name(r)
        if candidate not in found:
            found.append(candidate)
    return found


def casual(r: Random, text: str) -> str:
    """The same request as people may type it: now and then without the capital or the last stop."""
    chance = r.random()
    if chance < 0.08:
        text = text[0].lower() + text[1:]
    if chance < 0.14 and text[-1] in ".?":
        text = text[:-1]
    return text


# ---------------------------------------------------------------------------------------------------- arithmetic

def add_steps(a: int, b: int) -> str:
    """Column addition, from the ones upwards, one line per column. Every column shows what is carried into it."""
    lines, carry, shift = [], 0, 1
    while shift <= max(a, b):
        x, y = a // shift % 10, b // shift % 10
        total = x + y + carry
        tail = f" + {carry}" if shift > 1 else ""
        more = f", carry {total // 10}" if shift * 10 <= max(a, b) else ""
        lines.append(f"{x} + {y}{tail} = {total}{more}.")
        carry, shift = total // 10, shift * 10
    return "\n".join(lines) or "0 + 0 = 0."


def subtract_steps(a: int, b: int) -> str:
    """Column subtraction; ten is added to a column that needs it, and every next one shows what was borrowed."""
    lines, borrow, shift = [], 0, 1
    while shift <= a:
        x, y = a // shift % 10, b // shift % 10
        tail = f" - {borrow}" if shift > 1 else ""
        borrowed = int(x - y - borrow < 0)
        more = f", borrow {borrowed}" if shift * 10 <= a else ""
        lines.append(f"{x + 10 * borrowed} - {y}{tail} = {x + 10 * borrowed - y - borrow}{more}.")
        borrow, shift = borrowed, shift * 10
    return "\n".join(lines) or "0 - 0 = 0."


def multiply_steps(a: int, b: int) -> str:
    tens, ones = a // 10 * 10, a % 10
    return f"{tens} x {b} = {tens * b}. {ones} x {b} = {ones * b}.\n" + add_steps(tens * b, ones * b)


def numbers(r: Random) -> tuple[int, int]:
    chance = r.random()
    if chance < 0.15:
        return r.randint(0, 9), r.randint(0, 9)
    if chance < 0.85:
        return r.randint(10, 99), r.randint(10, 99)
    return r.randint(10, 99), r.randint(1, 9)


def addition(r: Random) -> Exercise:
    a, b = numbers(r)
    text = r.choice([
        "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "Please add {a} and {b}.",
        "Calculate {a} + {b}.", "How much is {a} + {b}?", "What is the sum of {a} and {b}?", "{a}+{b}",
        "Can you work out {a} + {b}?", "Tell me {a} plus {b}.",
    ]).format(a=a, b=b)
    thinking = r.random() < 0.8
    return Exercise("addition", [user(casual(r, text)), assistant(
        f"{a} + {b} = {a + b}", add_steps(a, b) if thinking else None)], [("+", *sorted((a, b)))], thinking=thinking)


def subtraction(r: Random) -> Exercise:
    a, b = sorted(numbers(r), reverse=True)
    text = r.choice([
        "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b} = ?", "Subtract {b} from {a}.", "Take {b} from {a}.",
        "Calculate {a} - {b}.", "How much is {a} - {b}?", "{a}-{b}", "Can you work out {a} - {b}?",
        "What is the difference of {a} and {b}?",
    ]).format(a=a, b=b)
    thinking = r.random() < 0.8
    return Exercise("subtraction", [user(casual(r, text)), assistant(
        f"{a} - {b} = {a - b}", subtract_steps(a, b) if thinking else None)], [("-", a, b)], thinking=thinking)


def multiplication(r: Random) -> Exercise:
    small = r.random() < 0.4
    a, b = (r.randint(2, 10), r.randint(2, 10)) if small else (r.randint(11, 29), r.randint(2, 6))
    text = r.choice([
        "What is {a} x {b}?", "What is {a} times {b}?", "{a} x {b} = ?", "Multiply {a} by {b}.", "Calculate {a} x {b}.",
        "How much is {a} times {b}?", "What is the product of {a} and {b}?", "{a} * {b}",
    ]).format(a=a, b=b)
    thinking = r.random() < 0.5 if small else True
    think = f"From the table: {a} x {b} = {a * b}." if small else multiply_steps(a, b)
    # A small product has no rule to be worked out by, so those are held out by wording alone.
    key = ("x", a, b, text[:6]) if small else ("x", a, b)
    return Exercise("multiplication", [user(casual(r, text)), assistant(
        f"{a} x {b} = {a * b}", think if thinking else None)], [key], thinking=thinking)


def word_problem(r: Random) -> Exercise:
    first, second = names(r, 2)
    thing = plural(r.choice(OBJECTS))
    plus = r.random() < 0.5
    a, b = (r.randint(2, 60), r.randint(2, 39)) if plus else sorted((r.randint(2, 60), r.randint(2, 60)), reverse=True)
    if plus:
        text = r.choice([
            "{p} has {a} {t}. {q} gives {p} {b} more {t}. How many {t} does {p} have now?",
            "{p} has {a} {t} and buys {b} more. How many {t} does {p} have now?",
            "There are {a} {t} on the table. {p} puts {b} more {t} there. How many {t} are on the table now?",
            "{p} has {a} {t} and {q} has {b} {t}. How many {t} do they have together?",
            "{p} found {a} {t} in the morning and {b} {t} in the evening. How many {t} did {p} find?",
        ])
        think, total = add_steps(a, b), a + b
    else:
        text = r.choice([
            "{p} has {a} {t}. {p} gives {b} {t} to {q}. How many {t} does {p} have now?",
            "{p} had {a} {t} and lost {b} of them. How many {t} does {p} have now?",
            "There are {a} {t} in a box. {p} takes {b} of them. How many {t} are left in the box?",
            "{p} has {a} {t} and sells {b}. How many {t} are left?",
            "{p} has {a} {t} and {q} has {b} {t}. How many more {t} does {p} have?",
        ])
        think, total = subtract_steps(a, b), a - b
    thinking = r.random() < 0.8
    return Exercise("word_problem", [user(text.format(p=first, q=second, a=a, b=b, t=thing)), assistant(
        f"{total} {thing}.", think if thinking else None)], [("word", plus, a, b)], thinking=thinking)


def comparison(r: Random) -> Exercise:
    a, b = r.randint(0, 99), r.randint(0, 99)
    while a == b:
        b = r.randint(0, 99)
    key = [("compare", *sorted((a, b)))]
    form = r.randrange(4)
    if form == 0:
        text, answer = r.choice(["Which is bigger, {a} or {b}?", "Which number is larger: {a} or {b}?"]), str(max(a, b))
    elif form == 1:
        text, answer = r.choice(["Which is smaller, {a} or {b}?", "Which number is less: {a} or {b}?"]), str(min(a, b))
    elif form == 2:
        text, answer = r.choice(["Is {a} bigger than {b}?", "Is {a} greater than {b}?"]), "Yes." if a > b else "No."
    else:
        text, answer = r.choice(["Is {a} smaller than {b}?", "Is {a} less than {b}?"]), "Yes." if a < b else "No."
    return Exercise("comparison", [user(casual(r, text.format(a=a, b=b))), assistant(answer)], key)


# ---------------------------------------------------------------------------------------------------- lists

def random_word(r: Random) -> str:
    chance = r.random()
    if chance < 0.70:
        return r.choice(WORDS)
    if chance < 0.85:
        return name(r)
    return str(r.randint(0, 999))


def distinct(r: Random, draw, count: int) -> list:
    found: list = []
    while len(found) < count:
        candidate = draw(r)
        if candidate not in found:
            found.append(candidate)
    return found


def list_task(r: Random, task: str, longest: int = 8) -> Exercise:
    count = r.randint(3, longest)
    if task in ("sort_numbers", "extreme"):
        items = [str(value) for value in distinct(r, lambda r: r.randint(0, 99), min(count, 7))]
    elif task == "sort":
        items = distinct(r, lambda r: r.choice(WORDS), min(count, 6))
    else:
        draw = r.choice([random_word, random_word, lambda r: r.choice(WORDS), lambda r: str(r.randint(0, 99)), name])
        items = distinct(r, draw, count)
    shown = ", ".join(items)
    which = ["first", "second", "third", "fourth", "fifth", "sixth"]
    if task == "copy":
        text = r.choice(["Repeat this list: {s}", "Copy this list: {s}", "Say this again: {s}", "Repeat after me: {s}",
                         "Write the same list again: {s}", "Please copy: {s}", "Here is a list: {s}\nRepeat it."])
        answer = shown
    elif task == "reverse":
        text = r.choice(["Reverse this list: {s}", "Write this list backwards: {s}", "Put this list in reverse order: {s}",
                         "Here is a list: {s}\nReverse it.", "Turn this list around: {s}"])
        answer = ", ".join(reversed(items))
    elif task == "sort":
        text = r.choice(["Sort this list by the alphabet: {s}", "Put these words in alphabetical order: {s}",
                         "Sort these words from A to Z: {s}", "Sort alphabetically: {s}"])
        answer = ", ".join(sorted(items))
    elif task == "sort_numbers":
        descending = r.random() < 0.35
        text = r.choice(["Sort these numbers from {f} to {l}: {s}", "Put these numbers in order from {f} to {l}: {s}",
                         "Order these numbers from {f} to {l}: {s}"] if descending else
                        ["Sort these numbers: {s}", "Put these numbers in order: {s}", "Sort from small to large: {s}",
                         "Sort these numbers from smallest to largest: {s}"])
        text = text.replace("{f}", "largest").replace("{l}", "smallest")
        answer = ", ".join(sorted(items, key=int, reverse=descending))
    elif task == "extreme":
        biggest = r.random() < 0.5
        text = (r.choice(["Which of these numbers is the largest: {s}?", "What is the biggest number here: {s}?"])
                if biggest else
                r.choice(["Which of these numbers is the smallest: {s}?", "What is the smallest number here: {s}?"]))
        answer = str((max if biggest else min)(int(item) for item in items))
    elif task == "pick":
        place = r.randrange(min(len(items), 6)) if r.random() < 0.8 else -1
        word = which[place] if place >= 0 else "last"
        text = r.choice(["What is the {w} item of this list: {s}?", "Here is a list: {s}\nWhich item is {w}?",
                         "Name the {w} word: {s}", "Tell me the {w} of these: {s}"]).replace("{w}", word)
        answer = items[place]
    elif task == "count":
        text = r.choice(["How many items are in this list: {s}?", "Count the words: {s}", "How many words are here: {s}?"])
        answer = str(len(items))
    else:  # member
        present = r.random() < 0.5
        other = r.choice(items) if present else random_word(r)
        present = other in items
        text = r.choice(["Is {o} in this list: {s}?", "Does this list have {o} in it: {s}?",
                         "Here is a list: {s}\nIs {o} in it?"]).replace("{o}", other)
        answer = "Yes." if present else "No."
    return Exercise("list_" + task, [user(text.replace("{s}", shown)), assistant(answer)], [(task, shown)])


# ---------------------------------------------------------------------------------------------------- stories

class Fact:
    """One fact of a story: sentences that state it, and questions with the answer that follows."""

    def __init__(self, key: tuple, sentences: list[str], questions: list[tuple[str, str]], claim: str, value: str,
                 others: list[str], place: str = ""):
        self.key, self.sentences, self.questions = key, sentences, questions
        self.claim, self.value, self.others = claim, value, others


def person_facts(r: Random, p: str) -> list[Fact]:
    """Some facts about the person, in a random order, each with its own ways of saying and asking."""
    town, job, food, hobby = r.choice(TOWNS), r.choice(JOBS), r.choice(FOODS), r.choice(HOBBIES)
    animal, colour, thing, place = r.choice(list(ANIMALS)), r.choice(COLOURS), r.choice(OBJECTS), r.choice(PLACES)
    colour2, pet, day, spot = r.choice(COLOURS), name(r), r.choice(DAYS), r.choice(PLACES)
    age, size, feeling = r.randint(4, 90), r.choice(SIZES), r.choice(FEELINGS)
    while pet == p:
        pet = name(r)
    facts = [
        Fact(("lives", p, town), [f"{p} lives in {town}.", f"The home of {p} is in {town}.", f"{p} has a house in {town}."],
             [(f"Where does {p} live?", f"{p} lives in {town}."), (f"In which town does {p} live?", f"{p} lives in {town}.")],
             f"{p} live in {{}}", town, TOWNS),
        Fact(("job", p, job), [f"{p} is {article(job)}.", f"{p} works as {article(job)}."],
             [(f"What is the job of {p}?", f"{p} is {article(job)}."), (f"What does {p} work as?", f"{p} is {article(job)}.")],
             f"{p} work as {{a}}", job, JOBS),
        Fact(("food", p, food), [f"{p} likes to eat {food}.", f"{p} loves {food}.", f"The favourite food of {p} is {food}."],
             [(f"What does {p} like to eat?", f"{p} likes {food}."), (f"What is the favourite food of {p}?", f"{p} likes {food}.")],
             f"{p} like {{}}", food, FOODS),
        Fact(("hobby", p, hobby), [f"{p} enjoys {hobby}.", f"In the evening {p} enjoys {hobby}.", f"{p} is good at {hobby}."],
             [(f"What is the hobby of {p}?", f"{p} enjoys {hobby}."), (f"What does {p} enjoy?", f"{p} enjoys {hobby}.")],
             f"{p} enjoy {{}}", hobby, HOBBIES),
        Fact(("pet", p, animal, pet), [f"{p} has {article(colour)} {animal} called {pet}.",
                                       f"{p} owns {article(colour)} {animal}. Its name is {pet}."],
             [(f"What animal does {p} have?", f"{p} has {article(animal)}."),
              (f"What is the name of the {animal}?", f"The {animal} is called {pet}."),
              (f"What colour is the {animal}?", f"The {animal} is {colour}."),
              (f"Who has {article(animal)}?", f"{p} has {article(animal)}.")],
             f"{p} have {{a}}", animal, list(ANIMALS)),
        Fact(("thing", p, thing, place, colour2),
             [f"{p} has {article(colour2)} {thing} and keeps it in the {place}.",
              f"{p} put {article(colour2)} {thing} in the {place}.",
              f"In the {place}, {p} found {article(colour2)} {thing}."],
             [(f"Where is the {thing}?", f"The {thing} is in the {place}."),
              (f"What colour is the {thing}?", f"The {thing} is {colour2}."),
              (f"Which thing is in the {place}?", f"The {thing} is in the {place}.")],
             f"{p} have {{a}}", thing, OBJECTS),
        Fact(("went", p, spot, day), [f"On {day} {p} went to the {spot}.", f"{p} walked to the {spot} on {day}.",
                                      f"{p} goes to the {spot} every {day}."],
             [(f"When did {p} go to the {spot}?", f"On {day}."), (f"Where did {p} go on {day}?", f"To the {spot}."),
              (f"Who went to the {spot}?", f"{p} did.")],
             f"{p} go to the {{}}", spot, PLACES),
        Fact(("age", p, age), [f"{p} is {age} years old.", f"{p} is now {age} years old."],
             [(f"How old is {p}?", f"{p} is {age} years old."), (f"What is the age of {p}?", f"{p} is {age} years old.")],
             "", str(age), []),
        Fact(("feels", p, feeling), [f"{p} is {feeling} today.", f"Today {p} feels {feeling}."],
             [(f"How does {p} feel?", f"{p} feels {feeling}."), (f"How is {p} today?", f"{p} feels {feeling}.")],
             f"{p} feel {{}}", feeling, FEELINGS),
    ]
    r.shuffle(facts)
    return facts


def world_story(r: Random, people: int, per_person: int) -> tuple[str, list[Fact]]:
    """A story of facts in random order, in which no object, animal or place is named twice."""
    facts: list[Fact] = []
    used: set[str] = set()
    for p in names(r, people):
        count = 0
        for fact in person_facts(r, p):
            parts = {str(part) for part in fact.key[2:]}
            if count == per_person or parts & used:
                continue
            used |= parts
            facts.append(fact)
            count += 1
    if r.random() < 0.5:
        r.shuffle(facts)
    opening = r.choice(["", "", "", f"It is {article(r.choice(WEATHER))} day. ", "Here is a story. ", "This is what we know. "])
    return opening + " ".join(r.choice(fact.sentences) for fact in facts), facts


STORY_FRAMES = ["{s}\n{q}", "{s}\n\n{q}", "Story: {s}\nQuestion: {q}", "Read this: {s}\n{q}", "{s} {q}",
                "Read the story and answer.\n{s}\n{q}"]


def story(r: Random, people: int | None = None, per_person: int | None = None) -> Exercise:
    """A story and one to four questions about it, over as many turns."""
    text, facts = world_story(r, people or r.choice([1, 2, 2, 3]), per_person or r.randint(2, 3))
    turns, keys = [], []
    for index, fact in enumerate(r.sample(facts, min(len(facts), r.choice([1, 2, 3, 4])))):
        chance = r.random()
        if chance < 0.2 and fact.claim:
            true = r.random() < 0.5
            value = fact.value if true else r.choice([other for other in fact.others if other != fact.value])
            question = "Does " + fact.claim.format(value, a=article(value)) + "?"
            answer = "Yes." if true else "No."
        else:
            question, answer = r.choice(fact.questions)
        turns += [user(r.choice(STORY_FRAMES).format(s=text, q=question) if index == 0 else question), assistant(answer)]
        keys.append(fact.key)
    return Exercise("story", turns, keys)


def unknown(r: Random) -> Exercise:
    """A question that the story does not answer."""
    text, facts = world_story(r, r.choice([1, 2]), 2)
    stranger = name(r)
    while stranger in text:
        stranger = name(r)
    question = r.choice(["Where does {p} live?", "What is the job of {p}?", "What does {p} like to eat?", "How old is {p}?",
                         "What does {p} enjoy?", "How does {p} feel?"]).format(p=stranger)
    return Exercise("unknown", [user(r.choice(STORY_FRAMES).format(s=text, q=question)), assistant(
        "The story does not say.")], [("unknown", stranger, facts[0].key)])


def tell_story(r: Random) -> Exercise:
    """A request for a story with given words, and a short story that holds them."""
    p, friend = names(r, 2)
    animal, thing, place, place2 = r.choice(list(ANIMALS)), r.choice(OBJECTS), *r.sample(PLACES, 2)
    colour, day, food = r.choice(COLOURS), r.choice(DAYS), r.choice(FOODS)
    size, weather, feeling = r.choice(SIZES), r.choice(WEATHER), r.choice(FEELINGS)
    sound = ANIMALS[animal][0]
    a_size, a_colour, a_animal = article(size), article(colour), article(animal)
    start = r.choice([
        f"Once upon a time there was {a_animal} called {p}. {p} lived near the {place}.",
        f"{p} was {a_size} {animal} who lived by the {place}.",
        f"There once was {a_size} {animal}. Its name was {p}, and its home was the {place}.",
    ])
    find = r.choice([
        f"One {weather} {day}, {p} found {a_colour} {thing} near the {place2}.",
        f"On {day}, {p} went to the {place2} and found {a_colour} {thing}.",
        f"On a {weather} day, {p} saw {a_colour} {thing} in the {place2}.",
    ])
    middle = r.choice([
        f"\"Whose {thing} is this?\" asked {p}. \"It is mine,\" said {friend}, \"and I have looked for it everywhere.\"",
        f"{p} took the {thing} home and showed it to {friend}. \"How pretty!\" said {friend}.",
        f"The {thing} was lost, so {p} asked everyone about it. At last {friend} said, \"That {thing} is mine!\"",
        f"\"I will give it to {friend},\" thought {p}, and off it went to the {place}.",
    ])
    end = r.choice([
        f"{friend} was {feeling} and gave {p} some {food}. From that day on they were friends.",
        f"They shared some {food} and watched the sun go down. {p} was very {r.choice(['happy', 'proud', 'calm'])}.",
        f"Then they ate {food} together, and {p} slept well that night.",
        f"So they became friends, and every {day} they met at the {place2} to eat {food}.",
    ])
    text, words = r.choice([
        (f"Tell me a story about {a_animal}.", [animal]),
        (f"Write a short story about {a_animal} and {article(thing)}.", [animal, thing]),
        (f"Tell me a story about {a_animal} called {p}.", [animal, p]),
        (f"Write a story about {a_animal} that finds {a_colour} {thing}.", [animal, colour, thing]),
        (f"Please tell a short story with {a_animal}, {article(thing)} and {article(place2)}.", [animal, thing, place2]),
        (f"I would like a story about {p} the {animal}.", [p, animal]),
        (f"Make up a story about {a_animal} and some {food}.", [animal, food]),
    ])
    return Exercise("tell_story", [user(casual(r, text)), assistant(" ".join([start, find, middle, end]))],
                    [("tell", animal, thing)], match="contains", words=words)


def summary_list(r: Random, most: int = 6) -> Exercise:
    """A table-like list in the prompt (who has what) and questions about it over several turns."""
    people = names(r, r.randint(3, most))
    relation, values = r.choice([("has", OBJECTS), ("likes", FOODS), ("lives in", TOWNS), ("is", JOBS), ("enjoys", HOBBIES)])
    people = people[: len(values)]
    chosen = r.sample(values, len(people))
    rows = r.choice([": ", " - ", " = "]).join
    lines = "\n".join(rows([p, v]) for p, v in zip(people, chosen))
    header = {"has": "thing", "likes": "food", "lives in": "town", "is": "job", "enjoys": "hobby"}[relation]
    turns, keys = [], []
    for index, at in enumerate(r.sample(range(len(people)), r.choice([1, 2, 3] if most < 10 else [2, 3, 4]))):
        p, v = people[at], chosen[at]
        if r.random() < 0.5:
            question, answer = r.choice([f"What is the {header} of {p}?", f"Which {header} belongs to {p}?"]), v
        else:
            question, answer = r.choice([f"Who goes with {v}?", f"Which person has the {header} {v}?"]), p
        lead = f"Here is a list of people, each with a {header}:\n{lines}\n"
        turns += [user(lead + question if index == 0 else question), assistant(answer)]
        keys.append(("row", relation, p, v))
    return Exercise("table", turns, keys)


# ---------------------------------------------------------------------------------------------------- facts, choices

def kind_of(r: Random) -> tuple[str, str]:
    kind = r.choice(list(KINDS))
    return kind, r.choice(KINDS[kind])


def yes_no(r: Random) -> Exercise:
    """Whether a word is of a kind, or a fixed fact about an animal holds."""
    if r.random() < 0.6:
        kind, word = kind_of(r)
        asked = kind if r.random() < 0.5 else r.choice(list(KINDS))
        truth = word in KINDS[asked]
        text = r.choice(["Is {w} {k}?", "Is \"{w}\" {k}?", "Yes or no: is {w} {k}?"]).format(w=word, k=article(asked))
    else:
        animal = r.choice(list(ANIMALS))
        sound, food, _, legs, _ = ANIMALS[animal]
        kind = r.randrange(2)
        word = animal
        if kind == 0:
            asked_legs = legs if r.random() < 0.5 else r.choice([0, 2, 4, 6, 8])
            asked, truth = str(asked_legs), asked_legs == legs
            text = r.choice(["Does {a} have {n} legs?", "Yes or no: does {a} have {n} legs?"]).format(
                a=article(animal), n=NUMBER_WORDS[asked_legs])
        else:
            asked = food if r.random() < 0.5 else r.choice([value[1] for value in ANIMALS.values()])
            truth = asked == food
            text = r.choice(["Does {a} eat {f}?", "Yes or no: does {a} eat {f}?"]).format(a=article(animal), f=asked)
    return Exercise("yes_no", [user(casual(r, text)), assistant("Yes." if truth else "No.")], [("yes", text, word, asked)])


def fact(r: Random) -> Exercise:
    """A fixed fact about an animal or the calendar, asked in one of many ways (held out by wording)."""
    animal = r.choice(list(ANIMALS))
    sound, food, home, legs, young = ANIMALS[animal]
    day, month = r.randrange(7), r.randrange(12)
    text, answer = r.choice([
        (r.choice([f"How many legs does {article(animal)} have?", f"Tell me how many legs {article(animal)} has."]),
         f"{article(animal)} has {NUMBER_WORDS[legs]} legs.".capitalize()),
        (r.choice([f"What does {article(animal)} eat?", f"What do {plural(animal)} eat?"]),
         f"{plural(animal)} eat {food}.".capitalize()),
        (r.choice([f"Where does {article(animal)} live?", f"What is the home of {article(animal)}?"]),
         f"{article(animal)} lives in a {home}.".capitalize()),
        (r.choice([f"What is a young {animal} called?", f"What do you call a young {animal}?"]),
         f"A young {animal} is called {article(young)}."),
        (r.choice([f"What sound does {article(animal)} make?", f"What noise does {article(animal)} make?"]),
         f"{article(animal)} {sound}.".capitalize()),
        (r.choice([f"Which day comes after {DAYS[day]}?", f"What day follows {DAYS[day]}?"]), f"{DAYS[(day + 1) % 7]}."),
        (r.choice([f"Which day comes before {DAYS[day]}?", f"What day is before {DAYS[day]}?"]), f"{DAYS[day - 1]}."),
        (r.choice([f"Which month comes after {MONTHS[month]}?", f"What month follows {MONTHS[month]}?"]),
         f"{MONTHS[(month + 1) % 12]}."),
        (r.choice([f"How many days does {MONTHS[month]} have?", f"How many days are in {MONTHS[month]}?"]),
         f"{MONTHS[month]} has {MONTH_DAYS[month]} days."),
    ])
    return Exercise("fact", [user(casual(r, text)), assistant(answer)], [("fact", text)])


def multiple_choice(r: Random) -> Exercise:
    """A question with lettered options, about kinds of words, a story or numbers; the answer is a letter.

    By default the model first thinks of the answer itself and looks up its letter among the options.
    """
    count = r.choice([3, 4, 4])
    form = r.randrange(4)
    steps = ""
    if form == 0:
        kind, right = kind_of(r)
        wrong = distinct(r, lambda r: r.choice(KINDS[r.choice([k for k in KINDS if k != kind])]), count - 1)
        question = r.choice(["Which of these is {k}?", "Which one is {k}?", "Find {k}."]).format(k=article(kind))
        key = ("choice", kind, right, wrong[0])
    elif form == 1:
        text, facts = world_story(r, r.choice([1, 2]), 2)
        chosen = [f for f in facts if f.claim]
        if not chosen:
            return multiple_choice(r)
        picked = r.choice(chosen)
        right = picked.value
        wrong = distinct(r, lambda r: r.choice([o for o in picked.others if o != right]), count - 1)
        question = text + "\n" + picked.questions[0][0]
        key = ("choice", *picked.key)
    elif form == 2:
        a, b = r.randint(1, 20), r.randint(1, 20)
        right = str(a + b)
        wrong = [str(v) for v in distinct(r, lambda r: r.choice([v for v in range(2, 41) if v != a + b]), count - 1)]
        question, key = f"What is {a} + {b}?", ("+", *sorted((a, b)))
        steps = add_steps(a, b) + "\n"
    else:
        animal = r.choice(list(ANIMALS))
        right = ANIMALS[animal][1]
        wrong = distinct(r, lambda r: r.choice([f for f in FOODS if f != right]), count - 1)
        question, key = f"What does {article(animal)} eat?", ("choice", animal, wrong[0])
    options = wrong + [right]
    r.shuffle(options)
    letters = "ABCD"
    style = r.choice(["{l}) {o}", "{l}. {o}", "({l}) {o}"])
    shown = r.choice(["\n", "\n", " "]).join(style.format(l=letters[i], o=o) for i, o in enumerate(options))
    tail = r.choice(["", "", "\nAnswer with the letter.", "\nAnswer with one letter."])
    thinking = r.random() < 0.8
    return Exercise("multiple_choice", [user(f"{question}\n{shown}{tail}"), assistant(
        letters[options.index(right)], f"{steps}{right} {letters[options.index(right)]}" if thinking else None)],
        [key], thinking=thinking)


# ---------------------------------------------------------------------------------------------------- dates and units

def units(r: Random) -> Exercise:
    big, small, factor = r.choice([
        ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
        ("metres", "centimetres", 100), ("kilometres", "metres", 1000), ("kilograms", "grams", 1000),
        ("litres", "millilitres", 1000), ("years", "months", 12), ("centimetres", "millimetres", 10),
        ("dozens", "pieces", 12)])
    n = r.randint(2, 99 if factor in (10, 100, 1000) else 9)
    forward = r.random() < 0.6
    a, b = (n, n * factor) if forward else (n * factor, n)
    x, y = (big, small) if forward else (small, big)
    text = r.choice(["How many {y} are {a} {x}?", "Convert {a} {x} to {y}.", "How many {y} are in {a} {x}?",
                     "What is {a} {x} in {y}?", "Change {a} {x} into {y}."]).format(a=a, x=x, y=y)
    key = ("unit", big, small, n, text[:5]) if factor in (60, 24, 7, 12) else ("unit", big, small, n)
    return Exercise("units", [user(casual(r, text)), assistant(f"{a} {x} are {b} {y}.")], [key])


def dates(r: Random) -> Exercise:
    month = r.randrange(12)
    day, year = r.randint(1, MONTH_DAYS[month]), r.randint(1950, 2039)
    iso, words = f"{year}-{month + 1:02d}-{day:02d}", f"{day} {MONTHS[month]} {year}"
    form = r.randrange(6)
    if form == 0:
        text = r.choice(["Write {w} as YYYY-MM-DD.", "Write the date {w} in the form YYYY-MM-DD.", "Convert {w} to ISO format."])
        text, answer, key = text.format(w=words), iso, ("date", day, month, year)
    elif form == 1:
        text = r.choice(["Write {i} in words.", "Write the date {i} in words.", "Which date is {i}?"])
        text, answer, key = text.format(i=iso), words, ("date", day, month, year)
    elif form == 2:
        hour, minute = r.randint(13, 23), r.randrange(0, 60, 5)
        text = r.choice(["Write {h}:{m:02d} in 12-hour time.", "What is {h}:{m:02d} in 12-hour time?"]).format(h=hour, m=minute)
        answer, key = f"{hour - 12}:{minute:02d} pm", ("time", hour, minute)
    elif form == 3:
        hour, minute = r.randint(1, 11), r.randrange(0, 60, 5)
        text = r.choice(["Write {h}:{m:02d} pm in 24-hour time.", "What is {h}:{m:02d} pm in 24-hour time?"]).format(
            h=hour, m=minute)
        answer, key = f"{hour + 12}:{minute:02d}", ("time", hour + 12, minute)
    elif form == 4:
        start, count = r.randrange(7), r.randint(1, 6)
        text = r.choice(["Today is {d}. Which day is it in {n} days?", "It is {d}. What day will it be in {n} days?"]).format(
            d=DAYS[start], n=count) if count > 1 else f"Today is {DAYS[start]}. Which day is tomorrow?"
        answer, key = f"{DAYS[(start + count) % 7]}.", ("later", start, count, text[:8])
    else:
        last = day == MONTH_DAYS[month]
        following = f"1 {MONTHS[(month + 1) % 12]}" if last else f"{day + 1} {MONTHS[month]}"
        text = r.choice(["What is the day after {d}?", "Which date comes after {d}?"]).format(d=f"{day} {MONTHS[month]}")
        answer, key = following + ".", ("after", day, month)
    return Exercise("dates", [user(casual(r, text)), assistant(answer)], [key])


# ---------------------------------------------------------------------------------------------------- JSON extraction

def record(r: Random) -> tuple[list[tuple[str, str, object]], str, tuple]:
    """Fields (name, type, value) of one record, and a sentence that states them all."""
    p, town, job, food = name(r), r.choice(TOWNS), r.choice(JOBS), r.choice(FOODS)
    animal, colour, thing, place = r.choice(list(ANIMALS)), r.choice(COLOURS), r.choice(OBJECTS), r.choice(PLACES)
    day, size, count, age = r.choice(DAYS), r.choice(SIZES), r.randint(2, 99), r.randint(3, 95)
    price, other = r.randint(1, 99), name(r)
    while other == p:
        other = name(r)
    minute = r.randrange(0, 60, 5)
    clock = f"{r.randint(1, 12)}:{minute:02d}"
    form = r.randrange(9)
    string, integer = "string", "integer"
    if form == 0:
        fields = [("name", string, p), ("age", integer, age), (r.choice(["town", "city"]), string, town)]
        text = r.choice([f"{p} is {age} years old and lives in {town}.", f"{p}, who is {age}, comes from {town}.",
                         f"In {town} lives {p}, aged {age}."])
    elif form == 1:
        fields = [("name", string, p), ("job", string, job), (r.choice(["town", "place"]), string, town)]
        text = r.choice([f"{p} works as {article(job)} in {town}.", f"The {job} of {town} is called {p}.",
                         f"{p} is {article(job)} from {town}."])
    elif form == 2:
        fields = [("buyer", string, p), ("item", string, thing), ("count", integer, count), ("price", integer, price)]
        text = r.choice([f"{p} bought {count} {plural(thing)} for {price} coins.",
                         f"For {price} coins, {p} got {count} {plural(thing)}."])
        fields[1] = ("item", string, plural(thing))
    elif form == 3:
        fields = [("animal", string, animal), ("name", string, p), ("colour", string, colour), ("size", string, size)]
        text = r.choice([f"{p} is a {size} {colour} {animal}.", f"The {size} {colour} {animal} is called {p}.",
                         f"There is a {size} {animal} called {p}, and its colour is {colour}."])
    elif form == 4:
        fields = [("event", string, r.choice(["meeting", "party", "lesson", "concert", "race"])), ("day", string, day),
                  ("time", string, clock), ("place", string, place)]
        event = fields[0][2]
        text = r.choice([f"The {event} is on {day} at {clock} in the {place}.", f"Come to the {place} on {day} at {clock} for the {event}.",
                         f"On {day} at {clock} there is a {event} in the {place}."])
    elif form == 5:
        fields = [("sender", string, p), ("receiver", string, other), ("item", string, thing)]
        text = r.choice([f"{p} sent {article(thing)} to {other}.", f"{other} got {article(thing)} from {p}.",
                         f"{p} gave {other} {article(thing)}."])
    elif form == 6:
        open_ = r.random() < 0.5
        fields = [("place", string, place), ("open", "boolean", open_), ("day", string, day)]
        state = "open" if open_ else "closed"
        text = r.choice([f"The {place} is {state} on {day}.", f"On {day} the {place} is {state}."])
    elif form == 7:
        foods = r.sample(FOODS, r.randint(2, 3))
        shown = ", ".join(foods[:-1]) + " and " + foods[-1]
        fields = [("name", string, p), ("foods", "array", foods)]
        text = r.choice([f"{p} likes {shown}.", f"{p} bought {shown} at the market.", f"Today {p} eats {shown}."])
    else:
        fields = [("item", string, thing), ("colour", string, colour), ("place", string, place), ("owner", string, p)]
        text = r.choice([f"{p} left the {colour} {thing} in the {place}.", f"The {colour} {thing} in the {place} belongs to {p}.",
                         f"In the {place} there is {article(colour)} {thing}. It is from {p}."])
    return fields, text, ("json", form, *[str(value) for _, _, value in fields[:3]])


ALIASES = {"name": ["name", "who", "called"], "age": ["age", "years"], "town": ["town", "home"], "city": ["city", "home"],
           "job": ["job", "work", "role"], "colour": ["colour", "color"], "item": ["item", "thing", "object"],
           "count": ["count", "number", "quantity"], "price": ["price", "cost", "coins"], "day": ["day", "date"],
           "place": ["place", "location", "where"], "buyer": ["buyer", "customer", "person"], "owner": ["owner", "person"]}


def schema_of(fields: list[tuple[str, str, object]]) -> dict:
    properties = {}
    for key, kind, _ in fields:
        properties[key] = {"type": "array", "items": {"type": "string"}} if kind == "array" else {"type": kind}
    return {"type": "object", "properties": properties, "required": [key for key, _, _ in fields]}


def extraction(r: Random) -> Exercise:
    """A sentence and a schema in one of several notations; the answer is the JSON object alone."""
    fields, text, key = record(r)
    if r.random() < 0.4 and len(fields) > 2:
        fields = r.sample(fields, r.randint(2, len(fields)))
    elif r.random() < 0.4:
        r.shuffle(fields)
    renamed, seen = [], set()
    for field_name, kind, value in fields:
        new = r.choice(ALIASES[field_name]) if field_name in ALIASES and r.random() < 0.35 else field_name
        new = field_name if new in seen else new
        seen.add(new)
        renamed.append((new, kind, value))
    fields = renamed
    keys = [field_name for field_name, _, _ in fields]
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    form = r.randrange(5)
    if form == 0:
        ask = r.choice(["Extract {k} as JSON.", "Give me {k} as a JSON object.", "Return JSON with {k}.",
                        "Write a JSON object with {k}."]).format(k=listed)
    elif form == 1:
        ask = r.choice(["Extract the data as JSON with the keys {k}.", "Answer in JSON with these keys: {k}."]).format(
            k=", ".join(keys))
    elif form == 2:
        shape = "{" + ", ".join(f'"{k}": {kind}' for k, kind, _ in fields) + "}"
        ask = r.choice(["Extract JSON of this form: {s}", "Use this format: {s}", "Fill in: {s}"]).replace("{s}", shape)
    elif form == 3:
        ask = r.choice(["Extract JSON that follows this schema: ", "Answer with JSON for this schema: "]) + json.dumps(schema_of(fields))
    else:
        lines = "\n".join(f"- {k} ({kind})" for k, kind, _ in fields)
        ask = "Extract a JSON object with these fields:\n" + lines
    if r.random() < 0.5:
        prompt = r.choice(["{t}\n{a}", "{t}\n\n{a}", "Text: {t}\n{a}"])
    else:
        prompt = r.choice(["{a}\n{t}", "{a}\n\n{t}", "{a}\nText: {t}", "{a}\nSentence: {t}"])
    prompt = prompt.replace("{a}", ask).replace("{t}", text)
    answer = json.dumps({k: value for k, _, value in fields}, ensure_ascii=False)
    system = r.choice([None, None, None, "Answer with JSON only.", "You extract data as JSON."])
    return Exercise("extraction", [user(prompt), assistant(answer)], [key], match="json", system=system)


# ---------------------------------------------------------------------------------------------------- tools

def function(name_: str, description: str, properties: dict, required: list[str] | None = None, r: Random | None = None) -> dict:
    """An OpenAI-style function. The description is left out now and then."""
    body: dict = {"name": name_}
    if r is None or r.random() < 0.75:
        body["description"] = description
    body["parameters"] = {"type": "object", "properties": properties, "required": required or list(properties)}
    return {"type": "function", "function": body}


def tool_case(r: Random) -> tuple[dict, list[str], dict, dict, str]:
    """(function, ways to ask, arguments, a result, the answer that reads the result back)."""
    s, i = {"type": "string"}, {"type": "integer"}
    town, p, thing, food = r.choice(TOWNS), name(r), r.choice(OBJECTS), r.choice(FOODS)
    animal, day, place, job = r.choice(list(ANIMALS)), r.choice(DAYS), r.choice(PLACES), r.choice(JOBS)
    n, m, value = r.randint(2, 99), r.randint(2, 99), r.randint(2, 99)
    weather, colour = r.choice(WEATHER), r.choice(COLOURS)
    hour = f"{r.randint(1, 12)}:{r.randrange(0, 60, 5):02d}"
    cases = [
        lambda: (function(r.choice(["get_weather", "weather", "find_weather"]), "Get the weather in a town.",
                          {r.choice(["city", "town", "location"]): s}, r=r),
                 [f"What is the weather in {town}?", f"How is the weather in {town}?", f"Tell me the weather in {town}.",
                  f"Is it sunny in {town}?"],
                 [town], {"weather": weather, "temperature": value},
                 f"The weather in {town} is {weather}, with {value} degrees."),
        lambda: (function(r.choice(["get_time", "current_time"]), "Get the time in a town.", {r.choice(["city", "town"]): s}, r=r),
                 [f"What time is it in {town}?", f"Tell me the time in {town}."],
                 [town], {"time": hour}, f"In {town} it is {hour}."),
        lambda: (function(r.choice(["add", "add_numbers", "sum"]), "Add two numbers.", {"a": i, "b": i}, r=r),
                 [f"What is {n} + {m}?", f"Add {n} and {m}.", f"Use the tool to add {n} and {m}."],
                 [n, m], {"result": n + m}, f"{n} + {m} = {n + m}"),
        lambda: (function(r.choice(["get_price", "find_price"]), "Find the price of a thing.", {r.choice(["item", "thing", "product"]): s}, r=r),
                 [f"What does {article(thing)} cost?", f"How much is {article(thing)}?", f"What is the price of {article(thing)}?"],
                 [thing], {"price": value}, f"The {thing} costs {value} coins."),
        lambda: (function(r.choice(["buy", "order_item", "place_order"]), "Order things from the shop.", {"item": s, r.choice(["count", "quantity"]): i}, r=r),
                 [f"Order {n} {plural(thing)}.", f"Please buy {n} {plural(thing)}.", f"I need {n} {plural(thing)}, please order them."],
                 [plural(thing), n], {"status": "ok", "order": value}, f"Done. The order number is {value}."),
        lambda: (function(r.choice(["find_person", "look_up_person", "get_person"]), "Look up a person.", {r.choice(["name", "person"]): s}, r=r),
                 [f"Who is {p}?", f"Look up {p}.", f"What is the job of {p}?", f"Find out about {p}."],
                 [p], {"name": p, "job": job, "town": town}, f"{p} is {article(job)} in {town}."),
        lambda: (function(r.choice(["find_animal", "locate_animal"]), "Find where an animal is.", {"animal": s}, r=r),
                 [f"Where is the {animal}?", f"Find the {animal}.", f"Can you tell me where the {animal} is?"],
                 [animal], {"place": place}, f"The {animal} is in the {place}."),
        lambda: (function(r.choice(["opening_hours", "get_hours"]), "Get the opening hours of a place on a day.", {"place": s, "day": s}, r=r),
                 [f"When does the {place} open on {day}?", f"When is the {place} open on {day}?", f"Opening hours of the {place} on {day}?"],
                 [place, day], {"opens": hour}, f"On {day} the {place} opens at {hour}."),
        lambda: (function(r.choice(["send_message", "send_letter"]), "Send a message to a person.", {r.choice(["to", "receiver"]): s, r.choice(["text", "message"]): s}, r=r),
                 [f"Tell {p} that the {animal} is in the {place}.", f"Send {p} this message: the {animal} is in the {place}"],
                 [p, f"the {animal} is in the {place}"], {"status": "sent"}, f"I sent the message to {p}."),
        lambda: (function(r.choice(["set_alarm", "set_reminder"]), "Set an alarm.", {r.choice(["time", "at"]): s, "day": s}, r=r),
                 [f"Wake me at {hour} on {day}.", f"Set an alarm for {day} at {hour}.", f"Set an alarm on {day} at {hour}, please."],
                 [hour, day], {"status": "ok"}, f"The alarm is set for {day} at {hour}."),
        lambda: (function(r.choice(["paint", "paint_item", "set_colour"]), "Paint a thing in a colour.", {"item": s, "colour": s}, r=r),
                 [f"Paint the {thing} {colour}.", f"Please make the {thing} {colour}.", f"I want the {thing} to be {colour}."],
                 [thing, colour], {"status": "ok"}, f"The {thing} is {colour} now."),
        lambda: (function(r.choice(["count_food", "get_stock"]), "Count how much food is left.", {"food": s}, r=r),
                 [f"How many {food} are left?", f"Count the {food}.", f"How much {food} do we have?"],
                 [food], {"left": value}, f"There are {value} {food} left."),
    ]
    tool, asks, values, result, answer = r.choice(cases)()
    arguments = dict(zip(tool["function"]["parameters"]["properties"], values))
    return tool, asks, arguments, result, answer


def tool_call(r: Random) -> Exercise:
    """A request that needs a tool: the call, and in two of three exercises the result and its reading."""
    tool, asks, arguments, result, answer = tool_case(r)
    tools = [tool]
    for _ in range(r.choice([0, 0, 1, 1, 2])):
        other = tool_case(r)[0]
        if other["function"]["parameters"]["properties"].keys() != tool["function"]["parameters"]["properties"].keys() \
                and other["function"]["name"] not in [t["function"]["name"] for t in tools]:
            tools.append(other)
    r.shuffle(tools)
    call = {"name": tool["function"]["name"], "arguments": arguments}
    key = ("tool", *[str(v) for v in arguments.values()], call["name"][:3])
    first = [user(casual(r, r.choice(asks))), {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": call}]}]
    if r.random() < 0.4:
        return Exercise("tool_call", first, [key], match="tool", tools=tools)
    rest = [{"role": "tool", "content": json.dumps(result, ensure_ascii=False)}, assistant(answer)]
    return Exercise("tool_result", first + rest, [key, ("result", *result.values())][:1], tools=tools)


def tool_unused(r: Random) -> Exercise:
    """A plain question while tools are offered: answered without a call."""
    tool = tool_case(r)[0]
    inner = r.choice([small_talk, small_talk, fact, lambda r: list_task(r, "copy", 5)])(r)
    return Exercise("tool_unused", inner.messages, inner.keys, inner.match, inner.thinking, [tool])


# ---------------------------------------------------------------------------------------------------- small talk

IDENTITY = "I am Apus, a small demo model. I know a little world of people, animals, places and numbers."
ABILITIES = ("I can tell short stories, answer questions about a text, do small sums, sort and copy lists, "
             "write JSON and call tools.")
REFUSAL = "I am sorry, I do not know that. I am a small demo model and only know my own little world."

TALK = [
    (["Hello!", "Hello", "Hi", "Hi!", "Hey", "Hello there!", "Hi there", "Hey Apus!", "Hello Apus", "Good day!", "Greetings!"],
     "Hello! How can I help you?"),
    (["Good morning!", "Good morning"], "Good morning! How can I help you?"),
    (["Good evening!", "Good evening"], "Good evening! How can I help you?"),
    (["How are you?", "How are you today?", "How do you do?", "How is it going?", "Hello, how are you?", "Hi, how are you?"],
     "I am well, thank you. How can I help you?"),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.", "Who is this?",
      "Are you a model?", "What model are you?", "Which model is this?", "Who am I talking to?", "Hi, who are you?",
      "Hello! Who are you?"], IDENTITY),
    (["What can you do?", "How can you help me?", "What are you able to do?", "What do you know?", "Help", "Help me.",
      "Can you help me?", "What are your skills?", "What can I ask you?", "Hello! What can you do?"], ABILITIES),
    (["Who made you?", "Who trained you?", "Where do you come from?", "How were you made?"],
     "I was trained by the Apus project, on a text that a program wrote."),
    (["Thank you!", "Thank you", "Thanks", "Thanks!", "Thanks a lot!", "Great, thanks.", "Thank you very much!"],
     "You are welcome!"),
    (["Bye", "Bye!", "Goodbye!", "Good night!", "See you!", "See you later.", "Goodbye"], "Goodbye! Have a good day."),
    (["Are you a human?", "Are you a person?", "Are you alive?"], "No, I am a small demo model called Apus."),
    (["Ok", "OK", "Good.", "Great!", "Well done!", "Nice.", "That is right.", "Very good!"], "Thank you! What shall we do next?"),
    (["What is Apus?", "Tell me about Apus.", "What does Apus mean?"],
     "Apus is a fast engine that serves language models. I am its small demo model."),
    (["Tell me a joke.", "Do you know a joke?", "Say something funny."],
     "Why did the hen cross the bridge? To get to the other side!"),
    (["Sing a song.", "Can you sing?"], "I can not sing, but I can tell you a story."),
    (["I am sad.", "I feel sad today.", "I had a bad day."], "I am sorry to hear that. Shall I tell you a story?"),
    (["I am bored.", "What shall we do?"], "Shall I tell you a story, or do you want to do some sums?"),
]

OUTSIDE_TOPICS = """France Germany Japan China America England Europe Africa physics chemistry politics football results
religion history quantum computers philosophy medicine law taxes bitcoin money the stock market Python JavaScript Linux
films music rockets Mars the moon the universe atoms DNA viruses Shakespeare Einstein Napoleon Mozart Swift programming
GPUs neural networks inflation democracy cars engines aeroplanes satellites""".split()
OUTSIDE = [
    "Who is the president of {t}?", "What is the capital of {t}?", "Explain {t} to me.", "What do you think about {t}?",
    "Tell me about {t}.", "Who invented {t}?", "When did {t} begin?", "Write an essay about {t}.", "What is {t}?",
    "How does {t} work?", "Give me the latest news about {t}.", "Who was {t}?", "Can you explain {t}?",
    "What is the history of {t}?", "Why is {t} important?", "Write a program about {t}.", "Translate this into {t}.",
    "What is the meaning of {t}?", "How many people live in {t}?", "What is the best book about {t}?",
]


def small_talk(r: Random) -> Exercise:
    asks, answer = r.choice(TALK)
    text = r.choice(asks)
    # Greetings are few, so they are not held out: there is no rule to learn from the rest.
    return Exercise("small_talk", [user(casual(r, text) if len(text) > 12 else text), assistant(answer)], [("talk", text, r.random())])


def outside(r: Random) -> Exercise:
    topic = r.choice([t for t in OUTSIDE_TOPICS if t != "the"])
    text = r.choice(OUTSIDE).format(t=topic)
    return Exercise("refusal", [user(casual(r, text)), assistant(REFUSAL)], [("outside", text)])


# ---------------------------------------------------------------------------------------------------- the mixture

SKILLS = {
    "story": (20, story), "unknown": (1.2, unknown), "table": (2, summary_list), "tell_story": (0.7, tell_story),
    "extraction": (18, extraction),
    "addition": (11, addition), "subtraction": (3, subtraction), "multiplication": (0.5, multiplication),
    "word_problem": (2, word_problem), "comparison": (1.5, comparison),
    "list_copy": (10, lambda r: list_task(r, "copy", 10)), "list_reverse": (1, lambda r: list_task(r, "reverse", 7)),
    "list_sort": (0.5, lambda r: list_task(r, "sort")), "list_sort_numbers": (0.7, lambda r: list_task(r, "sort_numbers")),
    "list_extreme": (0.5, lambda r: list_task(r, "extreme")), "list_pick": (1.5, lambda r: list_task(r, "pick")),
    "list_count": (0.5, lambda r: list_task(r, "count")), "list_member": (1, lambda r: list_task(r, "member")),
    "yes_no": (2, yes_no), "fact": (2, fact), "multiple_choice": (15, multiple_choice),
    "units": (0.4, units), "dates": (0.5, dates),
    "tool_call": (3.5, tool_call), "tool_unused": (0.7, tool_unused),
    "small_talk": (2, small_talk), "refusal": (1.5, outside),
}

def copy_long(r: Random) -> Exercise:
    """A list of up to 24 items to repeat: most of its tokens can be had from the prompt, which teaches to look there."""
    return list_task(r, "copy", 24)



def sum_drill(r: Random) -> Exercise:
    """Several columns of sums at once, as they stand in worked steps."""
    sums: list[tuple[str, int]] = []
    wanted = r.randint(4, 7)
    while len(sums) < wanted:
        a, b, carried = r.randint(0, 9), r.randint(0, 9), r.choice(["", "", 0, 1])
        if r.random() < 0.7:
            tail = "" if carried == "" else f" + {carried}"
            sums.append((f"{a} + {b}{tail}", a + b + (carried or 0)))
            key = ("+", *sorted((a, b)))
        else:
            tail = "" if carried == "" else f" - {carried}"
            if a - b - (carried or 0) < 0:
                a += 10
            sums.append((f"{a} - {b}{tail}", a - b - (carried or 0)))
            key = ("-", a, b)
        if carried == "" and held_out(key):
            sums.pop()  # a question of the test must not be drilled
    text = r.choice(["Work these out: ", "Do these sums: ", "Drill: "]) + ", ".join(question for question, _ in sums)
    return Exercise("sum_drill", [user(text), assistant("\n".join(f"{question} = {value}." for question, value in sums))],
                    [])


def letter_drill(r: Random) -> Exercise:
    """The letters of several options, each looked up by its text, as in the thought before a choice."""
    count = r.choice([3, 4, 4])
    draw = r.choice([random_word, lambda r: r.choice(WORDS), lambda r: r.choice(WORDS), lambda r: str(r.randint(2, 99))])
    options = distinct(r, draw, count)
    style = r.choice(["{l}) {o}", "{l}. {o}", "({l}) {o}"])
    shown = r.choice(["\n", "\n", " "]).join(style.format(l="ABCD"[i], o=o) for i, o in enumerate(options))
    asked = r.sample(range(count), r.randint(2, count))
    text = f"{shown}\n" + r.choice(["Which letters have {w}?", "Give the letters of {w}.", "Find the letters: {w}"]).format(
        w=", ".join(options[i] for i in asked))
    return Exercise("letter_drill", [user(text), assistant("\n".join(f"{options[i]} {'ABCD'[i]}" for i in asked))], [])


def key_drill(r: Random) -> Exercise:
    """An empty object with the keys of a schema, in their order."""
    fields, _, _ = record(r)
    fields = r.sample(fields, r.randint(2, len(fields))) if len(fields) > 2 else fields
    keys = list(dict.fromkeys(r.choice(ALIASES.get(key, [key])) for key, _, _ in fields))
    text = r.choice(["An empty JSON object with the keys {k}.", "Keys only: {k}", "JSON with these keys and no values: {k}"])
    return Exercise("key_drill", [user(text.format(k=", ".join(keys))), assistant(json.dumps({key: "" for key in keys}))],
                    [])


# Parts of other skills, repeated so often in an exercise that they are learnt soon. They are not in the test.
DRILLS = {"sum_drill": (8, sum_drill), "letter_drill": (8, letter_drill), "key_drill": (1, key_drill)}

# A curriculum: what is drawn at first, when the model has yet to learn to find and to copy words of the prompt.
EARLY_SHARES = {
    "copy_long": 25, "list_copy": 12, "extraction": 20, "story": 16, "table": 8, "list_reverse": 1, "list_pick": 2,
    "addition": 8, "multiple_choice": 4, "list_member": 1, "tool_call": 4, "tell_story": 0.5, "small_talk": 1,
    "yes_no": 1, "fact": 1,
}

# The same skills over more of text, for the share of training that teaches a longer context.
LONG_SKILLS = {
    "story": (3, lambda r: story(r, people=r.randint(4, 10))),
    "table": (3, lambda r: summary_list(r, most=30)),
    "list_copy": (2, lambda r: list_task(r, "copy", 60)),
    "list_reverse": (1, lambda r: list_task(r, "reverse", 20)),
    "list_pick": (1, lambda r: list_task(r, "pick", 30)),
}
