"""The table of examples/README.md."""

import re

from tests.examples.scripts import EXAMPLES


def test_every_script_has_a_row():
    rows = re.findall(r"^\| \[(.*?)\]\((.*?)\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert {script.name for script in EXAMPLES.glob("*.py")} == {link for _, link in rows}
    assert all(name == link for name, link in rows)
