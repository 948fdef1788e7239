"""The words that generated samples are made of."""

from __future__ import annotations

from typing import Final

NAMES: Final = (
    "Ana", "Ben", "Cara", "Dan", "Ella", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Leo", "Mia", "Noah", "Olga",
    "Paul", "Rosa", "Sam", "Tara", "Uma", "Vera", "Will", "Yara", "Zoe", "Amir", "Bela", "Chen", "Dora", "Emil", "Fay",
    "Hana", "Ivan", "Jade", "Karl", "Lena", "Mona", "Nora", "Otto", "Pia", "Ravi", "Sven", "Tom", "Viktor", "Wen",
)  # fmt: skip
CITIES: Final = (
    "Oslo", "Paris", "Lima", "Cairo", "Delhi", "Rome", "Kyoto", "Quito", "Berlin", "Madrid", "Dublin", "Vienna",
    "Perth", "Boston", "Lagos", "Seoul", "Hanoi", "Porto", "Turin", "Bergen", "Malmo", "Basel", "Ghent", "Tunis",
    "Accra", "Doha", "Riga", "Sofia", "Austin", "Denver",
)  # fmt: skip
COLOURS: Final = (
    "red", "blue", "green", "amber", "black", "white", "grey", "pink", "brown", "gold", "silver", "violet", "orange",
    "yellow", "purple", "crimson",
)  # fmt: skip
ANIMALS: Final = (
    "fox", "owl", "cat", "dog", "bear", "wolf", "hare", "crow", "swan", "lion", "tiger", "horse", "goat", "seal",
    "crab", "moth", "wasp", "frog", "toad", "mole", "otter", "eagle", "whale", "shark", "camel", "zebra", "panda",
    "koala", "snake", "mouse", "sheep", "duck",
)  # fmt: skip
THINGS: Final = (
    "box", "lamp", "door", "book", "table", "chair", "clock", "stone", "river", "garden", "house", "boat", "train",
    "bridge", "tower", "mirror", "bottle", "basket", "letter", "candle", "window", "ladder", "hammer", "pencil", "coin",
    "ring", "drum", "flute", "kite", "wheel", "rope", "map", "cup", "plate", "spoon", "knife", "tent", "road", "field",
    "tree",
)  # fmt: skip
FOODS: Final = (
    "apple", "pear", "plum", "bread", "rice", "soup", "cake", "cheese", "lemon", "melon", "onion", "carrot", "peach",
    "grape", "honey", "butter",
)  # fmt: skip
VERBS: Final = (
    "book", "find", "send", "open", "close", "start", "stop", "move", "count", "check", "order", "print", "read",
    "rent", "save", "sell", "share", "sort", "track", "update",
)  # fmt: skip
NOUNS: Final = (
    "table", "room", "ticket", "order", "report", "file", "taxi", "flight", "light", "alarm", "event", "task", "note",
    "song", "photo", "parcel", "invoice", "meeting", "user", "price",
)  # fmt: skip
ATTRIBUTES: Final = ("code", "number", "price", "weight", "height", "age", "score", "size", "rank", "limit")
STRING_FIELDS: Final = {
    "name": NAMES, "city": CITIES, "colour": COLOURS, "animal": ANIMALS, "item": THINGS, "food": FOODS, "owner": NAMES,
    "place": CITIES, "target": THINGS, "pet": ANIMALS,
}  # fmt: skip
TEXT_FIELDS: Final = ("text", "title", "subject")  # several words
INTEGER_FIELDS: Final = ("age", "days", "guests", "count", "level", "size", "hours", "price", "year", "limit")
BOOLEAN_FIELDS: Final = ("urgent", "public", "paid", "quiet")
ORDINALS: Final = ("first", "second", "third", "fourth", "fifth", "sixth")
WORDS: Final = tuple(dict.fromkeys((*COLOURS, *ANIMALS, *THINGS, *FOODS)))
