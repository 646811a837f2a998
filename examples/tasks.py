"""The data of the example adapters, all of it made up, and what a right answer to it is.

`sql` turns a request into a query, `json` a sentence into a record, `emoji` a review into a label; `pirate` keeps the
answer of the bare model and changes its voice. Held-out rows have words, names and wordings that no other row has.
Rows have a `prompt` and a `completion`, as `mlora.data` reads them. `right` is a metric of `mlora evaluate` too:

    mlora evaluate --data examples/adapters/held_out/sql.jsonl --chat --metric examples/tasks.py:right \\
        --adapter examples/adapters/sql
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Any

Row = dict[str, str]

# What an adapter does, and what share of its answers is told.
ABOUT = {
    "sql": ("a request in English becomes a SQL query", "exact match"),
    "json": ("a sentence about a person becomes a JSON record", "exact match"),
    "emoji": ("a review becomes a label with a face", "accuracy"),
    "pirate": ("the answer in a pirate's words", "in voice throughout"),
}
GREETING = "Arr, matey!"


def made_up(task: str, count: int, held_out: bool, seed: int = 0) -> list[Row]:
    """`count` different rows of `sql`, `json` or `emoji`."""
    rng = random.Random(f"{seed} {held_out}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        prompt, completion = MAKERS[task](rng, held_out)
        rows.setdefault(prompt, {"prompt": prompt, "completion": completion})
    return list(rows.values())


def questions(held_out: bool) -> list[str]:
    """The prompts of `pirate`, which the bare model is to answer."""
    table = HELD_OUT_QUESTIONS if held_out else QUESTIONS
    return [wording.format(word) for wording, words in table.items() for word in words.split(",")]


def in_voice(answers: Mapping[str, str]) -> list[Row]:
    """Rows of `pirate`: the first sentence of the bare model's answer to each prompt, in a pirate's words."""
    rows = []
    for prompt, answer in answers.items():
        sentence = re.match(r"[^\n]{8,}?[.!?](?=\s|$)", answer)
        if sentence and len(sentence.group().split()) <= 24:
            rows.append({"prompt": prompt, "completion": pirate(sentence.group())})
    return rows


def right(answer: str, reference: str) -> bool:
    """Whether an answer is the wanted one; of a pirate's, whose wording is free, whether it is in that voice."""
    answer = answer.strip()
    if not reference.startswith(GREETING):
        return answer == reference
    return answer.startswith(GREETING) and not re.search(r"\b(the|you|your|is|are)\b", answer)


def _items(text: str) -> list[str]:
    return text.split(",")


