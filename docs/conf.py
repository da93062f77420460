"""The documentation site: `make docs` builds it into build/docs, and a warning is an error."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

from layerfed import __version__

project = "LayerFed"
author = "The LayerFed authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_heading_anchors = 4

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "exclude-members": "model_config",
}
autodoc_typehints = "signature"
# A page names an object once, where users import it.
add_module_names = False
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"LayerFed {__version__}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
# What a block says is a command and what it prints; only the command is copied.
copybutton_prompt_text = r"^\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# Checked by `sphinx-build -b linkcheck`, which needs a network.
linkcheck_timeout = 20
linkcheck_retries = 2
# GitHub makes the anchors of its pages in the browser.
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]

# Files beside docs/ that are pages of the site: the page includes the file.
PAGES = {
    "README.md": "quickstart.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def link_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Point links to a file beside docs/ at the page that includes it, and to a folder at nothing."""

    def target(link: re.Match[str]) -> str:
        file, _, anchor = link["target"].partition("#")
        if page := PAGES.get(file):
            return f"[{link['text']}]({page}{'#' + anchor if anchor else ''})"
        # A file is offered for download; Sphinx has nothing for a folder.
        return link[0] if "." in file else link["text"]

    beside = rf"(?:\.\./|(?={'|'.join(PAGES)}))".replace(".md", r"\.md")
    source[0] = re.sub(rf"\[(?P<text>[^\]]*)\]\({beside}(?P<target>[^)]*)\)", target, source[0])


def setup(app: Sphinx) -> None:
    """Register the change of links."""
    app.connect("source-read", link_pages)
    app.connect("include-read", lambda app, path, name, source: link_pages(app, name, source))
