"""Writes a closed-book question set: facts that a small model can answer only once it has learned them.

Each fact is an airport's IATA code and its city. Three files of JSON lines ``{"prompt", "completion"}`` are written:
``train.jsonl``; ``trained.jsonl``, the same questions for evaluation; and ``second_wording.jsonl``, every question in
other words. The second wording is never trained on: it tells a learned fact from a memorised sentence.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

# Raw questions, since every token costs time. Both wordings end in "?": the answer is read off the same token.
FIRST_WORDING = "Which city does the airport with IATA code {code} serve?"
SECOND_WORDING = "The airport {code} is in which city?"


def choose_facts(airports: Iterable[Mapping[str, str]], count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` pairs of IATA code and city, the same for the same data, count and seed.

    A code stands for one city, and a city that has several airports is left out, so every question has one answer and
    every answer one question. Cities are single ASCII words of 4 to 6 letters, which take one to three tokens.

    Raises:
        ValueError: when the data hold fewer such airports than asked for.
    """
    airports = list(airports)
    cities_of_code: dict[str, set[str]] = {}
    airports_of_city = Counter(airport["city"].strip().casefold() for airport in airports)
    for airport in airports:
        cities_of_code.setdefault(airport["iata"].strip(), set()).add(airport["city"].strip())
    facts = sorted(
        (code, city)
        for code, cities in cities_of_code.items()
        for city in cities
        if _is_code(code) and _is_short_name(city) and len(cities) == 1 and airports_of_city[city.casefold()] == 1
    )
    if count > len(facts):
        raise ValueError(
            f"count = {count} asks for more airports than the {len(facts)} that have an unambiguous code and a "
            f"short city name; use a value from 1 to {len(facts)}"
        )
    return random.Random(seed).sample(facts, count)


def write_facts(facts: list[tuple[str, str]], folder: Path) -> None:
    """Write the three files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, wording in (("train", FIRST_WORDING), ("trained", FIRST_WORDING), ("second_wording", SECOND_WORDING)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for code, city in facts:
                # The space belongs to the completion: that is how the city is one with its tokens inside a sentence.
                example = {"prompt": wording.format(code=code), "completion": f" {city}"}
                file.write(json.dumps(example, ensure_ascii=False) + "\n")


def _is_code(code: str) -> bool:
    return len(code) == 3 and code.isascii() and code.isalpha() and code.isupper()


def _is_short_name(city: str) -> bool:
    return 4 <= len(city) <= 6 and city.isascii() and city.isalpha() and city.istitle()


def main() -> None:
    """Command line: ``python launch/facts.py --out FOLDER``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the three files into")
    parser.add_argument("--count", type=int, default=256, help="number of airports")
    parser.add_argument("--seed", type=int, default=0, help="which airports")
    args = parser.parse_args()
    import airportsdata

    write_facts(choose_facts(airportsdata.load("IATA").values(), args.count, args.seed), args.out)
    print(f"{args.count} facts, two wordings each, in {args.out}")


if __name__ == "__main__":
    main()
