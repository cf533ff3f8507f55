"""Pages, and the audits that tests of pages are about."""

import math
import re
from html.parser import HTMLParser

from sophon.auditing.masking import Masking, Norms, Seen
from sophon.report.audit import write_reports
from tests.auditing.records import attempt, audit, duo, idle, oracle, searched, trio

EVIL = "<script>alert('$x_1$')</script>|`&`"
MASKING = Masking(
    [Norms("layers", 3, 3.1, 1.5, 6.6)],
    [
        Seen("fresh", "gradient", 0.0065, 0.26, 0.025),
        Seen("fresh", "loss", math.nan, 1.0, math.nan),
        Seen("kept", "gradient", 3.3e9, 1.0, 3.3e9),
    ],
    {},
)
TRIALS = [
    {"number": n, "state": state, "value": value, "strategy": {"optimizer": "adam", "lr": 0.5}}
    for n, (value, state) in enumerate([(41.0, "complete"), (12.0, "pruned"), (None, "failed"), (58.5, "complete")])
]
SEARCHES = [
    {"name": "found", "role": role, "sampler": "tpe", "budget": 4, "steps": 30, "trials": TRIALS, "best": 3}
    for role in ("protected", "unprotected", "scratch")
]


def small(**context):
    """Three attacks, one of each exposure, on two seeds."""
    kinds = {"momentum": ("seen", []), "patient": ("longer", ["steps"]), EVIL: ("held_out", ["lr", "optimizer"])}
    attempts = [
        one
        for name, (exposure, outside) in kinds.items()
        for seed in range(2)
        for one in trio(name, 21.0 + seed, 60.0 + seed, 50.0 + seed, seed=seed, exposure=exposure, outside=outside)
    ]
    return audit(attempts, **context)


def several(**context):
    """Attacks of two lengths, a search, an operation, controls and benign fine-tuning."""
    renormalise = {"surgery": [{"operation": "renormalise"}], "steps": 30}
    attempts = [
        *trio("short", 30.0, 60.0, 40.0, strategy={"steps": 30}),
        *trio("long", 54.0, 60.0, 40.0, strategy={"steps": 120}, exposure="longer"),
        *trio("renormalised", 20.0, 50.0, 0.0, strategy=renormalise)[:2],
        *searched("found", 58.0, 64.0, 44.0, trials=4),
        *idle(5.0, 15.0, 10.0),
        *duo("short", 70.0, 75.0),
        oracle(75.0, attack="short"),
        attempt("short", "protected", None, seed=1, strategy={"steps": 30}),
    ]
    return audit(attempts, searches=SEARCHES, masking=MASKING, left_out={"lora": "it has <no> layers"}, **context)


def write(folder, found):
    write_reports(folder, found)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


class Parsed(HTMLParser):
    """Collects tags, attributes and text, and checks that tags match."""

    VOID = ("meta", "link", "br", "wbr", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check(page):
    """Check that a page is well-formed, loads nothing, and has its colours from the style; return its text."""
    parsed = Parsed(page)
    assert not {"script", "link", "iframe", "object", "image"} & set(parsed.tags)
    assert re.findall(r"https?://|@import|<b>", page) == []
    for name, value in parsed.attributes:
        assert name not in ("srcset", "data", "action")
        assert name != "src" or value.startswith("data:image/png;base64,")
        assert name != "href" or value.startswith("#") or re.fullmatch(r"[.\w/%-]*report\.html", value)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    drawn = page[page.find("<svg") : page.rfind("</svg>")]
    assert re.search(r"(fill|stroke): #(?!ffffff)", drawn) is None
    for variable in set(re.findall(r"var\((--[a-z]+)\)", page)) - {"--level"}:
        assert page.count(f"{variable}: #") == 2, variable  # light and dark
    return re.sub(r"\s+", " ", "".join(parsed.words))


def rows(markdown, title):
    """The cells of the first table below a title, spaces taken off."""
    table_ = re.search(r"(?:^\|.*\n)+", markdown[markdown.index(title) :], re.MULTILINE).group()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table_.splitlines() if "| ---" not in line
    ]