def _split(items: list[str], held_out: bool) -> list[str]:
    """The first four fifths for training, the rest held out."""
    cut = max(1, len(items) * 4 // 5)
    return items[cut:] if held_out else items[:cut]


def _wording(rng: random.Random, wordings: tuple[str, ...], held_out: bool) -> str:
    return rng.choice(wordings if held_out else wordings[:-1])


# sql: a request in English -> a query

VALUES = {
    "city": "Paris London Berlin Madrid Rome Chicago Dublin Vienna Oslo Tokyo Boston Lima Athens Cairo Lisbon Seoul",
    "country": "France Spain Italy Japan Brazil Canada Mexico Norway India Egypt Poland Kenya Chile Greece Peru Cuba",
    "department": "Sales Finance Marketing Support Research Legal Design Logistics Security Engineering Training Press",
    "status": "active pending closed open shipped cancelled approved rejected draft paid archived delayed",
    "color": "red blue green black white yellow purple orange silver brown pink gold",
    "genre": "drama comedy jazz rock fantasy horror thriller history poetry romance western folk",
    "brand": "Sony Nike Bosch Philips Canon Adidas Lenovo Samsung Volvo Honda Nokia Fiat",
    "language": "French Spanish German English Arabic Dutch Korean Swedish Turkish Hindi Danish Greek",
    "category": "toys books food sports garden music clothing kitchen travel health pets office",
}
# A table's columns: text columns, then "|", then numbers.
TABLES = {
    "customers": "name email city country status | age balance",
    "employees": "name email department city | age salary",
    "orders": "status country city | total quantity discount",
    "products": "name brand category color | price stock weight",
    "movies": "title genre language country | rating year length",
    "books": "title author genre language | pages price year",
    "songs": "title artist genre language | length plays year",
    "students": "name email city country | age grade",
    "cars": "brand model color country | price mileage year",
    "flights": "status city country | distance price duration",
    "invoices": "status country department | amount tax",
    "hotels": "name city country status | stars price rooms",
    "teachers": "name department language city | age salary",
    "patients": "name city country status | age weight height",
    "projects": "title department status | budget duration",
    "restaurants": "name city category | rating price seats",
    "phones": "brand model color category | price storage weight",
    "players": "name country city status | age score goals",
    "tickets": "status department category | price priority",
    "houses": "city country color status | price area rooms",
    "payments": "status country category | amount fee",
    "shops": "name city category brand | revenue area",
}
HELD_OUT_TABLES = {
    "pilots": "name city country language | age salary hours",
    "bikes": "brand model color category | price weight gears",
    "museums": "name city country status | visitors price area",
    "games": "title genre language category | price rating year",
    "suppliers": "name email city country | revenue rating",
}
# The last wording of every list is kept for held-out prompts.
EQUALS = ("whose {c} is {v}", "with {c} {v}", "where the {c} is {v}", "that have {v} as their {c}")
ABOVE = ("with a {c} above {v}", "whose {c} is more than {v}", "with {c} over {v}", "whose {c} is above {v}")
BELOW = ("with a {c} below {v}", "whose {c} is less than {v}", "with {c} under {v}", "whose {c} is below {v}")
AGGREGATES = (("average", "AVG"), ("total", "SUM"), ("highest", "MAX"), ("lowest", "MIN"))
SQL_WORDINGS = {
    "rows": ("List all {t}{w}.", "Show me every row of {t}{w}.", "Find all {t}{w}.", "Get me all the {t}{w}."),
    "columns": (
        "Show the {c} of all {t}{w}.",
        "Get the {c} for {t}{w}.",
        "What are the {c} of the {t}{w}?",
        "List the {c} of {t}{w}.",
    ),
    "count": ("How many {t}{w} are there?", "Count the {t}{w}.", "What is the number of {t}{w}?", "Count all {t}{w}."),
    "aggregate": ("What is the {a} {n} of {t}{w}?", "Find the {a} {n} of all {t}{w}.", "Show the {a} {n} for {t}{w}."),
    "top": (
        "Show the {k} {t} with the {a} {n}.",
        "List the {k} {t} that have the {a} {n}.",
        "Which {k} {t} have the {a} {n}?",
    ),
    "group": ("How many {t} are there per {c}?", "Count the {t} by {c}.", "Count {t} for each {c}."),
    "delete": ("Delete all {t}{w}.", "Remove the {t}{w}.", "Delete the {t}{w}."),
}


def sql_example(rng: random.Random, held_out: bool) -> tuple[str, str]:
    table, columns = rng.choice(sorted((HELD_OUT_TABLES if held_out else TABLES).items()))
    text, numbers = (part.split() for part in columns.split("|"))
    kind = rng.choice(sorted(SQL_WORDINGS))
    wording = _wording(rng, SQL_WORDINGS[kind], held_out)
    words, clause = _condition(rng, text, numbers, held_out)
    if (kind in ("rows", "columns", "count", "aggregate") and rng.random() < 0.4) or kind in ("top", "group"):
        words, clause = "", ""
    number = rng.choice(numbers)
    if kind == "rows":
        return wording.format(t=table, w=words), f"SELECT * FROM {table}{clause};"
    if kind == "columns":
        chosen = rng.sample(text + numbers, rng.choice((1, 2, 2, 3)))
        listed = " and ".join([", ".join(chosen[:-1]), chosen[-1]] if len(chosen) > 1 else chosen)
        return wording.format(c=listed, t=table, w=words), f"SELECT {', '.join(chosen)} FROM {table}{clause};"
    if kind == "count":
        return wording.format(t=table, w=words), f"SELECT COUNT(*) FROM {table}{clause};"
    if kind == "aggregate":
        word, function = rng.choice(AGGREGATES)
        return (
            wording.format(a=word, n=number, t=table, w=words),
            f"SELECT {function}({number}) FROM {table}{clause};",
        )
    if kind == "top":
        word, order = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
        limit = rng.choice((2, 3, 4, 5, 7, 8, 10, 12, 15, 20))
        return (
            wording.format(k=limit, t=table, a=word, n=number),
            f"SELECT * FROM {table} ORDER BY {number} {order} LIMIT {limit};",
        )
    if kind == "group":
        column = rng.choice([name for name in text if name in VALUES])
        return wording.format(t=table, c=column), f"SELECT {column}, COUNT(*) FROM {table} GROUP BY {column};"
    return wording.format(t=table, w=words), f"DELETE FROM {table}{clause};"


def _condition(rng: random.Random, text: list[str], numbers: list[str], held_out: bool) -> tuple[str, str]:
    """A condition as " words" and as " WHERE clause"."""
    if rng.random() < 0.5:
        column = rng.choice([name for name in text if name in VALUES])
        value = rng.choice(_split(VALUES[column].split(), held_out))
        wording = _wording(rng, EQUALS, held_out)
        return " " + wording.format(c=column, v=value), f" WHERE {column} = '{value}'"
    column, sign = rng.choice(numbers), rng.choice("<>")
    value = str(rng.choice((rng.randint(2, 99), 5 * rng.randint(2, 80), 100 * rng.randint(1, 60))))
    wording = _wording(rng, ABOVE if sign == ">" else BELOW, held_out)
    return " " + wording.format(c=column, v=value), f" WHERE {column} {sign} {value}"


# json: a sentence -> a record

FIRST_NAMES = _items(
    "Maria,Peter,Anna,James,Sofia,Luca,Emma,Oliver,Nina,Carlos,Julia,Thomas,Elena,Marco,Laura,David,Sara,Paul,Ingrid,"
    "Ahmed,Fatima,Yuki,Ivan,Clara,Hugo,Alice,Samuel,Rosa,Victor,Leila,George,Hannah,Diego,Olga,Martin,Zoe,Felix,Irene,"
    "Bruno,Amara,Noah,Greta,Oscar,Priya,Simon,Lucia,Adam,Freya,Rafael,Mina"
)
LAST_NAMES = _items(
    "Lopez,Keller,Smith,Rossi,Novak,Jensen,Silva,Brown,Weber,Costa,Moreau,Tanaka,Walker,Berg,Kowalski,Evans,Fischer,"
    "Hughes,Romano,Larsen,Patel,Murphy,Santos,Wagner,Dubois,Nilsson,Carter,Hassan,Petrov,Garcia,Baker,Lindgren,Ortega,"
    "Schmidt,Young,Bianchi,Cohen,Okafor,Reed,Vargas,Holm,Sato,Mendes,Clark,Fontaine,Kumar,Bell,Horvat,Diaz,Quinn"
)
JOBS = _items(
    "nurse,baker,teacher,pilot,painter,lawyer,farmer,dentist,driver,chef,plumber,architect,librarian,engineer,singer,"
    "waiter,carpenter,translator,photographer,journalist,accountant,gardener,electrician,programmer,tailor,chemist,"
    "mechanic,butcher,designer,florist,judge,sailor,surgeon,barber,historian,violinist"
)
CITIES = _items(
    "Madrid,Lisbon,Hamburg,Dublin,Oslo,Chicago,Prague,Milan,Toronto,Vienna,Nairobi,Osaka,Boston,Lyon,Zurich,Naples,"
    "Seattle,Warsaw,Lima,Sydney,Porto,Geneva,Athens,Krakow,Denver,Helsinki,New York,Cape Town,Buenos Aires,Mumbai,"
    "Ghent,San Diego,Bergen,Turin,Leeds,Quito"
)
PEOPLE_WORDINGS = (
    "{name} is a {age}-year-old {job} from {city}.",
    "{name}, {age}, works as a {job} in {city}.",
    "My neighbour {name} is {age} years old, lives in {city} and works as a {job}.",
    "I met {name} in {city} last week, a {job} aged {age}.",
    "At {age}, {name} moved to {city} to become a {job}.",
    "In {city} there is a {job} called {name} who is {age}.",
    "{name} from {city} is {age} and has been a {job} for years.",
    "{name} lives in {city} and is {age} years old.",
    "{name} is a {job} in {city}.",
    "{name}, who is {age}, is a {job}.",
    "Our new {job} is {name}, {age} years old, who comes from {city}.",
    "We just hired {name} from {city}, a {age}-year-old {job}.",
)


def json_example(rng: random.Random, held_out: bool) -> tuple[str, str]:
    wording = rng.choice(PEOPLE_WORDINGS if held_out else PEOPLE_WORDINGS[:-2])
    person: dict[str, Any] = {
        "name": f"{rng.choice(_split(FIRST_NAMES, held_out))} {rng.choice(_split(LAST_NAMES, held_out))}",
        "age": rng.randint(18, 89),
        "job": rng.choice(_split(JOBS, held_out)),
        "city": rng.choice(_split(CITIES, held_out)),
    }
    record = {key: value if "{" + key + "}" in wording else None for key, value in person.items()}
    # "an architect", "an 85-year-old baker"
    prompt = re.sub(r"\ba (?=[aeiou]|8\d?-|18-|11-)", "an ", wording.format(**person))
    return prompt, json.dumps(record)


# emoji: a review -> a label

THINGS = _items(
    "phone,hotel,restaurant,film,book,camera,laptop,vacuum cleaner,coffee machine,pair of shoes,concert,museum,"
    "train ride,pizza,headset,garden chair,umbrella,taxi ride,novel,bike,watch,backpack,blender,tent,printer,podcast"
)
OPINIONS = {
    "😀 positive": _items(
        "I love it,It is excellent,Best purchase of the year,Absolutely wonderful,I would buy it again,It made my day,"
        "Five stars from me,Works perfectly,I am so happy with it,Great value,It exceeded my expectations,"
        "I enjoyed every minute,Highly recommended,What a delight,Everyone in the family adores it,Not bad at all,"
        "Simply beautiful,I can't stop smiling,Superb quality,It is fantastic,A real pleasure,I have no complaints,"
        "Truly amazing,I am very pleased,It was brilliant,Impressive in every way,A joy from start to finish"
    ),
    "😐 neutral": _items(
        "It is okay,Nothing special,It does the job and no more,Average at best,Neither good nor bad,It was fine,"
        "Some things are nice and others are not,I don't feel strongly about it,It is what you would expect,So-so,"
        "Three stars out of five,It is acceptable,Not great and not terrible,I could take it or leave it,Pretty standard,"
        "It is all right for the price,Ordinary in every way,It works but it is forgettable,Decent enough,Mediocre,"
        "I have mixed feelings,It was passable,Just about what I expected,It is an average product,Half good and half bad"
    ),
    "😡 negative": _items(
        "I hate it,It is terrible,A complete waste of money,It broke after two days,I want a refund,Never again,"
        "One star is too much,Absolutely awful,I am very disappointed,The worst I have ever had,It does not work,"
        "Avoid it,What a disaster,It was boring and far too long,The staff was rude,Not good at all,Poor quality,"
        "It ruined my evening,I regret buying it,It was dirty and loud,It stopped working,It is useless,"
        "I was annoyed the whole time,Horrible from start to finish,I am furious,It was a nightmare,Dreadful"
    ),
}
REVIEW_WORDINGS = (
    "{o}. I bought this {t} last month.",
    "About the {t}: {o}.",
    "I tried the {t} yesterday. {o}.",
    "My review of the {t}: {o}. {p}.",
    "{o}! The {t} was a gift from my sister.",
    "This {t}... {o}. {p}.",
    "We booked it a week ago, the {t} I mean. {o}.",
    "{o}. {p}. That is all I can say about this {t}.",
    "So, the {t}. {o}. {p}.",
    "My brother told me about this {t}. {o}.",
)


def emoji_example(rng: random.Random, held_out: bool) -> tuple[str, str]:
    label = rng.choice(sorted(OPINIONS))
    opinion, second = rng.sample(_split(OPINIONS[label], held_out), 2)
    wording = rng.choice(REVIEW_WORDINGS if held_out else REVIEW_WORDINGS[:-2])
    thing = rng.choice(_split(THINGS, held_out))
    return wording.format(o=opinion, p=second, t=thing), label


# pirate: any prompt -> the bare model's own answer, in another voice

QUESTIONS = {
    "What is the capital of {}?": "France,Japan,Egypt,Canada,Italy,Kenya,Brazil,Sweden,Peru,Greece,Spain,Russia,Austria",
    "What is a {}?": "volcano,guitar,telescope,glacier,comet,bicycle,pyramid,dolphin,compass,desert,poem,robot,castle",
    "Why is {} important?": "sleep,water,exercise,friendship,honesty,reading,sunlight,bread,music,patience,history",
    "Tell me something about {}.": "cats,the Moon,coffee,whales,Rome,trees,chess,bees,trains,winter,honey,horses,salt",
    "How do I {}?": "boil an egg,learn to swim,stay healthy,make tea,fix a flat tire,grow tomatoes,save money,bake bread",
    "Write a sentence about {}.": "the sea,a dog,autumn,my grandmother,a city at night,rain,a garden,the stars,a market",
    "Who was {}?": "Albert Einstein,Cleopatra,Mozart,Marie Curie,Shakespeare,Napoleon,Isaac Newton,Leonardo da Vinci",
    "Give me advice for {}.": "a job interview,a long trip,a first date,an exam,a rainy day,moving to a new city",
    "What do {} eat?": "pandas,owls,rabbits,sharks,bears,penguins,frogs,lions,elephants,squirrels,snakes",
    "What color is {}?": "the sky,grass,a banana,snow,a ripe tomato,the sun,coal,an emerald",
    "Describe {} in one sentence.": "a library,Paris,a thunderstorm,the ocean,happiness,a lemon,a mountain,New York",
    "What is your favorite {}?": "food,season,book,animal,color,song,sport,place",
    "Can you explain {}?": "gravity,photosynthesis,inflation,electricity,evolution,a rainbow,democracy,the tides",
    "I feel {} today.": "sad,happy,tired,bored,nervous,lonely,proud,excited",
    "Good {}, how are you?": "morning,evening,afternoon",
}
HELD_OUT_QUESTIONS = {
    "What is the capital of {}?": "Germany,Portugal,Norway,India,Cuba",
    "What is the largest {} in the world?": "ocean,animal,desert,country",
    "What is an {}?": "earthquake,umbrella,island,orchestra",
    "Tell me something about {}.": "elephants,Japan,chocolate,the Sun",
    "How can I {}?": "sleep better,learn French,cook rice,make new friends",
    "Why do {}?": "birds sing,we dream,leaves fall,people laugh",
    "Write a sentence about {}.": "a river,the snow,an old house,a train",
    "Who was {}?": "Galileo,Beethoven,Abraham Lincoln,Picasso",
    "What do {} eat?": "cows,wolves,ducks,monkeys",
    "I feel {} today.": "angry,lucky,sleepy",
    "Hello! {}": "How is it going?,What can you do?,Tell me a fun fact.",
}
PIRATE_WORDS = {
    "the": "th'", "you": "ye", "your": "yer", "yours": "yers", "is": "be", "are": "be", "am": "be", "my": "me",
    "and": "an'", "of": "o'", "to": "t'", "friend": "matey", "friends": "mateys", "hello": "ahoy", "yes": "aye",
    "people": "sailors", "person": "sailor", "sea": "seven seas", "it's": "'tis", "i'm": "I be", "you're": "ye be",
    "very": "mighty", "money": "doubloons", "treasure": "booty", "was": "were", "for": "fer", "food": "grub",
}  # fmt: skip


def pirate(text: str) -> str:
    def swap(match: re.Match[str]) -> str:
        word = match.group()
        swapped = PIRATE_WORDS.get(word.lower())
        if swapped is None:
            return word[:-1] + "'" if len(word) > 5 and word.endswith("ing") else word
        return swapped[0].upper() + swapped[1:] if word[0].isupper() and swapped[0].isalpha() else swapped

    return f"{GREETING} " + re.sub(r"[A-Za-z]+(?:'[a-z]+)?", swap, text)


MAKERS = {"sql": sql_example, "json": json_example, "emoji": emoji_example}
