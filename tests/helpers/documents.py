"""Invented documents, and JSON lines."""

import json

WORDS = "whale filters water little effort deep ocean krill song blue 12 345 café 漢字 🐋"


def make_texts(count: int) -> list[str]:
    """Documents of 1 to 40 words, all different."""
    return [f"document {i}: " + " ".join(WORDS.split()[(i * j + j) % 15] for j in range(i % 40)) for i in range(count)]


def write_jsonl(path, records):
    """Write one record a line, and return `path`."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
