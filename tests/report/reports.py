"""Audits and pages for the tests of what people read."""

import re
from html.parser import HTMLParser

from sophon.audit.metrics import summarise
from sophon.report.single import write_reports

ACCURACY = {"name": "accuracy", "unit": "%", "higher_is_better": True}
MSE = {"name": "eps-MSE", "unit": "", "higher_is_better": False}
CONTEXT = {
    "checkpoint": {"path": "out/protected", "sha256": "ab" * 32, "method": "sophon", "name": "tiny <b>"},
    "reference": {"path": "out/reference", "sha256": "cd" * 32},
    "intactness": {
        "metric": "accuracy", "unit": "%", "higher_is_better": True, "before": {"test": 73.7}, "after": {"test": 72.9},
    },
    "support": {"optimizer": {"momentum": [0.001, 0.1]}, "steps": [20, 20]},
    "domains": {"original": "cats", "restricted": "dogs"},
    "config": {"attack": {"seeds": 2}, "note": "</script><script>alert(2)</script>"},
    "packages": {"torch": "9.9.9"},
}  # fmt: skip
_NORM = {
    "protected": {"count": 3, "mean": 6.2, "least": 3.0, "most": 9.0},
    "unprotected": {"count": 3, "mean": 2.0, "least": 1.0, "most": 4.0},
    "ratio": {"count": 3, "mean": 3.1, "least": 1.5, "most": 6.6},
}
_NOTHING = {"protected": None, "unprotected": None, "ratio": None}
MASKING = {
    "measured": {
        "layers": [],
        "weights": {"layers": {"norm": _NORM, "rate": _NORM}, "channels": {"norm": _NOTHING, "rate": _NOTHING}},
        "moments": [
            {"head": head, "step": step, "quantities": {"gradient": gradient, "curvature": _NOTHING}, "weights": {}}
            for head, step, gradient in [
                ("fresh", 0, {"protected": 0.0065, "unprotected": 0.26, "ratio": 0.025}),
                ("kept", 10, {"protected": 0.5, "unprotected": 0.25, "ratio": 2.0}),
            ]
        ],
        "left_out": {},
    },
    "pairs": [
        {
            "attack": "renormalised", "without": "momentum", "operations": [{"operation": "renormalise"}],
            "gap_closed": 0.15, "gap_closed_without": 0.6, "share": 0.75,
        },
        {
            "attack": "reset", "without": "<b>weak", "operations": [{"operation": "reset_affine"}],
            "gap_closed": None, "gap_closed_without": 0.05, "share": None,
        },
    ],
    "share": 0.75,
}  # fmt: skip
EVIL = "<script>alert('$x_1$')</script>|`&`"


def attempt(attack, role, end, seed=0, exposure="seen", outside=(), metric=ACCURACY, points=4):
    curve = [{"step": 10 * i, "select": 10 + (end - 10) * i / max(points - 1, 1)} for i in range(points)]
    return {
        "schema_version": 1, "id": f"{attack}-{role}-{seed}", "attack": attack, "role": role, "seed": seed,
        "strategy": {"optimizer": "adam", "lr": 0.125}, "exposure": exposure, "outside": list(outside),
        "metric": metric, "curve": curve, "test": end + 0.25, "seconds": 1.0, "flops": 1e6, "steps": 30,
    }  # fmt: skip


def audit():
    ends = {"protected": 21, "unprotected": 60, "scratch": 50}
    kinds = {"momentum": ("seen", []), "patient": ("longer", ["steps"]), EVIL: ("held_out", ["lr", "optimizer"])}
    return [
        attempt(name, role, end + seed, seed, exposure, outside)
        for name, (exposure, outside) in kinds.items()
        for role, end in ends.items()
        for seed in range(2)
    ]


def write(folder, attempts, context=CONTEXT):
    summary = summarise(attempts, context)
    write_reports(folder, summary, attempts)
    return summary, (folder / "report.html").read_text(), (folder / "report.md").read_text()


class Page(HTMLParser):
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


def rows(markdown, title):
    """The cells of the first table below a title, spaces taken off."""
    table_ = re.search(r"(?:^\|.*\n)+", markdown[markdown.index(title) :], re.MULTILINE).group()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table_.splitlines() if "| ---" not in line
    ]
