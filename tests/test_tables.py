"""Pages show what the committed measurements say."""

import re
import shutil

import pytest
import typer

from benchmarks import tables
from benchmarks.ablation.__main__ import main as ablation

OLD = "before\n\n<!-- table:gpu-throughput -->\nold\n<!-- /table -->\n\nafter\n"


def test_committed_pages_are_up_to_date(capsys):
    with pytest.raises(typer.Exit) as end:
        tables.main(check=True)
    assert end.value.exit_code == 0, capsys.readouterr().out


def test_every_table_is_shown_somewhere():
    pages = [tables.ROOT / "README.md", *tables.ROOT.glob("docs/**/*.md")]
    shown = re.findall(r"<!-- table:([\w-]+) -->", "".join(page.read_text(encoding="utf-8") for page in pages))
    assert sorted(shown) == sorted(tables.TABLES)


def test_a_page_out_of_date_is_named_then_written_and_nothing_else_of_it_changes(tmp_path, capsys):
    (tmp_path / "README.md").write_text("No table.\n")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(OLD)
    for options, code in (({"check": True}, 1), ({"write": True}, 0), ({"check": True}, 0)):
        with pytest.raises(typer.Exit) as end:
            tables.main(**options, root=tmp_path)
        assert end.value.exit_code == code
    assert "docs/page.md: out of date" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n\n<!-- table:gpu-throughput -->\n| trainings at a time |")
    assert text.endswith("|\n<!-- /table -->\n\nafter\n")
    assert "old" not in text
    assert (tmp_path / "README.md").read_text() == "No table.\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:nothing -->\n<!-- /table -->", "no table 'nothing'; there are gpu-inference"),
        ("<!-- table:gpu-training -->\n", "1 tables begin .* 0 end"),
        ("<!-- table:gpu-training -->\n" + OLD, "2 tables begin .* 1 end"),
    ],
)
def test_mistaken_regions_are_errors(text, message):
    with pytest.raises(ValueError, match=message):
        tables.filled(text)


def test_the_committed_comparison_is_what_its_command_makes(tmp_path):
    committed = (tables.ROOT / "docs" / "table1.md").read_text(encoding="utf-8")
    command = re.findall(r"```sh\n(python -m benchmarks.ablation .*?)```", committed, re.DOTALL)[0]
    records = [tables.ROOT / name for name in re.findall(r"--report (\S+)", command)]
    assert len(records) == 3
    page = tmp_path / "table1.md"
    shutil.copy(tables.ROOT / "docs" / "table1.md", page)
    ablation(report=records, page=page)
    assert page.read_text(encoding="utf-8") == committed
    for picture in tmp_path.glob("*.svg"):
        assert f"]({picture.name})" in committed
        assert (tables.ROOT / "docs" / picture.name).exists()
