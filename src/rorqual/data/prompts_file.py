"""Files of open prompts, to which there is no one right answer."""

from rorqual.data.corpus import RECORDS, find_files, read_records
from rorqual.errors import UserError

FIELDS = ("prompt", "question")  # the first of these that a record has


def read_prompts(path: str) -> list[str]:
    """The prompts of a .jsonl(.gz) or .parquet file, each once, in its order. Raises UserError naming file and line."""
    found: dict[str, None] = {}
    for file in find_files(path, RECORDS):
        for where, record in read_records(file):
            value = next((record[name] for name in FIELDS if name in record), None)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{where}: field prompt (or question) is not text; add it")
            found[value] = None
    if len(found) < 2:
        raise UserError(f"{path} has {len(found)} different prompts; pairs need two at least")
    return list(found)
