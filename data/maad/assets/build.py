"""Development tool: redraws `icons-*.png`, `qr.png` and the subset fonts from the npm packages they come from.

Needs resvg-py, fonttools, brotli and segno, and the unpacked npm packages in one folder:
`@iconify-json/noto` as noto, `@iconify-json/fluent-emoji-flat` as fluent, `@fontsource/*` as fontsource-*.

    python -m data.maad.assets.build FOLDER
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image

from data.maad.vocab import PRODUCTS

HERE = Path(__file__).parent
CELL, COLUMNS = 96, 12
FONTS = {
    "montserrat": "600",
    "archivo-narrow": "700",
    "bitter": "700",
    "oswald": "600",
    "roboto-slab": "700",
    "nunito": "700",
    "inconsolata": "700",
    "fira-sans": "600",
    "zilla-slab": "700",
    "dosis": "700",
}


def icons(folder: Path, name: str) -> None:
    """Draws every product of one icon set into an atlas with COLUMNS cells per row."""
    import resvg_py

    icon_set = json.loads((folder / name / "icons.json").read_text())
    rows = -(-len(PRODUCTS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for place, product in enumerate(PRODUCTS):
        entry = icon_set["icons"][icon_set.get("aliases", {}).get(product.icon, {}).get("parent", product.icon)]
        width, height = entry.get("width", icon_set["width"]), entry.get("height", icon_set["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{entry["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=CELL, height=CELL)
        cell = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        atlas.paste(cell, (place % COLUMNS * CELL, place // COLUMNS * CELL))
    atlas.save(HERE / f"icons-{name}.png", optimize=True)


def fonts(folder: Path) -> None:
    """Reduces each font to printable ASCII and renames it."""
    from fontTools import subset
    from fontTools.ttLib import TTFont

    for place, (name, weight) in enumerate(FONTS.items()):
        (source,) = folder.glob(f"fontsource-{name}*/files/{name}-latin-{weight}-normal.woff2")
        font = TTFont(source)
        options = subset.Options(layout_features=[], hinting=False)
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=range(32, 127))
        cutter.subset(font)
        for record in font["name"].names:
            if record.nameID in (1, 3, 4, 6, 16):
                record.string = f"MAAD {place}"
        font.flavor = None
        font.save(HERE / f"{name}.ttf")


def codes() -> None:
    """Draws 24 QR codes (21 x 21 modules, one pixel per module) side by side."""
    import segno

    row = Image.new("L", (24 * 21, 21))
    for place in range(24):
        code = segno.make(f"AD.EXAMPLE/{place}", version=1, error="l", boost_error=False)
        stream = io.BytesIO()
        code.save(stream, kind="png", scale=1, border=0)
        row.paste(Image.open(stream).convert("L"), (place * 21, 0))
    row.save(HERE / "qr.png", optimize=True)


if __name__ == "__main__":
    for style in ("noto", "fluent"):
        icons(Path(sys.argv[1]), style)
    fonts(Path(sys.argv[1]))
    codes()
