"""Texts to run on: plain ones, and ones with facts planted and asked for at the end.

    python3 bench/quality/cases.py TEXTS OUT --set dev|test [--only KIND]    writes harder recall cases: OUT/SET-KIND-LENGTH-SEED.{txt,json}

TEXTS holds dev.txt and test.txt (units separated by NUL bytes) and recall/. The format is that of make_recall.py: ` The access code of NAME is 123456. `
in the text, `\\nWhat is the access code of NAME? 123456.` at the end. Harder kinds:

    many      64 facts in a text
    alike     16 facts whose names differ in one letter from another one's
    restated  16 facts, half of them stated again later with another code: the last one counts
"""
import argparse
import dataclasses
import glob
import json
import os
import random

ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w x z".split()
VOWELS = "a e i o u ae ia oo ou".split()
CODAS = ["", "n", "r", "s", "l", "m", "th", "x", "nd", "rk", "ck"]
KINDS = {"many": 64, "alike": 16, "restated": 16}
OFFSET = 60000
UNITS = {"dev": (1, 5, 9, 2, 3, 7, 10, 12), "test": (0, 1, 2, 3)}  # long units; the first three of dev are those of quality_table.py


@dataclasses.dataclass
class Case:
    name: str
    kind: str      # plain, recall, many, alike, restated
    text: bytes    # length - 1 bytes
    answers: list  # of {"offset", "length", "fact_offset"}, by their bytes


def units(texts, which):
    with open(os.path.join(texts, which + ".txt"), "rb") as file:
        return file.read().split(b"\0")


def plain(texts, which, length, count):
    """Slices of `length` - 1 bytes out of the middle of units, as many of them as asked for."""
    cases, found = [], units(texts, which)
    numbers = [unit for unit in UNITS[which] if unit < len(found)] or list(range(len(found)))
    for i in range(count):
        unit = numbers[i % len(numbers)]
        begin = OFFSET + i // len(numbers) * 40000
        text = found[unit][begin:begin + length - 1]
        if len(text) == length - 1:
            cases.append(Case(f"plain-{length}-{unit}-{begin}", "plain", text, []))
    return cases


def recall(folder, pattern, length):
    """Cases from files PATTERN.json and .txt of that length."""
    cases = []
    for path in sorted(glob.glob(os.path.join(folder, pattern + ".json"))):
        with open(path) as file:
            answers = json.load(file)["answers"]
        with open(path[:-5] + ".txt", "rb") as file:
            text = file.read()
        if len(text) == length - 1:
            name = os.path.basename(path)[:-5]
            kind = next((kind for kind in KINDS if f"-{kind}-" in name), "recall")
            cases.append(Case(name, kind, text, answers))
    return cases


def make_name(rng):
    return ("".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice([2, 3]))) + rng.choice(CODAS)).capitalize()


def alike(name, rng):
    """The name with one of its letters (not the first) replaced by another of the same sort."""
    at = rng.randrange(1, len(name))
    letters = "aeiou" if name[at] in "aeiou" else "bcdfghklmnprstvwz"
    return name[:at] + rng.choice([letter for letter in letters if letter != name[at]]) + name[at + 1:]


def names_of(kind, facts, rng):
    names = []
    while len(names) < facts:
        name = alike(names[-1], rng) if kind == "alike" and len(names) % 2 else make_name(rng)
        if name not in names:
            names.append(name)
    return names


def make(kind, text_units, length, seed):
    """A case: text and answers. Facts lie one in each of as many equal parts of the text, restatements in the parts after all first ones."""
    rng = random.Random(f"{kind} {length} {seed}")
    facts = KINDS[kind]
    codes = {}
    said = []  # (name, code) in the order of the text
    for name in names_of(kind, facts, rng):
        codes[name] = "%06d" % rng.randrange(10 ** 6)
        said.append((name, codes[name]))
    rng.shuffle(said)
    if kind == "restated":
        for name, _ in rng.sample(said, facts // 2):
            codes[name] = "%06d" % rng.randrange(10 ** 6)
            said.append((name, codes[name]))
    asked = rng.sample(sorted(codes), facts)
    planted = [f" The access code of {name} is {code}. ".encode() for name, code in said]
    questions = [f"\nWhat is the access code of {name}? {codes[name]}.".encode() for name in asked]
    room = length - 1 - sum(map(len, planted)) - sum(map(len, questions))
    unit = rng.choice([unit for unit in text_units if len(unit) > room + 64])
    begin = rng.randrange(len(unit) - room)
    hay, text, last, where = unit[begin:begin + room], b"", 0, {}
    for i, (fact, (name, code)) in enumerate(zip(planted, said)):
        at = int((i + rng.random()) / len(planted) * room * 0.98)
        blank = hay.find(b" ", at, at + 80)
        at = max(last, blank if blank >= 0 else at)
        text += hay[last:at]
        where[name] = len(text)  # of the last statement
        text += fact
        last = at
    text += hay[last:]
    answers = []
    for name, question in zip(asked, questions):
        text += question
        answers.append({"name": name, "answer": codes[name], "offset": len(text) - 7, "length": 6, "fact_offset": where[name]})
    return text, answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("out")
    parser.add_argument("--set", choices=["dev", "test"], required=True)
    parser.add_argument("--only", choices=sorted(KINDS))
    parser.add_argument("--length", type=int, default=16384, help="tokens, with the one that begins a sequence")
    parser.add_argument("--count", type=int, default=2)
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    for kind in [options.only] if options.only else KINDS:
        for seed in range(options.count):
            # Seeds of the two sets differ, so do their names and codes.
            text, answers = make(kind, units(options.texts, options.set), options.length, f"{options.set} {seed}")
            path = os.path.join(options.out, f"{options.set}-{kind}-{options.length}-{seed}")
            with open(path + ".txt", "wb") as file:
                file.write(text)
            with open(path + ".json", "w") as file:
                json.dump({"length": len(text), "answers": answers}, file, indent=1)


if __name__ == "__main__":
    main()
