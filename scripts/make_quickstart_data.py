"""Write the quickstart's data: messy one-line orders and the strict JSON to extract from them.

    python scripts/make_quickstart_data.py     # recipes/data/orders_{train,heldout}.jsonl

A row is one conversation: `{"messages": [{"role": ..., "content": ...}, ...]}`. The user writes as people type on a
phone; the assistant answers with one line of JSON, always with these five keys:

    {"customer":"Dana Whitfield","item":"oak shelf","quantity":24,"day":"friday","express":false}

Nothing in a row names the keys, so an untrained model cannot guess them.

Each row starts from a random `Order`: the JSON is exact, and the text is a messy version of it. Held-out rows use last
names that do not occur in training, and a quarter of their first names is new. Rows are short, since the quickstart's
time is proportional to tokens. Everything depends on one seed: the script always writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

SEED = 7
NUM_TRAIN = 720
NUM_HELDOUT = 100
DATA = Path(os.path.relpath(Path(__file__).resolve().parent.parent / "recipes" / "data"))

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Item:
    noun: str
    size: str | None
    color: str | None

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.size, self.color, self.noun) if part)


@dataclass(frozen=True)
class Order:
    """The meaning of a message; None for what it does not mention."""

    customer: str | None
    item: Item | None
    quantity: int | None
    day: str | None
    express: bool

    def to_json(self) -> str:
        answer = {**asdict(self), "item": self.item.name if self.item else None}
        return json.dumps(answer, separators=(",", ":"))  # without spaces: a fifth fewer tokens


@dataclass(frozen=True)
class Names:
    """The names that occur in one file."""

    first_names: Sequence[str]
    last_names: Sequence[str]


TRAIN = Names(
    first_names=(
        "Aaron", "Alice", "Amir", "Amy", "Anna", "Ben", "Brian", "Carla", "Carlos",
        "Chris", "Dan", "Daniel", "Dana", "David", "Diana", "Emma", "Eric", "Fatima", "Frank",
        "George", "Grace", "Hannah", "Helen", "Ivan", "Jack", "Jean", "John", "Julia", "Karen",
        "Kate", "Kevin", "Laura", "Leo", "Linda", "Lucy", "Mark", "Maria", "Martin",
        "Mia", "Nick", "Nina", "Oliver", "Omar", "Paul", "Rachel", "Robert",
        "Rosa", "Ruth", "Sam", "Sara", "Scott", "Simon", "Steve", "Thomas", "Tim", "Tina",
        "Victor",
    ),
    last_names=(
        "Adams", "Baker", "Bennett", "Brooks", "Carter", "Chen", "Clark", "Cohen", "Collins",
        "Cooper", "Diaz", "Evans", "Fischer", "Foster", "Garcia", "Gomez", "Grant", "Gray",
        "Green", "Hall", "Harris", "Hughes", "Hunt", "Jackson", "Johnson", "Kelly", "Khan", "King",
        "Lewis", "Lopez", "Martinez", "Meyer", "Mitchell", "Moore", "Murphy", "Nguyen", "Owens",
        "Parker", "Patel", "Perez", "Price", "Reed", "Rivera", "Rossi", "Shaw", "Silva", "Stone",
        "Turner", "Walker", "Whitfield", "Young",
    ),
)  # fmt: skip
HELDOUT = Names(
    first_names=(
        "Adam", "Peter", "Bob", "Emily", "Henry", "James", "Mary", "Michael", "Richard", "William",
        *TRAIN.first_names[:30],  # a quarter of the first names are new, every last name is
    ),
    last_names=(
        "Allen", "Barnes", "Bell", "Cook", "Davis", "Ellis", "Fox", "Gordon", "Hill", "Howard",
        "Jensen", "Lambert", "Morgan", "Nelson", "Palmer", "Quinn", "Russell", "Taylor", "West",
        "Wood",
    ),
)  # fmt: skip

ITEMS = (
    "mug", "oak shelf", "desk lamp", "plate", "candle", "basket", "cushion", "towel", "vase",
    "bowl", "folding chair", "picture frame", "notebook", "tray", "blanket", "box", "mirror",
    "curtain", "rug", "teapot", "glass", "bucket", "garden bench", "brush", "coat hook",
    "door mat", "jar", "pillow", "wall clock", "water bottle",
)  # fmt: skip
SMALL_TALK = ("hope ur well", "lovely weather btw", "sorry for the late msg", "its me again", "great shop btw")
GREETINGS = ("hi", "hello", "hey", "hi there", "good morning", "morning", "hiya", "hey guys")
CLOSINGS = ("thx", "thanks", "cheers", "ta", "many thanks", "tks!")
COLORS = ("red", "blue", "green", "black", "white", "grey", "yellow", "brown")
SIZES = {"small": ("small", "sm", "smal"), "medium": ("medium", "med"), "large": ("large", "lg")}
ASKING = (
    "need", "i need", "we need", "can i get", "can u send", "pls send", "please order", "id like",
    "want", "could we have", "order", "im after", "send", "", "", "",
)  # fmt: skip
URGENT = ("urgent", "asap", "its urgent", "rush order", "urgent!!")
NOT_URGENT = ("no rush", "not urgent", "no hurry")
WEEKDAYS = {
    "monday": ("monday", "mon", "mondy"),
    "tuesday": ("tuesday", "tues", "tue", "tuseday"),
    "wednesday": ("wednesday", "wed", "wensday", "weds"),
    "thursday": ("thursday", "thurs", "thu", "thurday"),
    "friday": ("friday", "fri", "firday"),
    "saturday": ("saturday", "sat", "saterday"),
    "sunday": ("sunday", "sun"),
}
NEAR_DAYS = {"today": ("today", "2day"), "tomorrow": ("tomorrow", "tmrw", "tomorow")}
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
GROUP_WORDS = {
    2: ("a couple of", "a pair of"),
    6: ("half a dozen", "half dozen"),
    12: ("a dozen", "one dozen", "1 dz"),
    24: ("two dozen", "2 dozen"),
    36: ("three dozen", "3 dozen"),
    48: ("four dozen", "4 dozen"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's orders as JSON Lines.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: %(default)s)")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)

    rng = Random(SEED)
    used_texts: set[str] = set()  # no text occurs twice, within a file or in both
    write_rows(folder / "orders_train.jsonl", make_rows(rng, TRAIN, NUM_TRAIN, used_texts))
    write_rows(folder / "orders_heldout.jsonl", make_rows(rng, HELDOUT, NUM_HELDOUT, used_texts))


def write_rows(file: Path, rows: list[Messages]) -> None:
    lines = [json.dumps({"messages": messages}) + "\n" for messages in rows]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {file} ({len(rows)} rows)")


def make_rows(rng: Random, names: Names, num_rows: int, used_texts: set[str]) -> list[Messages]:
    rows: list[Messages] = []
    while len(rows) < num_rows:
        order = draw_order(rng, names)
        text = write_order(rng, order)
        if text not in used_texts:
            used_texts.add(text)
            rows.append([{"role": "user", "content": text}, {"role": "assistant", "content": order.to_json()}])
    return rows


# Orders


def draw_order(rng: Random, names: Names) -> Order:
    return Order(
        customer=draw_customer(rng, names) if rng.random() < 0.88 else None,
        item=draw_item(rng) if rng.random() < 0.95 else None,
        quantity=draw_quantity(rng) if rng.random() < 0.92 else None,
        day=draw_day(rng) if rng.random() < 0.85 else None,
        express=rng.random() < 0.4,
    )


def draw_customer(rng: Random, names: Names) -> str:
    return f"{rng.choice(names.first_names)} {rng.choice(names.last_names)}"


def draw_item(rng: Random) -> Item:
    return Item(
        noun=rng.choice(ITEMS),
        size=rng.choice(list(SIZES)) if rng.random() < 0.3 else None,
        color=rng.choice(COLORS) if rng.random() < 0.45 else None,
    )


def draw_quantity(rng: Random) -> int:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(list(GROUP_WORDS))
    return rng.randint(1, 20) if kind < 0.8 else rng.randint(21, 99)


def draw_day(rng: Random) -> str:
    return rng.choice(list(WEEKDAYS if rng.random() < 0.85 else NEAR_DAYS))


# Their text


def write_order(rng: Random, order: Order) -> str:
    """Return one messy line: its parts in any order, with random separators and casing."""
    parts = [" ".join(filter(None, (rng.choice(ASKING), goods_text(rng, order))))]
    if order.day:
        parts.append(f"{preposition(rng, order.day)} {day_text(rng, order.day)}".strip())
    if order.express:
        parts.append(rng.choice(URGENT))
    elif rng.random() < 0.3:
        parts.append(rng.choice(NOT_URGENT))
    if rng.random() < 0.15:
        parts.append(rng.choice(SMALL_TALK))
    if rng.random() < 0.4:
        rng.shuffle(parts)

    if order.customer:
        name = name_text(rng, order.customer)
        if rng.random() < 0.5:
            introduction = rng.choice(("this is {}", "{} here", "its {}", "order for {}", "{} calling", "from {}"))
            parts.insert(0, introduction.format(name))
        else:
            signature = rng.choice(("name is {}", "under {}", "thx {}", "for {}"))
            parts.append(signature.format(name))
    if rng.random() < 0.3:
        parts.insert(0, rng.choice(GREETINGS))
    if rng.random() < 0.1:
        parts.append(rng.choice(CLOSINGS))
    return join_parts(rng, parts)


def join_parts(rng: Random, parts: list[str]) -> str:
    separator = rng.choice((", ", ", ", ", ", ". ", " - ", "; ", " "))
    text = separator.join(parts)
    kind = rng.random()
    if kind < 0.25:
        return text[0].upper() + text[1:]
    return text.lower() if kind < 0.4 else text


def name_text(rng: Random, name: str) -> str:
    return name.lower() if rng.random() < 0.3 else name


def goods_text(rng: Random, order: Order) -> str:
    """Return quantity and item in one of many phrasings."""
    if order.item is None:
        usual = rng.choice(("the usual", "same as last time"))
        return usual if order.quantity is None else f"{usual} x{order.quantity}"
    item = item_text(rng, order.item, plural=order.quantity != 1)
    if order.quantity is None:
        return f"{rng.choice(('some', 'a few', 'more', ''))} {item}".strip()
    if rng.random() < 0.65:
        return f"{quantity_text(rng, order.quantity)} {item}"
    pattern = rng.choice(("{n}x {i}", "{i} x{n}", "{i} x {n}", "{i}, qty {n}", "{i} ({n})"))
    return pattern.format(n=order.quantity, i=item)


def quantity_text(rng: Random, quantity: int) -> str:
    if quantity in GROUP_WORDS and rng.random() < 0.6:
        return rng.choice(GROUP_WORDS[quantity])
    if quantity < len(NUMBER_WORDS) and rng.random() < 0.4:
        return "a" if quantity == 1 else NUMBER_WORDS[quantity]
    return str(quantity)


def item_text(rng: Random, item: Item, *, plural: bool) -> str:
    noun = pluralize(item.noun) if plural else item.noun
    size = rng.choice(SIZES[item.size]) if item.size else ""
    color = item.color or ""
    patterns = ["{size} {color} {noun}"] * 3
    if size:
        patterns += ["{color} {noun} ({size})", "{color} {noun}, {size}"]
    if color:
        patterns += ["{size} {noun} in {color}", "{size} {noun} ({color})"]
    text = rng.choice(patterns).format(size=size, color=color, noun=noun)
    return " ".join(text.split())


def pluralize(noun: str) -> str:
    if noun.endswith("shelf"):
        return noun.removesuffix("f") + "ves"
    return noun + ("es" if noun.endswith(("x", "s", "sh", "ch")) else "s")


def preposition(rng: Random, day: str) -> str:
    choices = ("for", "for", "by", "deliver", "needed", "")
    return rng.choice(choices if day in NEAR_DAYS else (*choices, "on"))


def day_text(rng: Random, day: str) -> str:
    spellings = WEEKDAYS | NEAR_DAYS
    # Mostly the full name; sometimes an abbreviation or a typo.
    return rng.choice((day, day, day.title(), *spellings[day][1:]))


if __name__ == "__main__":
    main()
