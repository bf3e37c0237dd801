"""Changes to pages while MkDocs builds the site: what roles in docstrings name becomes a link, and notebooks too."""

import os
import re
from typing import Any

_NOTEBOOK = re.compile(r"`(\w+\.ipynb)`")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Lead a role to the entry of its object where the reference has one, and show it as code elsewhere."""

    def link(match: re.Match[str]) -> str:
        short, name = match.groups()
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(link, html)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Lead notebooks to Colab where a workflow of GitHub builds the site: it names the repository that Colab reads."""
    repository = os.environ.get("GITHUB_REPOSITORY")
    if page.file.src_uri != "notebooks.md" or not repository:
        return markdown
    address = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks"
    return _NOTEBOOK.sub(rf"`\1` ([open in Colab]({address}/\1))", markdown)
