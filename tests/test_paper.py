"""Where the course names a section of the BLIP-2 paper, it is the section that says so.

3.1 is the architecture, 3.2 stage 1 with its three losses, 3.3 stage 2 with its soft prompts, and
3.4 data and settings.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import nbformat
import pytest
from helpers.lessons import LESSONS, NOTEBOOKS, SOLUTIONS

import blip2_edu

ROOT = NOTEBOOKS.parent
PACKAGE = sorted(Path(blip2_edu.__file__).parent.rglob("*.py"))
PAGES = [ROOT / "README.md", *NOTEBOOKS.glob("*.md"), *ROOT.glob("data/checkpoints/*/README.md")]
FILES = [*LESSONS, *sorted(SOLUTIONS.glob("*.ipynb")), *sorted(PAGES), *PACKAGE]

NUMBERS = r"\d(?:\.\d)?(?:(?:,\s*|\s+and\s+|,\s+and\s+|\s+to\s+)\d\.\d)*"
MENTION = re.compile(rf"(?:\bsections?\s+|\bsec\.\s*|§+\s*)({NUMBERS})", re.IGNORECASE)

TOPICS = {
    "3.2": r"\bIT[CMG]\b|image-text (?:contrast|match)|image-grounded|stage[ -]1"
    r"|hard(?:er)? negative|\bqueue\b|three (?:losses|objectives)",
    "3.3": r"stage[ -]2|soft (?:visual )?prompt|language[ -]model|\bLLM|\bdecoder|\bprojection\b"
    r"|figure 3",
}
ARCHITECTURE = r"Q-Former|\bBERT|\barchitecture"  # as long as nothing else is spoken of
TRAINING = r"\b(?:teach\w*|train\w*|learns?|learning)\b"
SETTINGS = r"\bbatch|\bsteps\b|\bsettings\b|\bdata\b|AdamW|learning rate|warm-up|\bGPU"


def has(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None


def sections_for(text: str) -> set[str]:
    """The sections that may stand beside such words; none means that the words do not tell."""
    found = {section for section, words in TOPICS.items() if has(words, text)}
    if not found and has(ARCHITECTURE, text) and not has(TRAINING, text):
        found = {"3.1"}
    return found | {"3.4"} if found and has(SETTINGS, text) else found


def sentences(text: str) -> list[str]:
    """Sentences, headings and items of lists, each on one line."""
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*#|>]|\d+\.)\s)|(?<=[.!?])\s+(?=[\"*(A-Z])", text)
    return [" ".join(part.split()) for part in parts]


def clauses(sentence: str) -> list[str]:
    """What a sentence says of each section, figure and table that it lists."""
    sentence = re.sub(r"(?:paper|20\d\d\)?), (?=section)", "", sentence)  # (paper, section 3.1)
    return re.split(r";|,(?: and)? (?=(?:section|figure|table)s? \d)", sentence)


def faults(text: str) -> list[str]:
    """Every mention of a section 3.x that the words around it belong to another section."""
    found = []
    for sentence in sentences(text):
        alone = len(MENTION.findall(sentence)) == 1
        for clause in clauses(sentence):
            for mention in MENTION.finditer(clause):
                named = set(re.findall(r"3\.\d", mention[1]))
                right = sections_for(clause) or (sections_for(sentence) if alone else set())
                if named and right and not named & right:
                    found.append(f"{' or '.join(sorted(right))}, not {mention[0]}: {sentence}")
    return found


def said_in(path: Path) -> str:
    """All prose of a file: of code the strings, docstrings among them, and the comments."""
    if path.suffix == ".py":
        return prose_of(path.read_text())
    if path.suffix == ".md":
        return path.read_text()
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(
        prose_of(cell.source) if cell.cell_type == "code" else cell.source for cell in cells
    )


def prose_of(code: str) -> str:
    nodes = ast.walk(ast.parse(code))
    strings = [x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    comments = "\n".join(
        token.string.lstrip("# ") if token.type == tokenize.COMMENT else ""
        for token in tokens
        if token.type in (tokenize.COMMENT, tokenize.NEWLINE)
    )
    return "\n\n".join([*strings, comments])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_right_section_is_named(path):
    assert faults(said_in(path)) == []


RIGHT = [
    "In stage 2 (paper, section 3.3):",
    "The three losses of stage 1 (paper, section 3.2): ITC, ITM, ITG.",
    "The Q-Former (Li et al. 2023, section 3.1 and figure 2).",
    "The stage-1 model (paper, section 3.2): a Q-Former and the heads that its losses need.",
    "Start a Q-Former from a BERT of the same shape, as the paper does (section 3.1).",
    "Teach the Q-Former to speak to a frozen language model (paper, section 3.3).",
    "The Q-Former without its text branch, and a projection (paper, section 3.3).",
    "BLIP kept a queue of earlier embeddings\n(section 3.2).",
    'Section 3.2, "Image-Text Matching", and figure 2; section 4.4 and its table for re-ranking.',
    "Hard negatives are drawn by similarity (§ 3.2).",
    "A soft prompt stands in front of the text (sec. 3.3).",
    "**In the paper** (Li et al. 2023): section 3.2\nand the masks; table 6 shows it without ITG.",
    "Section 3.3 and figure 3 for the loss, figure 5 for training without stage 1.",
    "Section 3.1 describes the Q-Former, figure 2 its masks, table 2 counts what stage 2 trains.",
]
SEVERAL = [  # of several sections, each with words of its own
    "Section 3.1 has the queries; section 3.3 calls the\nQ-Former a bottleneck before the LLM.",
    "Section 3.1 the Q-Former before the encoder, section 3.4 which encoders are taken.",
    "Section 3.2 and figure 2 are the three objectives, section 3.4 the data and the settings.",
    "Sections 3.2 and 3.3 tell how the Q-Former learns in stage 1 and stage 2.",
]
UNTOLD = [  # nothing to go by, or settings of a stage
    "For each row, draw a wrong column (paper, section 3.1).",
    "Teach the Q-Former what a text would say (paper, section 3.2).",
    "From its section 3.4: 250,000 steps of stage 1, with a batch of 2320.",
    "The language model stays frozen (sections 4.2 to 4.4), and section 5 names its limits.",
    "See section 3 of the paper for stage 2.",
    "Stage 2 comes next. Section 3.1 has the figure.",
]


@pytest.mark.parametrize("text", RIGHT + SEVERAL + UNTOLD)
def test_right_sections_pass(text):
    assert faults(text) == []


@pytest.mark.parametrize("text", RIGHT)
@pytest.mark.parametrize("wrong", ["3.1", "3.2", "3.3", "3.4"])
def test_any_other_section_is_found(text, wrong):
    (right,) = re.findall(r"3\.\d", text)
    assert len(faults(text.replace(right, wrong))) == (wrong != right)


@pytest.mark.parametrize("text", SEVERAL[:3])
def test_sections_that_change_places_are_found(text):
    first, second = re.findall(r"3\.\d", text)
    assert faults(text.replace(first, "?").replace(second, first).replace("?", second))


def test_docstrings_messages_and_comments_are_read():
    docstring, message = '"""Stage 1\n(section 3.1)."""\n', 'x = f"stage 2, section 3.1, {y}"\n'
    comment = "# A soft\n# prompt: § 3.4\n"
    assert len(faults(prose_of(docstring + message + comment))) == 3


def test_lessons_name_the_sections_at_all():
    named = {section for path in LESSONS for section in MENTION.findall(said_in(path))}
    assert named >= {"3.1", "3.2", "3.3", "3.4"}
