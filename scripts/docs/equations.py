r"""Equations of the documentation as inline SVG, drawn while the site is built: no script, no font, no request.

Pages hold them as ``math`` fences in LaTeX, which repository browsers render, too. matplotlib's mathtext sets them; it
knows no environments, so a fence holds one equation. Its SVG takes the colour of the text around it and is labelled
with the LaTeX source for readers that do not see it.
"""

from __future__ import annotations

import io
import re
import zlib
from xml.etree import ElementTree

import matplotlib

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
FONT_POINTS = 10.0
# A little larger than the text: indices of indices must stay legible.
SCALE = 1.1


def equation(latex: str) -> str:
    """HTML of one display equation, on one line so that Markdown leaves it alone.

    Raises:
        ValueError: mathtext cannot set it.
    """
    matplotlib.use("svg")
    from matplotlib import mathtext

    source = " ".join(latex.split())
    drawing = io.BytesIO()
    style = {"svg.fonttype": "path", "svg.hashsalt": source, "mathtext.fontset": "cm", "savefig.transparent": True}
    with matplotlib.rc_context(style):
        try:
            mathtext.math_to_image(f"${source}$", drawing, format="svg", color="black")
        except ValueError as error:
            raise ValueError(f"equation cannot be set: {source}\n{error}") from error
    return f'<div class="equation">{_inline(drawing.getvalue(), source)}</div>'


def _inline(document: bytes, source: str) -> str:
    """The bare drawing: text colour, sizes in em, identifiers of its own."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(document)
    for child in list(root):
        if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}defs"):
            root.remove(child)  # the file's date, and matplotlib's style sheet, which would reach the whole page
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    root.attrib.update(
        width=f"{SCALE * width / FONT_POINTS:.2f}em",
        height=f"{SCALE * height / FONT_POINTS:.2f}em",
        role="img",
        fill="currentColor",
    )
    root.attrib["aria-label"] = source
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r"fill:\s*(#000000|black);?", "fill: currentColor", text)
    # Glyphs are defined in each drawing; the same identifier twice in a page is invalid.
    prefix = f"e{zlib.crc32(source.encode()):08x}-"
    text = re.sub(r'(?<= )id="', f'id="{prefix}', text).replace('xlink:href="#', f'xlink:href="#{prefix}')
    return re.sub(r">\s+<", "><", text).replace("\n", " ")
