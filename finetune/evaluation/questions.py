"""
What finetune.evaluate asks: records with a prompt each, or MMLU's files; and numbers in answers.

A question has its "text", the "endings" that it may have, the "answer", and the "shots" before it.
Nothing here needs torch, which takes seconds to load: what is wrong with the data is said before.
"""

import glob
import itertools
import math
import os
import re

from finetune.data.templates import prompt_and_completion, template
from run.records import matching, records, table_or_json

# MMLU's own, categories.py of github.com/hendrycks/test. Unlike in lm-eval, anatomy is Other.
GROUPS = {
    "STEM": """
        abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning""",
    "Social Sciences": """
        econometrics high_school_geography high_school_government_and_politics human_sexuality
        high_school_macroeconomics high_school_microeconomics high_school_psychology
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "Humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions""",
    "Other": """
        anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects.split()}

def read_questions(s):
    """The questions of a task; of perplexity none."""
    if s.task == "perplexity":
        return []
    if s.task == "mmlu":
        return read_mmlu(s.data, s.shots, s.limit)
    return read_records(s)[: s.limit or None]


def check(s):
    """Exit with one line if what the settings name is not there. It needs no torch."""
    if s.task == "mmlu":
        if not os.path.isdir(os.path.expanduser(s.data)):
            raise SystemExit(f"error: data={s.data}: no such folder; task mmlu needs MMLU's")
    else:
        check_data(s)
    folder = os.path.expanduser(s.model)
    if os.path.isfile(folder):
        raise SystemExit(f"error: model={s.model}: is a file, where a model's folder was expected")
    if os.path.isdir(folder):
        names = " ".join(os.listdir(folder))
        if not re.search(r"\bckpt(-\d+)?\.pt\b|\bconfig\.json\b", names):
            raise SystemExit(f"error: model={s.model}: has neither ckpt.pt nor config.json")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", s.model):
        raise SystemExit(
            f"error: model={s.model}: no such folder; name a run's, a Hugging Face directory "
            "or a hub name"
        )


def check_data(s):
    """The same of texts and records."""
    paths = matching(s.data, "data")
    if s.task == "perplexity":
        return
    if not s.prompt or s.task == "choice" and not s.labels:
        labels = " and --labels" if s.task == "choice" else ""
        raise SystemExit(f"error: task {s.task} needs --prompt{labels}")
    template("prompt", s.prompt)
    template("completion", s.completion)
    for path in paths:
        table_or_json(path)


def read_records(s):
    """The questions of choice or generate."""
    words = []
    if s.task == "choice":
        words = [word.strip() for word in s.labels.split(",")]
        if len(set(words)) < max(2, len(words)) or "" in words:
            raise SystemExit(f"error: labels={s.labels}: expected two or more, all different")
    prompt = template("prompt", s.prompt)
    completion = template("completion", s.completion or (" {label}" if words else " {answer}"))

    def questions(pattern, name):
        for path in matching(pattern, name):
            for where, record in records(path, s.columns):
                try:
                    yield make_question(record, prompt, completion, words)
                except ValueError as e:
                    raise SystemExit(f"error: {path}, {where}: {e}")

    # shots are of their own file, or the first of the questions
    asked = list(questions(s.data, "data"))
    if s.shots_data:
        known = list(itertools.islice(questions(s.shots_data, "shots_data"), s.shots))
    else:
        known = asked[: s.shots]
        asked = asked[s.shots :]
    if len(known) < s.shots:
        source = s.shots_data or s.data
        raise SystemExit(f"error: {source}: {len(known)} records for {s.shots} shots")
    texts = {shot["text"] for shot in known}
    answered = sum(question["text"] in texts for question in asked)
    if answered:
        print(f"note: {answered:,} of the questions are among the shots, with their answers")
    shots = [shot["text"] + shot["solution"] + "\n\n" for shot in known]
    return [question | {"shots": shots} for question in asked]


def make_question(record, prompt, completion, words):
    """The question in a record of choice, whose labels are `words`, or of generate.

    prompt, completion: templates. Raises ValueError if there is none in it."""
    if isinstance(record, ValueError):
        raise record
    (text, _), (solution, _) = prompt_and_completion(record, prompt, completion, words)
    question = {"text": text, "solution": solution}
    if not words:
        answer = number(solution)
        if answer is None:
            raise ValueError(f"no number in the answer {solution!r}")
        return question | {"endings": [""], "answer": answer}
    # each label's, by the same template
    endings = []
    for i in range(len(words)):
        pieces = prompt_and_completion(record | {"label": i}, prompt, completion, words)
        endings.append(pieces[1][0])
    if "label" not in record:
        raise ValueError("no field 'label'")
    if len(set(endings)) < len(endings):
        raise ValueError("by the completion two labels are the same: it needs {label}")
    return question | {"endings": endings, "answer": int(record["label"])}


def read_mmlu(folder, shots, limit=0):
    """MMLU's questions, with the benchmark's prompt, less its second space before the subject."""
    questions = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "test", "*_test.csv"))):
        subject = os.path.basename(path).removesuffix("_test.csv")
        if subject not in GROUP_OF:
            print(f"note: {subject} is none of MMLU's 57 subjects: counted under Other")
        # the examples before each question
        known = []
        if shots:
            dev = os.path.join(folder, "dev", f"{subject}_dev.csv")
            for text, letter in itertools.islice(mmlu_examples(dev), shots):
                known.append(f"{text} {letter}\n\n")
            if len(known) < shots:
                raise SystemExit(f"error: {dev}: {len(known)} examples for {shots} shots")
        # the questions
        head = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        for text, letter in itertools.islice(mmlu_examples(path), limit or None):
            question = {
                "subject": subject,
                "head": head,
                "shots": known,
                "text": text,
                "answer": "ABCD".index(letter),
                "endings": [" A", " B", " C", " D"],
            }
            questions.append(question)
    return questions


def mmlu_examples(path):
    """Yield (question with its choices, the right letter) of one of MMLU's files."""
    for where, x in records(path, "question,A,B,C,D,answer"):
        why = None
        if isinstance(x, ValueError):
            why = x
        elif x["answer"] not in ("A", "B", "C", "D"):
            why = f"answer {x['answer']!r}, expected A, B, C or D"
        if why:
            raise SystemExit(f"error: {path}, {where}: {why}")
        choices = [f"{letter}. {x[letter]}" for letter in "ABCD"]
        yield "\n".join([x["question"], *choices, "Answer:"]), x["answer"]


# -----------------------------------------------------------------------------
# numbers

MINUS = "[-\u2212]"  # the sign of mathematics, too
# between groups of three digits: a comma, as LaTeX has it, too, or a space that does not break
COMMA = r"(?:\{,\}|,\\!|\\,|[,\uff0c\u00a0\u2009\u202f])"
NUMBER = re.compile(rf"""
    ((?<![\w)]){MINUS}\\?\$? | \\?\${MINUS}?)?            # a minus that is no hyphen, a dollar
    (?: (?<![\d/.])(\d{{1,15}})/([1-9]\d{{0,14}})(?![\d/]|\.\d)        # 3/4, and no date
      | ((?:\d{{1,3}}(?:{COMMA}\d{{3}})+(?!\d) | \d+)(?:\.\d+)? | \.\d+)
        (?:[eE]([+-]?\d{{1,3}})(?!\w))?)                            # the exponent of 1e5
    """, re.VERBOSE)


def number(text):
    """The number after '####', on that line; else the text's last; else None."""
    marked = text.partition("####")[2].partition("\n")[0]
    found = NUMBER.findall(marked)[:1] or NUMBER.findall(text)[-1:]
    if not found:
        return None
    sign, numerator, denominator, digits, exponent = found[0]
    digits = re.sub(r"[^\d.]", "", digits)  # without commas
    if numerator:
        value = int(numerator) / int(denominator)
    elif "." in digits or exponent or len(digits) > 300:
        value = float(f"{digits}e{exponent or 0}")
    else:
        value = int(digits)  # exact
    if not math.isfinite(value):
        return None
    return -value if re.search(MINUS, sign) else value
