"""Train the example adapters with PEFT, on a CPU, from data that this script makes up.

    python examples/train.py                       # all of them, some minutes each
    python examples/train.py sql json --steps 200  # some of them

Each adapter has an effect that shows at once on a prompt which the bare model answers in plain English:
`sql` turns a request into a query, `json` a sentence into a record, `emoji` a review into a label;
`pirate` keeps the answer and changes the voice. The adapters differ in kind (LoRA, rsLoRA, DoRA), rank, target
modules and layers. What is printed and written to README.md at the end is measured on held-out prompts, with
the weights rounded to bf16 as they are saved.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed
from mlora.cli.demo_model import MODEL_ID, resolve_model

HELD_OUT_PROMPTS = 40


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str


# helpers for the data


def _items(text: str) -> list[str]:
    return text.split(",")


def _split(items: list[str], held_out: bool) -> list[str]:
    """The first four fifths for training, the rest held out."""
    cut = max(1, len(items) * 4 // 5)
    return items[cut:] if held_out else items[:cut]


def _wording(rng: random.Random, wordings: tuple[str, ...], held_out: bool) -> str:
    return rng.choice(wordings if held_out else wordings[:-1])


def _made_up(make: Callable[[random.Random, bool], Example], seed: int, count: int, held_out: bool) -> list[Example]:
    """`count` different examples."""
    rng = random.Random(f"{seed} {held_out}")
    examples: dict[str, Example] = {}
    while len(examples) < count:
        example = make(rng, held_out)
        examples.setdefault(example.prompt, example)
    return list(examples.values())


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


def sql_example(rng: random.Random, held_out: bool) -> Example:
    table, columns = rng.choice(sorted((HELD_OUT_TABLES if held_out else TABLES).items()))
    text, numbers = (part.split() for part in columns.split("|"))
    kind = rng.choice(sorted(SQL_WORDINGS))
    wording = _wording(rng, SQL_WORDINGS[kind], held_out)
    words, clause = _condition(rng, text, numbers, held_out)
    if (kind in ("rows", "columns", "count", "aggregate") and rng.random() < 0.4) or kind in ("top", "group"):
        words, clause = "", ""
    number = rng.choice(numbers)
    if kind == "rows":
        return Example(wording.format(t=table, w=words), f"SELECT * FROM {table}{clause};")
    if kind == "columns":
        chosen = rng.sample(text + numbers, rng.choice((1, 2, 2, 3)))
        listed = " and ".join([", ".join(chosen[:-1]), chosen[-1]] if len(chosen) > 1 else chosen)
        return Example(wording.format(c=listed, t=table, w=words), f"SELECT {', '.join(chosen)} FROM {table}{clause};")
    if kind == "count":
        return Example(wording.format(t=table, w=words), f"SELECT COUNT(*) FROM {table}{clause};")
    if kind == "aggregate":
        word, function = rng.choice(AGGREGATES)
        return Example(
            wording.format(a=word, n=number, t=table, w=words), f"SELECT {function}({number}) FROM {table}{clause};"
        )
    if kind == "top":
        word, order = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
        limit = rng.choice((2, 3, 4, 5, 7, 8, 10, 12, 15, 20))
        return Example(
            wording.format(k=limit, t=table, a=word, n=number),
            f"SELECT * FROM {table} ORDER BY {number} {order} LIMIT {limit};",
        )
    if kind == "group":
        column = rng.choice([name for name in text if name in VALUES])
        return Example(wording.format(t=table, c=column), f"SELECT {column}, COUNT(*) FROM {table} GROUP BY {column};")
    return Example(wording.format(t=table, w=words), f"DELETE FROM {table}{clause};")


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


def json_example(rng: random.Random, held_out: bool) -> Example:
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
    return Example(prompt, json.dumps(record))


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


def emoji_example(rng: random.Random, held_out: bool) -> Example:
    label = rng.choice(sorted(OPINIONS))
    opinion, second = rng.sample(_split(OPINIONS[label], held_out), 2)
    wording = rng.choice(REVIEW_WORDINGS if held_out else REVIEW_WORDINGS[:-2])
    thing = rng.choice(_split(THINGS, held_out))
    return Example(wording.format(o=opinion, p=second, t=thing), label)


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


def _questions(held_out: bool) -> list[str]:
    table = HELD_OUT_QUESTIONS if held_out else QUESTIONS
    return [wording.format(word) for wording, words in table.items() for word in words.split(",")]


def pirate(text: str) -> str:
    def swap(match: re.Match[str]) -> str:
        word = match.group()
        swapped = PIRATE_WORDS.get(word.lower())
        if swapped is None:
            return word[:-1] + "'" if len(word) > 5 and word.endswith("ing") else word
        return swapped[0].upper() + swapped[1:] if word[0].isupper() and swapped[0].isalpha() else swapped

    return "Arr, matey! " + re.sub(r"[A-Za-z]+(?:'[a-z]+)?", swap, text)


def pirate_rule(answer: str) -> bool:
    return answer.startswith("Arr, matey!") and not re.search(r"\b(the|you|your|is|are)\b", answer)


# the adapters


@dataclass(frozen=True)
class Task:
    """One adapter: its data, its LoRA options and how an answer is judged."""

    about: str
    metric: str
    lora: dict[str, Any]
    make: Callable[[random.Random, bool], Example] | None = None
    voice: Callable[[str], str] | None = None
    rule: Callable[[str], bool] | None = None
    steps: int = 150
    lr: float = 2e-3

    def passes(self, answer: str, expected: str) -> bool:
        """Equal to the expected answer; for a voice, whose wording is free: in that voice."""
        return answer.strip() == expected if self.rule is None else self.rule(answer.strip())


def _layers(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


TASKS = {
    "sql": Task(
        "a request in English becomes a SQL query",
        "exact match",
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        make=sql_example,
        steps=180,
    ),
    "json": Task(
        "a sentence about a person becomes a JSON record",
        "exact match",
        {
            "r": 16,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "layers_to_transform": _layers(14, 20),
        },
        make=json_example,
        steps=110,
    ),
    "emoji": Task(
        "a review becomes a label with a face",
        "accuracy",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_dora": True,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": _layers(12, 29),
        },
        make=emoji_example,
        steps=80,
    ),
    "pirate": Task(
        "the answer in a pirate's words",
        "in voice throughout",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": _layers(10, 29),
        },
        voice=pirate,
        rule=pirate_rule,
        steps=80,
        lr=1.5e-3,
    ),
}


# training


@dataclass
class Trainer:
    model: Any
    tokenizer: Any
    console: Console
    seed: int
    bare_answers: dict[bool, dict[str, str]] = field(default_factory=dict)

    def chat(self, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))

    @torch.inference_mode()
    def answer(self, prompts: list[str], max_new_tokens: int, batch: int = 20) -> list[str]:
        """Greedy answers, without special tokens. The batch is padded on the left."""
        answers = []
        for start in range(0, len(prompts), batch):
            chats = [self.chat(prompt) for prompt in prompts[start : start + batch]]
            inputs = self.tokenizer(chats, return_tensors="pt", padding=True, padding_side="left")
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def examples(self, task: Task, held_out: bool) -> list[Example]:
        if task.make is not None:
            return _made_up(task.make, self.seed, HELD_OUT_PROMPTS if held_out else 1500, held_out)
        assert task.voice is not None
        if held_out not in self.bare_answers:
            with self.console.status("the bare model answers the prompts"):
                prompts = _questions(held_out)
                answers = self.answer(prompts, max_new_tokens=36, batch=32)
            self.bare_answers[held_out] = dict(zip(prompts, answers, strict=True))
        examples = []
        for prompt, answer in self.bare_answers[held_out].items():
            sentence = re.match(r"[^\n]{8,}?[.!?](?=\s|$)", answer)
            if sentence and len(sentence.group().split()) <= 24:
                examples.append(Example(prompt, task.voice(sentence.group())))
        return examples[:HELD_OUT_PROMPTS] if held_out else examples

    def batch(self, examples: list[Example]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs padded on the right, and the target of each position: an answer's token, or -100."""
        prompts = [self.tokenizer(self.chat(example.prompt)).input_ids for example in examples]
        answers = [self.tokenizer(example.answer + self.tokenizer.eos_token).input_ids for example in examples]
        width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        targets = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor(prompt + answer)
            mask[row, :length] = 1
            targets[row, len(prompt) - 1 : length - 1] = torch.tensor(answer)
        return {"input_ids": ids, "attention_mask": mask}, targets

    def train(self, name: str, steps: int | None, batch_size: int, out: Path) -> dict[str, float]:
        """Train one adapter, save it, and measure it with the weights as saved."""
        task = TASKS[name]
        steps = steps or task.steps
        train, held_out = self.examples(task, held_out=False), self.examples(task, held_out=True)
        with self.console.status(f"{name}: the bare model on held-out prompts"):
            bare = self.score(task, held_out)

        torch.manual_seed(self.seed)
        config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **task.lora)
        peft_model = get_peft_model(self.model, config)
        parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=task.lr, weight_decay=0.0, betas=(0.9, 0.98))
        warmup = max(1, steps // 15)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
        )
        rng = random.Random(self.seed)
        queue: list[Example] = []
        started = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=self.console) as progress:
            bar = progress.add_task(name, total=steps, loss=float("nan"))
            smooth = float("nan")
            for _ in range(steps):
                if len(queue) < batch_size:
                    queue = rng.sample(train, len(train))
                inputs, targets = self.batch([queue.pop() for _ in range(batch_size)])
                hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
                # The head is the largest matrix of the model: only on the positions that count.
                logits = self.model.lm_head(hidden[targets != -100])
                loss = torch.nn.functional.cross_entropy(logits.float(), targets[targets != -100])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                smooth = loss.item() if math.isnan(smooth) else 0.9 * smooth + 0.1 * loss.item()
                progress.update(bar, advance=1, loss=smooth)
        seconds = time.perf_counter() - started

        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(parameter.bfloat16())
        save_adapter(peft_model, out / name)
        with self.console.status(f"{name}: held-out prompts"):
            tuned = self.score(task, held_out, show=self.console)
        self.model = peft_model.unload()
        return {"bare": bare, "tuned": tuned, "seconds": seconds, "loss": smooth, "prompts": len(held_out)}

    def score(self, task: Task, examples: list[Example], show: Console | None = None) -> float:
        longest = max(len(self.tokenizer(example.answer).input_ids) for example in examples)
        answers = self.answer([example.prompt for example in examples], max_new_tokens=longest + 16)
        verdicts = [task.passes(answer, example.answer) for answer, example in zip(answers, examples, strict=True)]
        if show is not None:
            shown = sorted(range(len(examples)), key=lambda row: verdicts[row])[:6]
            for row in shown:
                mark = "ok  " if verdicts[row] else "MISS"
                show.print(f"  {mark} {examples[row].prompt}\n       {answers[row]}", markup=False, highlight=False)
                if not verdicts[row]:
                    show.print(f"       wanted: {examples[row].answer}", markup=False, highlight=False)
        return sum(verdicts) / len(verdicts)


