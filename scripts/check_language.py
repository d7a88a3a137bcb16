"""Check that code, tests and docs use the field's terms: no phrase of `BANNED`, American spelling, short lines.

    python scripts/check_language.py [PATH …]

Prints each hit with the term to use instead, and exits with 1 if there are any. CONTRIBUTING.md gives the rules.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".sh", ".txt")
SKIPPED = (
    "scripts/check_language.py",
    "LICENSE",
    "recipes/data/",
    "src/lora_accel/data/neutral.txt",
    "tests/reference/",
    "constraints",
)
MAX_COLUMNS = 120

ALLOWED = {
    "scripts/make_quickstart_data.py": ("price", "grey", "want"),  # rows of the demonstration
    "tests/conftest.py": ("say",),  # a chat behind the reference losses
    "tests/test_house.py": ("goes on", "refuse", "quantised"),  # what this check has to find
}
"""Phrases that are data, by file."""

BANNED: dict[str, str] = {
    r"\bthe way back\b": "backward, the backward pass; saved for backward",
    r"\b(made|make|makes|making) again\b": "recompute, repeat",
    r"\b(go|goes|went|gone|going) on\b": "resume, continue",
    r"\bset(s|ting)? off\b": "start, run, begin training",
    r"\b(take|takes|took|taken) up\b": "restore, load",
    r"\b(put|puts) right\b": "fix, clean up after a crash",
    r"\bwhole or not at all\b": "atomic",
    r"\b(tell|tells|told)\b": "report, print, log, show; distinguish",
    r"\bsays?\b": "ask for, specify, use, pass, set (`pass --overwrite`); report, print",
    r"\brefus(e|es|ed|al|ing)\b": "check, validate, reject; in messages: is not supported, is not allowed",
    r"\bis no (folder|file|directory|adapter|checkpoint|model|number|index|tokenizer|regular)\b": "is not a ...",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bwhole\b": "full, complete, entire",
    r"\bheld in\b": "stored as, dtype of; kept in",
    r"\bdata sets?\b": "dataset",
    r"(?<!in )(?<!take )(?<!takes )\bplaces?\b(?!holder)": "position, location; in the middle of, where",
    r"\b(hostile|strangers?|foreign)\b": "untrusted",
    r"\bwithout memory\b": "on the meta device",
    r"\bwants?\b": "needs, asks for",
    r"\bend to end\b": "packed, concatenated",
    r"\broads?\b": "code path, path",
    r"\bdear(er|est)?\b": "expensive, costly",
    r"\bprice\b": "trade-off, cost",
    r"\blearned\b": "supervised, trained",
    r"\bhabit\b": "per-device batch",
    r"\bto be had\b": "available, supported",
    r"\bleast to most\b": "min-max",
    r"\b(set|step|steps|stepped) aside\b": "quarantine",
    r"\bpass(es|ed)? over\b": "skip",
    r"\bfor ever\b|\bas ever\b": "forever; as usual",
    r"\b(first|last|exactly|most|after|only) so (many|much)\b": "name the number",
    r"\bhand(s|ed)? (over|on|in)\b|\b(is|are|was) handed\b": "pass",
    r"\blook(s|ed)? after\b": "handle, manage, synchronize",
    r"\bstands?\b": "is; is stored, is listed",
    r"\blies?\b|\blaid\b": "is, are",
    r"\banew\b": "again",
    r"\bbut for\b": "except for",
    r"\bin (PEFT|FastChat|transformers)'s words\b": "under the names of ...",
    r"\*words\b": "*args",
    r"\bif need be\b": "if necessary",
    r"\btravels?\b": "is sent, is reduced together with",
    r"\b(is|are|was|were) made from\b": "depends on; the inputs of",
}
"""Pattern -> the terms to use instead. Case is ignored; `_` counts as a space, so names are checked too."""

BRITISH = (
    r"\w*(quanti|tokeni|synchroni|initiali|seriali|normali|materiali|recogni|organi|summari|optimi|minimi|maximi|"
    r"speciali|generali|utili|customi|visuali|penali|randomi|categori)s(e|es|ed|ing|ation|er)\b"
    r"|\b(colour|honour|behaviour|favour|neighbour|labour)\w*|\b(centre|catalogue|grey|licence|programme)s?\b"
    r"|\b(label|cancel|model|travel)l(ed|ing)\b|\banalyse[sd]?\b|\bjudgement\b"
)


def hits(text: str, suffix: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, phrase, what to use instead)."""
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        prose = re.sub(r"https?://\S+|(?<=\w)_(?=\w)", lambda found: " " if found[0] == "_" else "", line)
        for pattern, instead in BANNED.items():
            for found in re.finditer(pattern, prose, re.IGNORECASE):
                yield number, found[0], instead
        for found in re.finditer(BRITISH, prose, re.IGNORECASE):
            yield number, found[0], "American spelling"
        if suffix == ".md":
            in_code ^= line.lstrip().startswith("```")
            if len(line) > MAX_COLUMNS and not in_code and not line.lstrip().startswith("|") and "http" not in line:
                yield number, f"{len(line)} columns", f"at most {MAX_COLUMNS}"


def files(paths: Sequence[str]) -> list[Path]:
    """Return the files under version control, or those that will be, below some paths."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    kept = [name for name in names if name.endswith(SUFFIXES) and not name.startswith(SKIPPED)]
    return [ROOT / name for name in sorted(kept) if (ROOT / name).is_file()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the repository, or some paths of it."""
    parser = argparse.ArgumentParser(description="Check that code, tests and docs use the field's terms.")
    parser.add_argument("paths", nargs="*", metavar="PATH")
    parser.add_argument("--count", action="store_true", help="print the number of hits per file only")
    options = parser.parse_args(arguments)
    total = 0
    for file in files(options.paths):
        name = str(file.relative_to(ROOT))
        allowed = ALLOWED.get(name, ())
        found = [hit for hit in hits(file.read_text(encoding="utf-8"), file.suffix) if hit[1].lower() not in allowed]
        total += len(found)
        if options.count and found:
            print(f"{len(found):5} {name}")
        elif not options.count:
            for number, phrase, instead in found:
                print(f"{name}:{number}: {phrase!r} -> {instead}")
    if total:
        print(f"{total} phrases to replace", file=sys.stderr)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
