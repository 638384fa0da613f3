"""Small files of zero-shot tasks in the layouts in which the data sets are published."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ["stone", "river", "tree", "salt", "light", "wind", "iron", "snow"]


def ai2_rows(count: int) -> list[dict[str, Any]]:
    """Keys may be letters or numbers, choices three to five."""
    rows = []
    for i in range(count):
        labels = "1234" if i % 2 else "ABCDE"[: 3 + i % 3]
        choices = [{"text": WORDS[(i + j) % 8], "label": label} for j, label in enumerate(labels)]
        question = {"stem": f"What is {WORDS[i % 8]}?", "choices": choices}
        rows.append({"id": str(i), "question": question, "answerKey": labels[i % 3]})
    return rows


def mmlu_rows() -> list[dict[str, Any]]:
    import lm_eval

    files = (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml")
    rows: list[dict[str, Any]] = []
    for i, subject in enumerate(sorted(path.stem.removeprefix("mmlu_") for path in files)):
        rows += [
            {"subject": subject, "split": split, "question": f"Is {j}?", "choices": WORDS[:4], "answer": (i + j) % 4}
            for split, count in (("dev", 1), ("test", 2 + i % 2))
            for j in range(count)
        ]
    return rows


ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "arc_easy_test.jsonl": lambda: ai2_rows(7),
    "arc_challenge_test.jsonl": lambda: ai2_rows(5),
    "openbookqa_test.jsonl": lambda: ai2_rows(4),
    "piqa_valid.jsonl": lambda: [{"goal": f"Get {w}", "sol1": "go out", "sol2": f"take the {w}"} for w in WORDS[:5]],
    "lambada_openai.jsonl": lambda: [{"text": f"There was a {w} and no other {w}"} for w in WORDS[:4]],
    "hellaswag_val.jsonl.gz": lambda: [
        {
            "ind": i, "activity_label": "Walking", "ctx_a": "A man walks. [title]", "ctx_b": "the man", "ctx": "",
            "label": i % 4, "endings": [f"sees {w}." for w in WORDS[i : i + 4]],
        }
        for i in range(5)
    ],
    "winogrande_dev.jsonl": lambda: [
        {"sentence": f"The {w} hit the tree and _ broke.", "option1": w, "option2": "tree", "answer": "12"[i % 2]}
        for i, w in enumerate(WORDS[:6])
    ],
    "boolq_val.jsonl.gz": lambda: [
        {"question": f"is {w} hot", "passage": f"On {w}.", "label": bool(i % 2)} for i, w in enumerate(WORDS[:5])
    ],
    "mmlu_dev_test.jsonl.gz": mmlu_rows,
}  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_task_files(folder: Path) -> Path:
    """Writes all of them into ``folder`` and returns it."""
    for name, rows in ROWS.items():
        write_rows(folder / name, rows())
    (folder / "piqa_valid_labels.lst").write_text("0\n1\n1\n0\n1\n")
    return folder
