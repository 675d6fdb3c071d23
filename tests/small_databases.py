"""A small shop in SQLite, with what SQL questions need: keys, days, gaps, odd names, rows without partners."""

import sqlite3
from contextlib import closing
from pathlib import Path
from random import Random

SCHEMA = """
CREATE TABLE city ("city id" INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE customer (
    customer_id INTEGER PRIMARY KEY, name TEXT NOT NULL, city INTEGER REFERENCES city, kind TEXT, phone TEXT
);
CREATE TABLE "order" (
    "order id" INTEGER PRIMARY KEY, customer_id INTEGER NOT NULL, day TEXT, "group" TEXT, price REAL, pieces INTEGER,
    FOREIGN KEY (customer_id) REFERENCES customer (customer_id)
);
CREATE TABLE part (order_id INTEGER, number INTEGER, note TEXT COLLATE NOCASE, PRIMARY KEY (order_id, number),
    FOREIGN KEY (order_id) REFERENCES "order" ("order id"));
CREATE TABLE "it's odd" ("select" INTEGER, "two
lines" TEXT, "emoji 😀" REAL);
"""


def small_database(path: Path) -> Path:
    rng = Random(0)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(SCHEMA)
        towns = ["Oslo", "Bergen", "Łódź", "O'Hara", "Rome", "Nowhere"]
        connection.executemany("INSERT INTO city VALUES (?, ?)", enumerate(towns, 1))
        homes = [city for city, count in zip(range(1, 6), (9, 7, 5, 3, 1), strict=True) for _ in range(count)]
        for number in range(1, 26):
            phone = None if number % 4 == 0 else f"+47 {number:04d}"
            row = (number, f"Person {number}", homes[number - 1], rng.choice(["private", "firm"]), phone)
            connection.execute("INSERT INTO customer VALUES (?, ?, ?, ?, ?)", row)
        for number in range(1, 81):
            day = (
                f"20{rng.randint(18, 22)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d} 0{rng.randint(0, 9)}:30:00"
            )
            group = rng.choice(["red", "dark green", "blue", "blue"])
            price = None if number % 9 == 0 else round(rng.uniform(1, 300), 2)
            row = (number, rng.randint(1, 20), day, group, price, rng.randint(1, 9))
            connection.execute('INSERT INTO "order" VALUES (?, ?, ?, ?, ?, ?)', row)
            for part in range(rng.randint(0, 3)):
                connection.execute("INSERT INTO part VALUES (?, ?, ?)", (number, part, rng.choice(["a", "A", "b"])))
        connection.executemany('INSERT INTO "it\'s odd" VALUES (?, ?, ?)', [(n, str(n), n / 3) for n in range(30)])
    return path
