"""Sphinx configuration. The build needs no network: everything that is shown is in the repository."""

from __future__ import annotations

import shutil
from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.domains.python import PyObject
from sphinx.ext.napoleon import NumpyDocstring

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_package = metadata("stpredict-histology")
project = "stpredict"
author = "stpredict developers"
copyright = f"2026, {author}"
version = release = _package["Version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# Tutorials are committed with their outputs and rendered as they are; the tests execute them.
_docs = Path(__file__).parent
(_docs / "tutorials").mkdir(exist_ok=True)
for notebook in (_docs.parent / "tutorials").glob("*.ipynb"):
    shutil.copy2(notebook, _docs / "tutorials")  # a link would not do: MyST looks for pages from where a link leads
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
autodoc_typehints = "description"  # beside the parameters; the signature shows names and defaults
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "code"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "stpredict"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_theme_options = {
    "logo": {"image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "text": project},
    "navbar_persistent": [],  # the sidebar has the search already
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
}


# napoleon takes prose for types where it can; our docstrings leave types to the signature.


def _returns(self: NumpyDocstring, section: str) -> list[str]:
    """Render "Returns" as it is written."""
    return [*self._format_block(":returns: ", self._dedent(self._consume_to_next_section())), ""]


def _attributes(self: NumpyDocstring, section: str) -> list[str]:
    """Render "Attributes" like parameters: several may share a line, and their types are those of the class."""
    fields = self._consume_fields(multiple=True)
    typed = [(name, kind or self._lookup_annotation(name), text) for name, kind, text in fields]
    return self._format_docutils_params(typed, field_role="ivar", type_role="vartype")


def _property(self: NumpyDocstring) -> list[str]:
    """Render a property as it is written, colons included."""
    return self._dedent(self._consume_to_end())


def setup(app: Sphinx) -> None:
    """Adapt how docstrings are rendered."""
    NumpyDocstring._parse_returns_section = _returns  # type: ignore[method-assign]
    NumpyDocstring._parse_attributes_section = _attributes  # type: ignore[method-assign]
    NumpyDocstring._parse_attribute_docstring = _property  # type: ignore[method-assign]
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
