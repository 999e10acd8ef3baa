"""The option tables of the docs are the commands' help."""

import pytest

from tools.option_tables import DOCS, TABLE, filled, names

PAGES = sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_option_tables_are_the_help(page: str) -> None:
    """If this fails: make docs"""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert filled(text) == text


def test_every_command_has_its_table_on_the_page_of_options() -> None:
    shown = [found[2] for found in TABLE.finditer((DOCS / "options.md").read_text(encoding="utf-8"))]
    assert shown == [name for name in names() if name != "bench run"]  # which is `bench`
