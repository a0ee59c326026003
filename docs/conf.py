"""The documentation site: `make docs`. Offline, warnings are errors, notebooks run on the cells that scanpy ships."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The tree that the pages describe, here, in the directives and in what notebooks start; and the command beside Python.
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# Threads that wait must not spin: a notebook and what it starts would take the cores from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# As wide as the pages are.
os.environ["COLUMNS"] = "72"
# A bar for notebooks is not missed, and the warning shows where the environment lies.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
# Shell cells of notebooks: IPython's own pass on their output in pieces, which myst-nb takes for lines.
STARTUP = Path(tempfile.mkdtemp()) / "profile_default" / "startup"
STARTUP.mkdir(parents=True)
shutil.copy(Path(__file__).with_name("shell_cells.py"), STARTUP)
os.environ["IPYTHONDIR"] = str(STARTUP.parents[1])
atexit.register(shutil.rmtree, STARTUP.parents[1], ignore_errors=True)

import xtrimogene  # noqa: E402

project = "xtrimogene"
author = "the xtrimogene developers"
copyright = author
release = version = xtrimogene.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "directives",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
# Names in single backticks of docstrings are code.
default_role = "code"
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# The signature stands above; torch's and the Hub's members are theirs.
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Options begin with two hyphens, which typography would make a dash of.
smartquotes = False
html_theme = "sphinx_book_theme"
html_title = "xtrimogene"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
