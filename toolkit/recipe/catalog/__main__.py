"""``python -m toolkit.recipe.catalog``: write catalog.json from the installed torch, torchvision and timm."""

from toolkit.recipe.catalog import FILE
from toolkit.recipe.catalog.generate import generate

FILE.write_text(generate(), encoding="utf-8")
print(f"wrote {FILE}")
