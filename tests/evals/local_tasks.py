"""Tiny made-up questions in the format of the harness's data sets."""

import json

COUNT = 7


def examples(task, i):
    """Question i of a task."""
    if task == "hellaswag":
        endings = ["washes them.", "flies [title] away.", "sings loudly and for long.", "sleeps."]
        words = {"activity_label": "Cooking", "ctx_a": f"A man cuts {i} carrots.", "ctx_b": "then he"}
        return {"ind": i, **words, "endings": endings, "label": str(i % 4)}
    if task == "boolq":
        return {"passage": f"There are {i} blue boats.", "question": "are boats blue", "label": i % 2}
    if task == "copa":
        choices = {"choice1": "The street got wet.", "choice2": "The sun burnt all night."}
        return {
            "premise": f"It rained {i} days.",
            **choices,
            "question": ["cause", "effect"][i % 2],
            "label": i % 2,
        }
    if task == "piqa":
        choices = {"sol1": "Turn the lid.", "sol2": f"Hit it {i} times with a feather, and wait."}
        return {"goal": f"Open jar {i}.", **choices, "label": i % 2}
    if task == "wsc273":
        text = f"Box {i} could not hold the cup because it was too small."
        place = text.index("it was")
        words = {"quote": "it was too small", "pronoun": "it", "quote_loc": place, "pronoun_loc": place}
        return {"text": text, **words, "options": [f"Box {i}", "The cup"], "label": i % 2}
    if task == "winogrande":
        choices = {"option1": "Ann", "option2": "Beatrice", "answer": str(1 + i % 2)}
        return {"sentence": f"Ann thanked Beatrice {i} times because _ had been helped.", **choices}
    assert task == "storycloze_2016"
    story = {f"input_sentence_{n}": f"Part {n} of story {i}." for n in range(1, 5)}
    endings = {"sentence_quiz1": "It ended well.", "sentence_quiz2": "It did not end."}
    return {"story_id": str(i), **story, **endings, "answer_right_ending": 1 + i % 2}


SPLITS = {
    "hellaswag": ("train", "validation"),
    "boolq": ("train", "validation"),
    "copa": ("train", "validation"),
    "piqa": ("train", "validation"),
    "wsc273": ("test",),
    "winogrande": ("train", "validation"),
    "storycloze_2016": ("validation", "test"),
}


def write_tasks(folder):
    """A folder for --local: TASK/SPLIT.jsonl."""
    for task, splits in SPLITS.items():
        for number, split in enumerate(splits):
            file = folder / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [examples(task, 100 * number + i) for i in range(COUNT)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
