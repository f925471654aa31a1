"""guide: the Markdown files that come with the package, in the terminal."""

from __future__ import annotations

import json

import pytest

from modelmerge import guides
from tests.support.commands import run


def test_guides_are_listed_with_their_first_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "guide", "--json")
    assert code == 0
    listed = json.loads(out)["guides"]
    assert [guide["guide"] for guide in listed] == list(guides.names())
    assert all(guide["summary"] and "\n" not in guide["summary"] for guide in listed)
    code, out, _ = run(capsys, "guide")
    assert all(name in out for name in guides.names())
    assert run(capsys, "guide", "-q")[1].split() == list(guides.names())


@pytest.mark.parametrize("name", guides.names())
def test_a_guide_is_plain_markdown_where_no_person_reads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = guides.read(name)
    assert run(capsys, "guide", name) == (0, text.rstrip("\n") + "\n", "")
    assert json.loads(run(capsys, "guide", name, "--json")[1]) == {"guide": name, "text": text}


def test_a_near_name_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "guide", "modles")
    assert (code, out) == (2, "")
    assert "did you mean 'models'?" in err
