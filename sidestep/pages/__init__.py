"""HTML pages: plain values go into a template, one file that needs no network comes out.

Every page extends base.html.j2 and has the one stylesheet page.css; what it draws is placed by charts.py.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sidestep import __version__

FOLDER = Path(__file__).parent


def source(name: str) -> str:
    """A stylesheet or script of this folder, put into a page as it is by `|safe`."""
    return (FOLDER / name).read_text(encoding="utf-8")


# Everything that is put in is escaped; `tojson` writes no character that could end a script element.
templates = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# jinja2 gives its globals the types of its own ones, yet takes any value.
templates.globals.update(source=source, version=__version__)  # pyrefly: ignore[bad-argument-type]
templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def render(template: str, **values: Any) -> str:
    """The whole page; halves of surrogate pairs, which a file name may hold, become question marks.

    Raises jinja2.UndefinedError for a value that the template uses and that is not there, ValueError for a number in
    its data that is not finite.
    """
    return templates.get_template(template).render(values).encode("utf-8", "replace").decode("utf-8")
