"""Write word_problems.jsonl: arithmetic stories of one to fourteen steps, with worked answers.

    python recipes/data/make_word_problems.py            # rewrites the file beside this script

The rows are made up here, so they carry this repository's licence (Apache-2.0) and need no
download. The same seed gives the same bytes on every machine: only `random.Random` is used, and
nothing is iterated whose order Python leaves open. Lengths are uneven on purpose, the way real
instruction data is: half of the rows are one or two steps, and the longest answer is fifteen
times the shortest. That is the shape on which a fixed micro-batch size wastes most on padding.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

NAMES = [
    "Ada",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Mona",
    "Nils",
    "Olga",
    "Pedro",
    "Rosa",
    "Samir",
    "Tessa",
    "Viktor",
]
THINGS = [
    "apples",
    "books",
    "candles",
    "coins",
    "cookies",
    "eggs",
    "flowers",
    "marbles",
    "pencils",
    "plums",
    "shells",
    "stamps",
    "stickers",
    "stones",
    "tickets",
    "tomatoes",
]
PLACES = [
    "at the market",
    "after school",
    "in the morning",
    "on Sunday",
    "at the fair",
    "in the garden",
]
NUM_STEPS, STEP_WEIGHTS = zip(
    *{1: 30, 2: 22, 3: 14, 4: 10, 5: 7, 6: 5, 8: 5, 10: 4, 12: 2, 14: 1}.items(), strict=True
)

LARGEST = 99  # sums of two digits are about what a small model learns in minutes

# A step turns the number of things held into a sentence of the story, a line of the answer and
# the new number; None says the step makes no sense for this number.
Step = Callable[[random.Random, str, str, int], tuple[str, str, int] | None]


def buy(rng: random.Random, name: str, thing: str, held: int) -> tuple[str, str, int] | None:
    """Add a few."""
    more = rng.randint(2, 12)
    if held + more > LARGEST:
        return None
    story = rng.choice(["buys", "finds", "is given"])
    place = rng.choice(PLACES)
    line = f"{name} {story} {more} more, so {held} + {more} = {held + more} {thing}."
    return f"Then {name} {story} {more} more {thing} {place}.", line, held + more


def give(rng: random.Random, name: str, thing: str, held: int) -> tuple[str, str, int] | None:
    """Take a few away."""
    if held < 4:
        return None
    less = rng.randint(1, min(12, held - 2))
    friend = rng.choice([other for other in NAMES if other != name])
    line = f"{friend} gets {less}, so {held} - {less} = {held - less} {thing} are left."
    return f"{name} gives {less} {thing} to {friend}.", line, held - less


def multiply(rng: random.Random, name: str, thing: str, held: int) -> tuple[str, str, int] | None:
    """Double, triple or quadruple."""
    times, word = rng.choice([(2, "doubles"), (3, "triples"), (4, "quadruples")])
    if held * times > LARGEST:
        return None
    line = f"The number {word}, so {held} * {times} = {held * times} {thing}."
    return f"A week later the number of {thing} {word}.", line, held * times


def share(rng: random.Random, name: str, thing: str, held: int) -> tuple[str, str, int] | None:
    """Keep one even part of a number that divides."""
    divisors = [parts for parts in (2, 3, 4, 5) if held % parts == 0 and held // parts > 2]
    if not divisors:
        return None
    parts = rng.choice(divisors)
    line = f"One of {parts} equal parts is {held} / {parts} = {held // parts} {thing}."
    story = f"{name} makes {parts} equal parts of the {thing} and keeps one of them."
    return story, line, held // parts


STEPS: tuple[Step, ...] = (buy, buy, give, give, multiply, share)


def make_problem(rng: random.Random) -> dict[str, str]:
    """One story, its worked answer, and the result after `####` as GSM8K writes it."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    held = rng.randint(3, 30)
    story = [f"{name} has {held} {thing}."]
    lines: list[str] = []
    (num_steps,) = rng.choices(NUM_STEPS, STEP_WEIGHTS)
    while len(lines) < num_steps:
        step = rng.choice(STEPS)(rng, name, thing, held)
        if step is not None:
            sentence, line, held = step
            story.append(sentence)
            lines.append(line)
    story.append(f"How many {thing} does {name} have now?")
    return {"question": " ".join(story), "answer": "\n".join([*lines, f"#### {held}"])}


def make_rows(num_rows: int, *, seed: int) -> list[dict[str, str]]:
    """`num_rows` problems, no question twice."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < num_rows:
        row = make_problem(rng)
        rows.setdefault(row["question"], row)
    return list(rows.values())


def main() -> None:
    """Parse the options and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("word_problems.jsonl"))
    options = parser.parse_args()
    rows = make_rows(options.rows, seed=options.seed)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    longest = max(len(row["answer"]) for row in rows)
    shortest = min(len(row["answer"]) for row in rows)
    print(f"{options.out}: {len(rows)} rows, answers of {shortest} to {longest} characters")


if __name__ == "__main__":
    main()