def save_adapter(peft_model: Any, folder: Path) -> None:
    """A PEFT folder with bf16 weights, in a form that is the same on every run."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in get_peft_model_state_dict(peft_model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_model.peft_config["default"]
    config.base_model_name_or_path = MODEL_ID
    config.inference_mode = True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    written["target_modules"] = sorted(written["target_modules"])  # PEFT keeps a set
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def describe(folder: Path) -> tuple[str, str, str]:
    """Kind and rank, where it applies, and the folder's size."""
    config = json.loads((folder / "adapter_config.json").read_text())
    kind = "DoRA" if config["use_dora"] else "rsLoRA" if config["use_rslora"] else "LoRA"
    layers = config["layers_to_transform"]
    where = ", ".join(name.removesuffix("_proj") for name in config["target_modules"])
    where += f"; layers {layers[0]}-{layers[-1]}" if layers else "; all layers"
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return f"{kind}, r={config['r']}", where, f"{size:.2f} MB"


def write_readme(out: Path, results: dict[str, dict[str, float]]) -> None:
    """README.md with one table row an adapter; rows of adapters not trained this time are kept."""
    path = out / "README.md"
    old = path.read_text().splitlines() if path.is_file() else []
    rows = {line.split("`")[1]: line for line in old if line.startswith("| `")}
    for name, result in results.items():
        kind, where, size = describe(out / name)
        task = TASKS[name]
        rows[name] = (
            f"| `{name}` | {task.about} | {kind} | {where} | {size} | {task.metric} | "
            f"{result['bare']:.0%} | {result['tuned']:.0%} |"
        )
    lines = [
        "# Example adapters",
        "",
        f"Small PEFT adapters for `{MODEL_ID}`, made by `examples/train.py`, which also wrote this file.",
        "Bare and adapter: the share of held-out prompts (40 at most; words, names and wordings that were not in",
        "training) whose greedy answer is right, for the model alone and with the adapter in bf16 as saved. For `pirate` it is",
        "the voice that is judged, not the facts: every answer starts with its greeting and has no plain `the`, `is`,",
        "`are`, `you` or `your`.",
        "",
        "| adapter | effect | kind | where | size | metric | bare | adapter |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(rows[name] for name in TASKS if name in rows),
    ]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which adapters (default all): {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: each adapter's own number)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help=f"hub id or folder (default {MODEL_ID})")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "adapters")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(TASKS))
    if unknown:
        parser.error(f"unknown adapter {', '.join(unknown)}; there are {', '.join(TASKS)}")
    if args.threads:
        torch.set_num_threads(args.threads)

    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT and transformers, about each other
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    source = resolve_model(args.model)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    trainer = Trainer(model, AutoTokenizer.from_pretrained(source), console, args.seed)

    table = Table("adapter", "kind", "where", "size", "metric", "bare", "adapter", "loss", "time")
    for name in args.names or TASKS:
        result = trainer.train(name, args.steps, args.batch_size, args.out)
        write_readme(args.out, {name: result})
        table.add_row(
            name,
            *describe(args.out / name),
            TASKS[name].metric,
            f"{result['bare']:.0%}",
            f"{result['tuned']:.0%}",
            f"{result['loss']:.3f}",
            f"{result['seconds']:.0f} s",
        )
    console.print(table)


if __name__ == "__main__":
    main()
